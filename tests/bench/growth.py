"""How the cost of a sweep grows: with cells, with layers, with the length."""

from collections.abc import Iterator
from typing import Any

import torch

from tests.bench import models
from tests.bench.case import FAST, FAST_PLAN, HOOKS, PLAN, SWEEP, Bench, Case, Workload
from tests.bench.figure import Figure
from tests.bench.grid import Task, forget_plans
from tests.bench.hooks import inputs
from tests.bench.report import Table
from tests.bench.timing import Job


def run(bench: Bench) -> Iterator[Table]:
    """A table for each way to grow, and a chart."""
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
    series: dict[str, list[tuple[float, float]]] = {}
    for row, count, (n, *_) in zip(rows, counts, sizes, strict=True):
        for name, times in row.times.items():
            series.setdefault(name, []).append((n, times.median / count * 1e3))
    shown = [(name, *(f"{ms:.2f} ms" for _, ms in points)) for name, points in series.items()]
    figure = Figure(f"growth-{what}", f"Time of one cell, by {what}", what, "ms", series)
    return Table(f"Growth with {what}: time of one cell", ("", *(row.name for row in rows)), shown, figure=figure)


def _case(name: str, layers: int, length: int, cells: int) -> Case:
    from fxsight.model import Model

    net: Any = models.deep(layers, length)
    task = Task(models.tokens(net, 2, length, 3), models.tokens(net, 2, length, 4), layers, length)
    each = -(-cells // layers)
    places = [(cell // each, cell % each * length // each, 1.0 + cell % each) for cell in range(layers * each)]
    with torch.no_grad():
        jobs = {HOOKS: _naive(net, task, places)}
        for mode, swept, planned in (("exact", SWEEP, PLAN), ("fast", FAST, FAST_PLAN)):
            jobs |= _swept(Model(net, cache=False), task, places, mode, (swept, planned))
    return Case(name, jobs, reference=HOOKS, rounds=3, calls=1)


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


def _swept(model: Any, task: Task, places: Places, mode: str, names: tuple[str, str]) -> dict[str, Job]:
    """A sweep, which makes its plan; and a plan that is there."""

    def body(cell: Any) -> Any:
        layer, position, strength = places[cell]
        model.transformer.h[layer].input[:, position] *= strength
        return task.metric(model.lm_head.output)

    def sweep() -> list[torch.Tensor]:
        forget_plans(model)
        return [model.sweep(body, task.corrupted, mode=mode, cell=range(len(places))).values]

    plan = model.plan(body, task.corrupted, mode=mode, cell=range(len(places)))
    return dict(zip(names, (sweep, lambda: [plan.run().values]), strict=True))


WORKLOAD = Workload("growth", "sweeps with more cells, layers and positions", run, default=False)
