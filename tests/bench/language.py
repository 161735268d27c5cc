"""T2 and GPT-2 small: read a block, steer a block, stop early, on a language model."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor

from fxsight.auto import Backend
from tests.bench import hooks, models
from tests.bench.case import (
    BARE,
    CAREFUL,
    COMPILED,
    HOOKS,
    INDUCTOR,
    INDUCTOR_PROGRAM,
    PROGRAM,
    TRACE,
    Bench,
    Case,
    Workload,
    compiled,
)
from tests.bench.report import Table, paired_table
from tests.bench.timing import Job

BATCH, LENGTH = 2, 16
NOTE = (
    f"Batch {BATCH} × {LENGTH} tokens. Careful hooks ask for the last logits only, or end the forward, where "
    "that will do. Ratio of one call to the bare module's, and the difference: medians over paired rounds."
)


class Setting:
    """A language model with its inputs: ``net`` bare, ``model`` in fxsight; ``block`` is read and steered."""

    def __init__(self, name: str) -> None:
        from fxsight.model import Model

        net: Any = models.LANGUAGE[name]()
        self.net, self.model = net, Model(net, cache=False)
        self.ids = models.tokens(net, BATCH, LENGTH)
        self.vector = models.direction(net)
        self.block: int = net.config.n_layer // 2 - 1

    def bare(self, bench: Bench) -> dict[str, Job]:
        """The module alone, and compiled if wanted."""
        jobs: dict[str, Job] = {BARE: lambda: [self.net(self.ids).logits]}
        if bench.options.compiled:
            jobs[COMPILED] = compiled(self.net, lambda fast: fast(self.ids))
        return jobs


def _toy(bench: Bench) -> Iterator[Table]:
    rows = bench.compare("t2", _cases(bench, "toy", ("eager", "inductor"), rounds=15))
    title = "T2: GPT-2's architecture, 2 layers of width 64"
    yield paired_table(title, [(row.name, row.times) for row in rows], BARE, NOTE)


def _small(bench: Bench) -> Iterator[Table]:
    name = "toy" if bench.options.quick else "gpt2"
    rows = bench.compare("gpt2", _cases(bench, name, ("eager",), rounds=9))
    yield paired_table("GPT-2 small, random weights", [(row.name, row.times) for row in rows], BARE, NOTE)


def _cases(bench: Bench, name: str, tiers: tuple[Backend, ...], rounds: int) -> Iterator[Case]:
    setting = Setting(name)
    bare = setting.bare(bench)
    for title, by_hand, careful, traced in (
        ("read a block, and the last logits", read_hooks, partial(read_hooks, logits_to_keep=1), read),
        ("steer a block, save the last logits", steer_hooks, partial(steer_hooks, logits_to_keep=1), steer),
        (
            "read the third block only" if name == "gpt2" else "read the first block only",
            only_hooks,
            stop_hooks,
            only,
        ),
    ):
        jobs = {**bare, HOOKS: by_hand(setting), CAREFUL: careful(setting)}
        for tier in tiers:
            jobs |= _ours(setting, traced, tier)
        yield Case(title, jobs, f"{name} {traced.__name__}", rounds=rounds)


# -- hooks ---------------------------------------------------------------------------------------------------


def read_hooks(s: Setting, **options: int) -> Job:
    def job() -> list[Tensor]:
        kept: list[Tensor] = []
        with hooks.outputs({s.net.transformer.h[s.block]: kept.append}):
            logits = s.net(s.ids, **options).logits
        return [*kept, logits[:, -1]]

    return job


def steer_hooks(s: Setting, **options: int) -> Job:
    def job() -> list[Tensor]:
        with hooks.outputs({s.net.transformer.h[s.block]: lambda output: output + s.vector}):
            return [s.net(s.ids, **options).logits[:, -1]]

    return job


def early_block(net: Any) -> int:
    """The third of twelve, the first of two."""
    return min(2, int(net.config.n_layer) // 2 - 1)


def only_hooks(s: Setting) -> Job:
    def job() -> list[Tensor]:
        kept: list[Tensor] = []
        with hooks.outputs({s.net.transformer.h[early_block(s.net)]: kept.append}):
            s.net(s.ids)
        return kept

    return job


def stop_hooks(s: Setting) -> Job:
    def job() -> list[Tensor]:
        kept: list[Tensor] = []
        block = s.net.transformer.h[early_block(s.net)]
        with suppress(hooks.Stop), hooks.outputs({block: hooks.keep_and_stop(kept)}):
            s.net(s.ids)
        return kept

    return job


# -- fxsight -------------------------------------------------------------------------------------------------

Body = Callable[[Setting, Backend], tuple[list[Tensor], Any]]


def _ours(s: Setting, body: Body, tier: Backend) -> dict[str, Job]:
    """The body traced anew at each call, and its finished program called again."""
    program = body(s, tier)[1].program
    traced, called = (TRACE, PROGRAM) if tier == "eager" else (INDUCTOR, INDUCTOR_PROGRAM)
    return {traced: lambda: body(s, tier)[0], called: lambda: program(s.ids)}


def read(s: Setting, tier: Backend) -> tuple[list[Tensor], Any]:
    with s.model.trace(s.ids, backend=tier) as tracer:
        hidden = s.model.transformer.h[s.block].output.save()
        last = s.model.output.logits[:, -1].save()
    return [hidden, last], tracer


def steer(s: Setting, tier: Backend) -> tuple[list[Tensor], Any]:
    with s.model.trace(s.ids, backend=tier) as tracer:
        s.model.transformer.h[s.block].output += s.vector
        last = s.model.output.logits[:, -1].save()
    return [last], tracer


def only(s: Setting, tier: Backend) -> tuple[list[Tensor], Any]:
    with s.model.trace(s.ids, backend=tier) as tracer:
        hidden = s.model.transformer.h[early_block(s.net)].output.save()
    return [hidden], tracer


TOY = Workload("t2", "a toy transformer: read, steer and read only, eager and Inductor", _toy)
SMALL = Workload("gpt2", "GPT-2 small: one read, one steer, early stop", _small)
