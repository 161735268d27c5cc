"""Where a repeated trace spends its time: functions of fxsight by share, from cProfile."""

import cProfile
import pstats
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import models, t1
from tests.bench.case import Bench, Workload
from tests.bench.report import Table
from tests.bench.timing import Job

TRACES, SHOWN = 100, 22
NOTE = (
    "Shares of one repeated trace, under cProfile, which makes Python calls look dearer than C calls. "
    "Whole: with what it calls; own: without."
)
_PACKAGE = str(Path(__file__).parents[2] / "fxsight")


def run(bench: Bench) -> Iterator[Table]:
    """One table for one save, one for twelve, one for twelve edits."""
    from fxsight.model import Model

    model, x = Model(models.layers(), cache=False), models.rows()
    traces = 10 if bench.options.quick else TRACES
    for title, (job, _) in (
        ("1 save", t1.one_save(model, x)),
        ("12 saves", t1.twelve_saves(model, x)),
        ("12 in-place edits", t1.edits(model, x)),
    ):
        yield Table(f"T1, {title}: where a repeated trace spends its time", COLUMNS, _rows(job, traces), NOTE)


COLUMNS = ["function", "calls a trace", "own", "whole"]


def _rows(job: Job, traces: int) -> list[list[str]]:
    for _ in range(3):
        job()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(traces):
        job()
    profile.disable()
    stats: Any = pstats.Stats(profile)
    rows = [row for row in _functions(stats) if row[3] >= 0.01]
    rows.sort(key=lambda row: -row[3])
    return [[name, f"{calls / traces:.3g}", f"{own:.1%}", f"{whole:.1%}"] for name, calls, own, whole in rows[:SHOWN]]


def _functions(stats: Any) -> Iterator[tuple[str, int, float, float]]:
    """Name, calls, own and whole share of each function of the package, and of what it calls elsewhere."""
    total = stats.total_tt
    for (file, _, name), (_, calls, own, whole, callers) in stats.stats.items():
        if file.startswith(_PACKAGE):
            yield f"`{Path(file).stem}.{name}`", calls, own / total, whole / total
            continue
        ours = [caller for caller in callers if caller[0].startswith(_PACKAGE)]
        whole = sum(callers[caller][3] for caller in ours)
        if ours:
            yield f"`{_label(file, name)}`", sum(callers[c][1] for c in ours), own / total, whole / total


def _label(file: str, name: str) -> str:
    return name.strip("<>") if file == "~" else f"{Path(file).stem}.{name}"


WORKLOAD = Workload("hotspots", "where T1's repeated traces spend their time (cProfile)", run, default=False)
