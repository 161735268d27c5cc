"""The command line: which workloads, how thoroughly, and where the tables go."""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from tests.bench import (
    background,
    eap,
    edited,
    grid_memory,
    growth,
    hotspots,
    invokes,
    language,
    memory,
    regions,
    startup,
    sweeps,
    t1,
    w1,
    w8,
    w14,
    w15,
    w20,
)
from tests.bench.case import NNSIGHT_PYTHON, Bench, Options, Workload, say
from tests.bench.remote import Worker
from tests.bench.report import Table, machine, replace_between

# A new workload: a file like these, and its line here.
WORKLOADS: Sequence[Workload] = (
    t1.WORKLOAD,
    language.TOY,
    language.SMALL,
    startup.CAPTURE,
    startup.COMPILE,
    memory.WORKLOAD,
    regions.WORKLOAD,
    background.WORKLOAD,
    edited.WORKLOAD,
    w1.WORKLOAD,
    sweeps.W2,
    sweeps.W3,
    sweeps.W21,
    invokes.WORKLOAD,
    growth.WORKLOAD,
    grid_memory.WORKLOAD,
    w8.WORKLOAD,
    eap.WORKLOAD,
    w14.WORKLOAD,
    w15.WORKLOAD,
    w20.WORKLOAD,
    hotspots.WORKLOAD,
)
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
FIGURES = PAGE.parent / "figures"


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write if asked to.  Returns: the exit status."""
    asked = _parser().parse_args(arguments)
    known = {workload.name: workload for workload in WORKLOADS}
    wanted = [known[name] for name in asked.names] or [w for w in WORKLOADS if w.default]
    options = Options(asked.quick, asked.compile, not asked.no_nnsight, asked.rounds, asked.threads, asked.cpu_time)
    torch.set_num_threads(options.threads)
    console = Console(width=None if Console().is_terminal else 190)
    with ExitStack() as stack:
        bench = Bench(options, _worker(options, stack))
        pages = [(workload, _show(workload, bench, console)) for workload in wanted]
    if asked.json:
        _dump(bench, asked.json)
    if asked.write:
        flags = [a for a in arguments if a in ("--quick", "--compile", "--cpu-time", "--no-nnsight")]
        _write(pages, bench, flags)
    return 0


def _parser() -> argparse.ArgumentParser:
    names = [workload.name for workload in WORKLOADS]
    about = "\n".join(f"  {w.name:9} {w.about}{'' if w.default else ' (only when named)'}" for w in WORKLOADS)
    parser = argparse.ArgumentParser(
        "bench", description=f"Workloads:\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        choices=[[], *names],
        metavar="name",
        help="which workloads; by default all that are not slow",
    )
    add("--quick", action="store_true", help="smallest sizes, few rounds: does it run at all")
    add("--compile", action="store_true", help="torch.compile of the bare module, too (slow)")
    add("--no-nnsight", action="store_true", help="without nnsight")
    add("--rounds", type=int, help="paired rounds for each case")
    add("--threads", type=int, default=1, help="threads for torch (default 1: the machine may be shared)")
    add("--cpu-time", action="store_true", help="time of the process, not of the clock: for a busy machine")
    add("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    add("--json", type=Path, help="a file for every time of every round")
    return parser


def _worker(options: Options, stack: ExitStack) -> Worker | None:
    if not options.nnsight:
        return None
    if not NNSIGHT_PYTHON.exists():
        say("nnsight is left out: .venv-nnsight is not there; sh .ci/bench makes it")
        return None
    return stack.enter_context(Worker(NNSIGHT_PYTHON, options.threads, options.quick, options.cpu_time))


def _show(workload: Workload, bench: Bench, console: Console) -> list[Table]:
    """The tables of one workload, printed as they come."""
    tables: list[Table] = []
    for table in workload.run(bench):
        table.show(console)
        tables.append(table)
    return tables


def _write(pages: Sequence[tuple[Workload, Sequence[Table]]], bench: Bench, flags: Sequence[str]) -> None:
    """Exchange each measured workload's part of the page; the words around it stay."""
    nnsight = bench.worker.about["nnsight"] if bench.worker else ""
    threads = f"{bench.options.threads} thread{'s' * (bench.options.threads > 1)}"
    page = PAGE.read_text()
    for workload, tables in pages:
        command = " ".join(["sh .ci/bench", workload.name, *flags])
        head = f"{machine(nnsight)} Torch on {threads}. `{command}`"
        page = replace_between(page, workload.name, "\n".join([head, "", *(table.markdown() for table in tables)]))
        for figure in (table.figure for table in tables if table.figure):
            FIGURES.mkdir(exist_ok=True)
            (FIGURES / f"{figure.name}.svg").write_text(figure.svg())
    PAGE.write_text(page)


def _dump(bench: Bench, path: Path) -> None:
    rows = [
        {
            "workload": workload,
            "case": row.name,
            "seconds": {n: t.seconds for n, t in row.times.items()},
            "difference": row.differences,
        }
        for workload, row in bench.rows
    ]
    path.write_text(json.dumps(rows, indent=1))
