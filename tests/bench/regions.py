"""Compilation by regions: seconds to compile, by depth and against one piece; and what the regions cost at run time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from tests.bench import models
from tests.bench.case import BARE, HOOKS, PROGRAM, Bench, Case, Workload, say
from tests.bench.language import BATCH, LENGTH
from tests.bench.report import Table, paired_table
from tests.bench.startup import COLUMNS, Numbers, start, table_rows
from tests.bench.timing import Job

BY_REGIONS = "fxsight by regions"
WHOLE = "fxsight in one piece"
COMPILE_NOTE = (
    "One start each, everything captured before and Inductor not imported, so the first call imports and compiles. "
    "Cold: with empty folders, but for what Inductor finds out about the machine. Steered: a block is changed, in a "
    "process that finds the program without the change on disk."
)


def _compilation(bench: Bench) -> Iterator[Table]:
    small = "toy" if bench.options.quick else "gpt2"
    tasks: list[tuple[str, str, str, str]] = [
        (f"{small}, by regions, cold", "regions", small, "a"),
        (f"{small}, by regions, from disk", "regions", small, "a"),
        (f"{small}, by regions, steered", "steered", small, "a"),
        (f"{small}, in one piece, cold", "whole", small, "b"),
        *(
            (f"{depth} layers of width 64, by regions, cold", "regions", f"deep{depth}", str(depth))
            for depth in (12, 48)
        ),
    ]
    found: dict[str, list[Numbers]] = {}
    with TemporaryDirectory(prefix="fxsight-bench-") as folder:
        for own in ("a", "b", "12", "48"):  # what the first compilation on a machine does, for each folder
            start(Path(sys.executable), "regions", bench.options, f"{folder}/{own}", "kernel")
        for title, task, model, own in tasks:
            say(f"regions: {title}")
            found[title] = [start(Path(sys.executable), task, bench.options, f"{folder}/{own}", model)]
    yield Table("Compiling by regions", COLUMNS, table_rows(found), COMPILE_NOTE)


def _running(bench: Bench) -> Iterator[Table]:
    names = ["toy"] if bench.options.quick else ["toy", "gpt2"]
    rows = bench.compare("regions", [_case(name) for name in names])
    note = f"Batch {BATCH} × {LENGTH} tokens, the last logits saved; ratio to the bare module's time."
    yield paired_table("Running regions", [(row.name, row.times) for row in rows], BARE, note)


def _case(name: str) -> Case:
    """One body, its program by each tier."""
    from fxsight.model import Model

    net: Any = models.LANGUAGE[name]()
    ids = models.tokens(net, BATCH, LENGTH)

    def program(backend: str) -> Any:
        model = Model(net, cache=False)
        with model.trace(ids, backend=backend) as tracer:
            model.lm_head.output[:, -1].save()
        return tracer.program

    whole = program("inductor")
    whole.compile_whole()
    ours = {PROGRAM: program("eager"), BY_REGIONS: program("inductor"), WHOLE: whole}

    def bare() -> list[Tensor]:
        return [net(ids).logits[:, -1]]

    jobs: dict[str, Job] = {BARE: bare, HOOKS: bare}
    jobs |= {title: (lambda p=p: list(p(ids))) for title, p in ours.items()}  # type: ignore[misc]
    return Case(name, jobs, close=frozenset((BY_REGIONS, WHOLE)), rounds=15)


def _run(bench: Bench) -> Iterator[Table]:
    yield from _compilation(bench)
    yield from _running(bench)


WORKLOAD = Workload("regions", "compilation by regions: time to compile, time to run (minutes)", _run, default=False)
