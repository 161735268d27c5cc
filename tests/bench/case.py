"""What is measured: a ``Workload`` fills a part of the report; a ``Case`` is one task for many contenders."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.check import largest_difference
from tests.bench.remote import Remote, Worker
from tests.bench.report import Table, duration
from tests.bench.timing import Clock, Job, Local, Paired, interleave

BARE = "bare"
HOOKS = "hooks"
CAREFUL = "careful hooks"
COMPILED = "torch.compile"
NNSIGHT = "nnsight"
TRACE = "fxsight"
SWEEP = "fxsight sweep"
FAST = "fxsight fast sweep"
SESSION = "fxsight session"
PLAN = "fxsight plan"
FAST_PLAN = "fxsight fast plan"
PROGRAM = "fxsight program"
INDUCTOR = "fxsight inductor"
INDUCTOR_PROGRAM = "fxsight inductor program"

CLOSE = frozenset((INDUCTOR, INDUCTOR_PROGRAM, CAREFUL, FAST, FAST_PLAN))

NNSIGHT_PYTHON = Path(__file__).parents[2] / ".venv-nnsight" / "bin" / "python"


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    quick: the smallest sizes, few rounds.  compiled: ``torch.compile`` of the bare module, too.
    nnsight: whether it takes part.  rounds: instead of each case's own number.
    cpu_time: the time of the process instead of the clock's.
    """

    quick: bool = False
    compiled: bool = False
    nnsight: bool = True
    rounds: int | None = None
    threads: int = 1
    cpu_time: bool = False


@dataclass(frozen=True)
class Case:
    """One task. ``jobs``, by contender, return what it wants; what those of ``HOOKS`` return is right.

    remote: nnsight's job of that name, in ``nnsight_jobs``; "" for none.
    close: contenders with other kernels or shapes, and so other last bits; all else must be bitwise equal.
    calls: how many make a batch; by default as many as fill ``timing.BATCH``.
    unchecked: contenders that do something else, as the bare module does.
    made: seconds that a contender has taken before its first call: for compiling.
    """

    name: str
    jobs: Mapping[str, Job]
    remote: str = ""
    reference: str = BARE
    close: frozenset[str] = CLOSE
    rounds: int = 15
    calls: int | None = None
    unchecked: frozenset[str] = frozenset()
    made: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Row:
    """A measured case: times and, where they were compared, the largest difference from the hooks'."""

    name: str
    times: Mapping[str, Paired]
    differences: Mapping[str, float]
    made: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass
class Bench:
    """One run: its options, the nnsight worker, and every number seen."""

    options: Options
    worker: Worker | None = None
    rows: list[tuple[str, Row]] = field(default_factory=list)

    def compare(self, workload: str, cases: Iterable[Case]) -> list[Row]:
        """Check, then time, each case as it is made.

        Raises: Different when a contender does not compute what the hooks do.
        """
        rows = [self._row(f"{workload}: {case.name}", case) for case in cases]
        self.rows += [(workload, row) for row in rows]
        return rows

    def _row(self, title: str, case: Case) -> Row:
        say(title)
        clocks: dict[str, Clock] = {name: Local(job, self.options.cpu_time) for name, job in case.jobs.items()}
        if case.remote and self.worker is not None:
            clocks[NNSIGHT] = Remote(self.worker, case.remote)
        differences = self._check(title, case, clocks)
        rounds = self.options.rounds or (min(3, case.rounds) if self.options.quick else case.rounds)
        seconds = interleave(clocks, rounds, case.calls)
        times = {name: Paired(own, seconds[case.reference]) for name, own in seconds.items()}
        return Row(case.name, times, differences, case.made)

    def _check(self, title: str, case: Case, clocks: Mapping[str, Clock]) -> dict[str, float]:
        expected = clocks[HOOKS].result()
        return {
            name: largest_difference(f"{title}: {name}", clock.result(), expected, name in case.close)
            for name, clock in clocks.items()
            if name not in (BARE, COMPILED, HOOKS, *case.unchecked)
        }


@dataclass(frozen=True)
class Workload:
    """A page of the report. ``default``: whether it is measured when no names are given."""

    name: str
    about: str
    run: Callable[[Bench], Iterable[Table]]
    default: bool = True


def say(text: str) -> None:
    """Progress, apart from the tables."""
    print(f"  {text}", file=sys.stderr, flush=True)


def difference_table(title: str, rows: Sequence[Row]) -> Table:
    """The largest difference of each contender from the hooks; 0 means the same bits."""
    names = list(dict.fromkeys(name for row in rows for name in row.differences))
    body = [[row.name, *(f"{row.differences[n]:.1e}" if n in row.differences else "" for n in names)] for row in rows]
    return Table(title, ["", *names], [[cell.replace("0.0e+00", "0") for cell in cells] for cells in body])


def paid_table(title: str, rows: Sequence[Row], calls: Callable[[Row], int]) -> Table:
    """After how many calls compiling has paid.  calls: of the module, in one run of a contender."""
    body: list[list[str]] = []
    for row in rows:
        for name, seconds in row.made.items():
            gained = (row.times[HOOKS].median - row.times[name].median) / calls(row)
            body.append([row.name, name, duration(seconds), f"{seconds / gained:,.0f}" if gained > 0 else "never"])
    return Table(title, ["", "", "compiling", "calls of the module until it has paid"], body)


def compile_seconds(net: Any, *inputs: Any) -> float:
    """How long the first call under ``torch.compile`` takes, in time of the process."""
    import torch

    start = time.process_time()
    fast: Any = torch.compile(net)
    fast(*inputs)
    return time.process_time() - start


def compiled(net: Any, call: Callable[[Any], Any], times: int = 1) -> Job:
    """The bare module under ``torch.compile``, called so often, as a job that returns nothing and keeps nothing."""
    import torch

    fast = torch.compile(net)

    def job() -> list[torch.Tensor]:
        for _ in range(times):
            call(fast)
        return []

    return job
