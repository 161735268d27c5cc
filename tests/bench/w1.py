"""W1: IOI residual patching, layer × position: one forward, or one trace, a cell; and one sweep for all."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.bench import hooks, models
from tests.bench.case import (
    CAREFUL,
    COMPILED,
    FAST,
    FAST_PLAN,
    HOOKS,
    PLAN,
    SESSION,
    SWEEP,
    TRACE,
    Bench,
    Case,
    Options,
    Workload,
    compile_seconds,
    compiled,
    difference_table,
    paid_table,
)
from tests.bench.grid import Task, forget_plans, stacked
from tests.bench.report import Table, paired_table
from tests.bench.sweeps import count_of
from tests.bench.timing import Job

NOTE = (
    "Every cell has been compared with the naive hooks' first. Careful hooks: one batched forward a layer, last logits "
    "only. fxsight: a trace a cell; session: the same traces in one session, which shares what they have in common; "
    "sweep: one call. Both make their plan; a plan is made before it is timed. torch.compile: the bare module, as "
    "often as there are cells, without edits."
)


def run(bench: Bench) -> Iterator[Table]:
    """One row."""
    rows = bench.compare("w1", _cases(bench.options))
    title = "W1: residual patching on GPT-2 small, layer × position, 8 prompts × 15 tokens"
    yield paired_table(title, [(row.name, row.times) for row in rows], HOOKS, NOTE)
    yield difference_table("W1: the largest difference from the naive hooks", rows)
    if bench.options.compiled:
        yield paid_table("W1: torch.compile", rows, lambda row: count_of(row.name))


def _cases(options: Options) -> Iterator[Case]:
    from fxsight.model import Model

    name = "toy" if options.quick else "gpt2"
    net: Any = models.LANGUAGE[name]()
    task = Task.of(net, options.quick)
    model = Model(net, cache=False)
    jobs = {
        HOOKS: naive(net, task),
        CAREFUL: careful(net, task),
        TRACE: traced(model, task),
        SESSION: in_session(model, task),
        SWEEP: swept(model, task, "exact"),
        FAST: swept(model, task, "fast"),
        PLAN: planned(net, model, task, "exact"),
        FAST_PLAN: planned(net, model, task, "fast"),
    }
    made: dict[str, float] = {}
    if options.compiled:
        made[COMPILED] = compile_seconds(net, task.corrupted)
        jobs[COMPILED] = compiled(net, lambda fast: fast(task.corrupted), len(list(task.cells())))
    title = f"{task.layers} × {task.length} cells"
    yield Case(title, jobs, f"w1 {name}", reference=HOOKS, rounds=3, calls=1, made=made)


def clean_inputs(net: Any, task: Task) -> list[Tensor]:
    """What each block gets in the clean run."""
    kept: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
        for block in net.transformer.h[: task.layers]
    ]
    net(task.clean)
    for handle in handles:
        handle.remove()
    return kept


def naive(net: Any, task: Task) -> Job:
    def job() -> list[Tensor]:
        kept = clean_inputs(net, task)
        return stacked([_cell(net, task, kept[layer], layer, position) for layer, position in task.cells()])

    return job


def _cell(net: Any, task: Task, clean: Tensor, layer: int, position: int) -> Tensor:
    def patch(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, position] = clean[:, position]
        return hidden

    with hooks.inputs(net.transformer.h[layer], patch):
        found: Tensor = task.metric(net(task.corrupted).logits)
    return found


def careful(net: Any, task: Task) -> Job:
    """All positions of a layer as one batch, ``logits_to_keep=1``."""
    prompts, times = len(task.corrupted), task.length
    repeated = task.corrupted.repeat(times, 1)
    rows = torch.arange(prompts * times)
    positions = rows // prompts

    def layer_cells(block: Any, clean: Tensor) -> list[Tensor]:
        def patch(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            hidden[rows, positions] = clean.repeat(times, 1, 1)[rows, positions]
            return hidden

        with hooks.inputs(block, patch):
            found: Tensor = task.metric(net(repeated, logits_to_keep=1).logits)
        return list(torch.split(found, prompts))

    def job() -> list[Tensor]:
        kept = clean_inputs(net, task)
        blocks = net.transformer.h[: task.layers]
        return stacked([c for b, clean in zip(blocks, kept, strict=True) for c in layer_cells(b, clean)])

    return job


def traced(model: Any, task: Task) -> Job:
    blocks = model.transformer.h

    def job() -> list[Tensor]:
        with model.trace(task.clean, backend="eager"):
            kept = [block.input.save() for block in blocks[: task.layers]]
        cells: list[Tensor] = []
        for layer, position in task.cells():
            with model.trace(task.corrupted, backend="eager"):
                blocks[layer].input[:, position] = kept[layer][:, position]
                cells.append(task.metric(model.output.logits).save())
        return stacked(cells)

    return job


def in_session(model: Any, task: Task) -> Job:
    """The same traces in a session, which shares what they have in common."""
    blocks = model.transformer.h

    def job() -> list[Tensor]:
        cells: list[Tensor] = []
        forget_plans(model)
        with model.session():
            with model.trace(task.clean):
                kept = [block.input for block in blocks[: task.layers]]
            for layer, position in task.cells():
                with model.trace(task.corrupted):
                    blocks[layer].input[:, position] = kept[layer][:, position]
                    cells.append(task.metric(model.lm_head.output).save())
        return stacked(cells)

    return job


def swept(model: Any, task: Task, mode: str) -> Job:
    """One sweep, with its plan and its clean run."""
    blocks = model.transformer.h

    def job() -> list[Tensor]:
        with model.trace(task.clean, backend="eager"):
            kept = [block.input.save() for block in blocks[: task.layers]]
        forget_plans(model)
        return [_plan(model, task, kept, mode).run().values.flatten(0, 1)]

    return job


def planned(net: Any, model: Any, task: Task, mode: str) -> Job:
    """A sweep whose plan is there."""
    plan = _plan(model, task, clean_inputs(net, task), mode)
    return lambda: [plan.run().values.flatten(0, 1)]


def _plan(model: Any, task: Task, kept: list[Tensor], mode: str) -> Any:
    blocks = model.transformer.h

    def patch(layer: int, position: int) -> Any:
        blocks[layer].input[:, position] = kept[layer][:, position]
        return task.metric(model.lm_head.output)

    axes = {"layer": range(task.layers), "position": range(task.length)}
    return model.plan(patch, task.corrupted, mode=mode, **axes)


WORKLOAD = Workload(
    "w1", "IOI residual patching, layer × position, cell by cell and as a sweep (minutes)", run, default=False
)
