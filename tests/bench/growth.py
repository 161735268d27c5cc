"""How the cost of a sweep grows: with cells, with layers, with the length."""

from collections.abc import Iterator
from typing import Any

import torch

from tests.bench import models
from tests.bench.case import FAST, HOOKS, SWEEP, Bench, Case, Workload
from tests.bench.grid import Task
from tests.bench.hooks import inputs
from tests.bench.report import Table
from tests.bench.timing import Job

BAR = 40  # characters of the longest bar


def run(bench: Bench) -> Iterator[Table]:
    """A table for each way to grow, with bars for the time of a cell."""
    short = bench.options.quick
    cells = [10, 30] if short else [10, 100, 1000]
    layers = [2, 4] if short else [2, 12, 48]
    lengths = [16, 32] if short else [16, 128, 512]
    yield _table(bench, "cells", [(n, 4, 16, n) for n in cells])
    yield _table(bench, "layers", [(n, n, 16, 48) for n in layers])
    yield _table(bench, "length", [(n, 4, n, 48) for n in lengths])


def _table(bench: Bench, what: str, sizes: list[tuple[int, int, int, int]]) -> Table:
    rows = bench.compare("growth", (_case(f"{what} {n}", *size) for n, *size in sizes))
    counts = [layers * -(-cells // layers) for _, layers, _, cells in sizes]
    pairs = zip(rows, counts, strict=True)
    each = [(row.name, name, t.median / count) for row, count in pairs for name, t in row.times.items()]
    longest = max(seconds for *_, seconds in each)
    shown = [(a, b, f"{s * 1e3:.2f} ms", "█" * round(BAR * s / longest)) for a, b, s in each]
    return Table(f"Growth with {what}: time of one cell", ("", "", "a cell", ""), shown)


def _case(name: str, layers: int, length: int, cells: int) -> Case:
    from fxsight.model import Model

    net: Any = models.deep(layers, length)
    task = Task(models.tokens(net, 2, length, 3), models.tokens(net, 2, length, 4), layers, length)
    each = -(-cells // layers)
    places = [(cell // each, cell % each * length // each, 1.0 + cell % each) for cell in range(layers * each)]
    with torch.no_grad():
        jobs = {HOOKS: _naive(net, task, places)}
        jobs |= {name: _swept(Model(net, cache=False), task, places, mode) for name, mode in _MODES}
    return Case(name, jobs, reference=HOOKS, rounds=3, calls=1)


_MODES = ((SWEEP, "exact"), (FAST, "fast"))
Places = list[tuple[int, int, float]]  # layer, position, strength


def _naive(net: Any, task: Task, places: Places) -> Job:
    def job() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for layer, position, strength in places:

            def change(hidden: torch.Tensor, position: int = position, strength: float = strength) -> torch.Tensor:
                hidden = hidden.clone()
                hidden[:, position] *= strength
                return hidden

            with inputs(net.transformer.h[layer], change):
                found.append(task.metric(net(task.corrupted).logits))
        return [torch.stack(found)]

    return job


def _swept(model: Any, task: Task, places: Places, mode: str) -> Job:
    def body(cell: Any) -> Any:
        layer, position, strength = places[cell]
        model.transformer.h[layer].input[:, position] *= strength
        return task.metric(model.lm_head.output)

    return lambda: [model.sweep(body, task.corrupted, mode=mode, cell=range(len(places))).values]


WORKLOAD = Workload("growth", "sweeps with more cells, layers and positions", run, default=False)
