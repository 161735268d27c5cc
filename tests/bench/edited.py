"""Compiled edited models: the edit against the same model compiled without it, by fxsight and by ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.bench import hooks, models
from tests.bench.case import BARE, COMPILED, HOOKS, Bench, Case, Workload
from tests.bench.language import early_block
from tests.bench.report import Table, paired_table
from tests.bench.timing import Job

PLAIN = "fxsight compiled, unedited"
EDITED = "fxsight compiled, edited"
BACKEND = "torch.compile, edited"
NOTE = (
    "One edit: a vector is added to the output of a block. To be compared: the two of fxsight (`model.compile()` and "
    '`edited.compile()`), and the two of torch (`torch.compile(net)` and `torch.compile(net, backend="fxsight", '
    'options={"edits": edited})`). The logits of the edited ones have been compared with those of hooks.'
)


class Steered:
    """One model, one prompt, and a vector that is added to what a block returns."""

    def __init__(self, name: str) -> None:
        from fxsight.backend import backend
        from fxsight.model import Model

        net: Any = models.LANGUAGE[name]()
        self.net, self.part = net, net.transformer.h[early_block(net)]
        self.ids = models.tokens(net, 2, 16)
        self.vector = models.direction(net)
        model = Model(net, cache=False)
        with model.edit(self.ids) as edited:
            model.transformer.h[early_block(net)].output[:] += self.vector
        self.calls: dict[str, Any] = {
            BARE: net,
            COMPILED: torch.compile(net),
            PLAIN: model.compile(),
            EDITED: edited.compile(),
            BACKEND: torch.compile(net, backend=backend, options={"edits": edited}),
        }

    def jobs(self) -> dict[str, Job]:
        """Each contender, by name."""
        made: dict[str, Job] = {name: self._job(name) for name in self.calls}
        return {BARE: made.pop(BARE), HOOKS: self.hooks, **made}

    def _job(self, name: str) -> Job:
        call, is_edited = self.calls[name], name in (EDITED, BACKEND)

        def job() -> list[Tensor]:
            logits = call(self.ids).logits
            return [logits] if is_edited else []

        return job

    def hooks(self) -> list[Tensor]:
        """A hook that adds the vector."""
        with hooks.outputs({self.part: lambda hidden: hidden + self.vector}):
            return [self.net(self.ids).logits]


def _run(bench: Bench) -> Iterator[Table]:
    for name in ["toy"] if bench.options.quick else ["toy", "gpt2"]:
        title = "2 layers of width 64" if name == "toy" else "GPT-2 small"
        rows = bench.compare("edited", _cases(name))
        yield paired_table(f"A compiled edited model, {title}", [(row.name, row.times) for row in rows], COMPILED, NOTE)


def _cases(name: str) -> Iterator[Case]:
    close = frozenset((EDITED, BACKEND))
    yield Case(
        "batch 2 × 16 tokens",
        Steered(name).jobs(),
        close=close,
        reference=COMPILED,
        unchecked=frozenset((PLAIN,)),
        rounds=9,
    )


WORKLOAD = Workload(
    "edited", "a compiled edited model against the compiled unedited one (minutes)", _run, default=False
)
