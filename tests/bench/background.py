"""Compilation in the background: when it is done, what it costs, and after how many runs it has paid."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tests.bench import models
from tests.bench.case import BARE, HOOKS, Bench, Case, Workload, say
from tests.bench.hooks import outputs
from tests.bench.language import BATCH, LENGTH
from tests.bench.report import Table, duration, paired_table

EAGER, AUTO = "fxsight program", "fxsight program, compiled by auto"
COLUMNS = ["", "compiled after", "by then, runs", "longest run", "other process", "paid after runs", "with the other"]
NOTE = (
    f"Batch {BATCH} × {LENGTH} tokens, a block steered, the last logits saved, again and again, in empty folders. "
    "Compiled after: on the clock, from the first run on, the two seconds in which nothing is done included. Longest "
    "run: the one at which the compilation is begun or the artifacts are read, less a median one. Other process: its "
    "processor time. Paid after runs: compiled runs that make up for the longest run, and for the other process, too."
)
LONGEST = 600.0  # seconds until a program should be compiled


class _Hot:
    """One body on one model, run until it is compiled."""

    def __init__(self, name: str) -> None:
        from fxsight.model import Model

        net: Any = models.LANGUAGE[name]().requires_grad_(False)
        self.net, self.model = net, Model(net)
        self.ids, self.vector = models.tokens(net, BATCH, LENGTH), models.direction(net)
        self.block: int = net.config.n_layer // 2 - 1

    def program(self, backend: str) -> Any:
        with self.model.trace(self.ids, backend=backend) as tracer:
            self.model.transformer.h[self.block].output += self.vector
            self.model.lm_head.output[:, -1].save()
        return tracer.program

    def hooked(self) -> list[Tensor]:
        with outputs({self.net.transformer.h[self.block]: self._steered}):
            return [self.net(self.ids).logits[:, -1]]

    def _steered(self, output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output) + self.vector
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def until_compiled(self) -> tuple[Any, float, list[float]]:
        """The program, the seconds until it was compiled, and those of each run by then.

        Raises: RuntimeError where that fails.
        """
        program, start, runs = self.program("auto"), time.perf_counter(), list[float]()
        while program.tier == "eager":
            before = time.process_time()
            program(self.ids)
            runs.append(time.process_time() - before)
            if "failed" in str(program.explain()) or time.perf_counter() - start > LONGEST:
                raise RuntimeError(f"it is not compiled: {program.explain()}")
        return program, time.perf_counter() - start, runs


def _run(bench: Bench) -> Iterator[Table]:
    found: list[list[str]] = []
    with _cold():
        rows = bench.compare("background", [_case(name, found) for name in _names(bench)])
    for row, cells in zip(rows, found, strict=True):
        gain = row.times[EAGER].median - row.times[AUTO].median
        pause, other = (float(cell) for cell in cells[3:5])
        paid = [f"{cost / gain:,.0f}" if gain > 0 else "never" for cost in (pause, pause + other)]
        cells[3:] = [duration(pause), duration(other), *paid]
    yield Table("Compiling in the background", COLUMNS, found, NOTE)
    yield paired_table("What auto has compiled", [(row.name, row.times) for row in rows], BARE)


def _names(bench: Bench) -> list[str]:
    return ["toy"] if bench.options.quick else ["toy", "gpt2"]


def _case(name: str, found: list[list[str]]) -> Case:
    hot = _Hot(name)
    say(f"background: {name}, until it is compiled")
    with torch.no_grad():
        before = _others()
        program, seconds, runs = hot.until_compiled()
        other, pause = _others() - before, max(runs) - median(runs)
        found.append([name, duration(seconds), f"{len(runs):,}", str(pause), str(other)])
        say(str(program.explain()).replace("\n", "; "))
        eager = hot.program("eager")
    jobs = {BARE: lambda: [hot.net(hot.ids).logits[:, -1]], HOOKS: hot.hooked}
    jobs |= {EAGER: lambda: list(eager(hot.ids)), AUTO: lambda: list(program(hot.ids))}
    return Case(name, jobs, close=frozenset((EAGER, AUTO)))


def _others() -> float:
    """Seconds of processor of processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def _cold() -> Iterator[None]:
    """Empty folders for what is captured and compiled."""
    names = ("FXSIGHT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with TemporaryDirectory(prefix="fxsight-bench-") as folder:
        os.environ.update({name: f"{folder}/{name.lower()}" for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


WORKLOAD = Workload("background", "compilation in the background: when it has paid (minutes)", _run, default=False)
