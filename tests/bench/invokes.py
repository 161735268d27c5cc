"""W21 as invokes: every head zeroed, an invoke for each, on the same prompts."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.bench import models
from tests.bench.case import BARE, HOOKS, NNSIGHT, Bench, Case, Workload
from tests.bench.grid import Task, forget_plans, stacked
from tests.bench.report import Table, paired_table
from tests.bench.sweeps import w21
from tests.bench.timing import Job

BATCHED = "fxsight invokes"
EXACT = 'fxsight mode="exact"'
FAST = 'fxsight mode="fast"'
NOTE = (
    "Zeroing each head, as an invoke on the same prompts; hooks: one forward a cell. Every cell has been compared with "
    "the hooks' first: bit for bit in mode exact, within 1e-4 in mode fast and where the invokes are one batch "
    "(nnsight's, and fxsight's without a mode). First: the plan is made, too; again: the same invokes once more."
)


def _jobs(net: Any, model: Any, other: Any, task: Task) -> dict[str, Job]:
    size, prompts = net.config.n_embd // net.config.n_head, task.corrupted
    cells = list(product(range(task.layers), range(net.config.n_head)))

    def run(model: Any = model, **options: Any) -> list[Tensor]:
        found: list[Any] = []
        with model.trace(**options) as tracer:
            for layer, head in cells:
                with tracer.invoke(prompts):
                    model.transformer.h[layer].attn.c_proj.input[..., head * size : (head + 1) * size] = 0
                    found.append(task.metric(model.lm_head.output).save())
        return stacked(found)

    def first(mode: str) -> list[Tensor]:
        forget_plans(other)
        return run(other, mode=mode)

    return {
        BATCHED: run,
        f"{EXACT}, first": lambda: first("exact"),
        f"{FAST}, first": lambda: first("fast"),
        f"{EXACT}, again": lambda: run(mode="exact"),
        f"{FAST}, again": lambda: run(mode="fast"),
    }


def _cases(size: str) -> Iterator[Case]:
    from fxsight.model import Model

    net: Any = models.MODELS[size]()
    task = Task.of(net, False)
    model = Model(net, cache=False)
    with torch.no_grad():
        hooks = w21(net, model, task)[0][HOOKS]
    jobs = {
        BARE: lambda: [net(task.corrupted).logits],
        HOOKS: hooks,
        **_jobs(net, model, Model(net, cache=False), task),
    }
    close = frozenset((BATCHED, NNSIGHT, f"{FAST}, first", f"{FAST}, again"))
    title = f"{task.layers} × {net.config.n_head} heads"
    yield Case(title, jobs, f"w21 {size} invokes", HOOKS, close, 5 if size == "small" else 1, 1)


def _run(bench: Bench) -> Iterator[Table]:
    rows = bench.compare("invokes", _cases("small"))
    title = "W21 as invokes: each head zeroed, 4 layers of width 256"
    yield paired_table(title, [(row.name, row.times) for row in rows], HOOKS, NOTE)


WORKLOAD = Workload("invokes", "each head zeroed, as invokes of one trace", _run)
