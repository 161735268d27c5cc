"""T1: a small model in a hot loop: what one trace costs when the model costs next to nothing."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.bench import hooks, models
from tests.bench.case import BARE, COMPILED, HOOKS, PROGRAM, TRACE, Bench, Case, Workload, compiled
from tests.bench.report import Table, duration, paired_table
from tests.bench.timing import Job


def run(bench: Bench) -> Iterator[Table]:
    """Ratios, and what is above the bare module in absolute time."""
    rows = bench.compare("t1", _cases(bench))
    times = [(row.name, row.times) for row in rows]
    yield paired_table("T1: twelve linear layers of 64, batch 2", times, BARE, NOTE)
    names = [name for name in rows[-1].times if name not in (BARE, COMPILED)]
    body = [[row.name, *(duration(row.times[n].over_at_best) if n in row.times else "" for n in names)] for row in rows]
    yield Table("T1: time above the bare module, each at its fastest batch", ["", *names], body, QUIET)


NOTE = "Ratio of one call to the bare module's, and the difference: medians over paired rounds."
QUIET = "Differences between the fastest batches: nearer to a quiet machine than medians are."


def _cases(bench: Bench) -> Iterator[Case]:
    from fxsight.model import Model

    net, x = models.layers(), models.rows()
    model = Model(net, cache=False)
    bare: dict[str, Job] = {BARE: lambda: [net(x)]}
    if bench.options.compiled:
        bare[COMPILED] = compiled(net, lambda fast: fast(x))
    for name, hooked, (traced, program) in (
        ("empty trace", lambda: [net(x)][1:], empty(model, x)),
        ("1 save", one_save_hooks(net, x), one_save(model, x)),
        ("12 saves", twelve_saves_hooks(net, x), twelve_saves(model, x)),
        ("12 in-place edits", edits_hooks(net, x), edits(model, x)),
    ):
        jobs = {**bare, HOOKS: hooked, TRACE: traced}
        yield Case(name, {**jobs, PROGRAM: program} if program else jobs, remote=f"t1 {name}")


# -- hooks ---------------------------------------------------------------------------------------------------


def one_save_hooks(net: Any, x: Tensor) -> Job:
    def job() -> list[Tensor]:
        kept: list[Tensor] = []
        with hooks.outputs({net.layers[-1]: kept.append}):
            net(x)
        return kept

    return job


def twelve_saves_hooks(net: Any, x: Tensor) -> Job:
    def job() -> list[Tensor]:
        kept: list[Tensor] = []
        with hooks.outputs(dict.fromkeys(net.layers, kept.append)):
            net(x)
        return kept

    return job


def edits_hooks(net: Any, x: Tensor) -> Job:
    def clear(output: Tensor) -> None:
        output[:, 0] = 0

    def job() -> list[Tensor]:
        with hooks.outputs(dict.fromkeys(net.layers, clear)):
            return [net(x)]

    return job


# -- fxsight: the trace, and its program called again --------------------------------------------------------


def empty(model: Any, x: Tensor) -> tuple[Job, Job | None]:
    def job() -> list[Tensor]:
        with model.trace(x, backend="eager"):
            pass
        return []

    return job, None


def one_save(model: Any, x: Tensor) -> tuple[Job, Job]:
    with model.trace(x, backend="eager") as tracer:
        model.layers[-1].output.save()

    def job() -> list[Tensor]:
        with model.trace(x, backend="eager"):
            kept = model.layers[-1].output.save()
        return [kept]

    return job, lambda: tracer.program(x)


def twelve_saves(model: Any, x: Tensor) -> tuple[Job, Job]:
    with model.trace(x, backend="eager") as tracer:
        for layer in model.layers:
            layer.output.save()

    def job() -> list[Tensor]:
        with model.trace(x, backend="eager"):
            kept = [layer.output.save() for layer in model.layers]
        return kept

    return job, lambda: tracer.program(x)


def edits(model: Any, x: Tensor) -> tuple[Job, Job]:
    with model.trace(x, backend="eager") as tracer:
        for layer in model.layers:
            layer.output[:, 0] = 0
        model.output.save()

    def job() -> list[Tensor]:
        with model.trace(x, backend="eager"):
            for layer in model.layers:
                layer.output[:, 0] = 0
            out: torch.Tensor = model.output.save()
        return [out]

    return job, lambda: tracer.program(x)


WORKLOAD = Workload("t1", "repeated traces of a tiny model: empty, 1 save, 12 saves, 12 in-place edits", run)
