"""W20: an activation harvest: the output of one block for many prompts, batch by batch, and no logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fxsight.auto import Backend
from tests.bench import hooks, models
from tests.bench.case import BARE, CAREFUL, HOOKS, INDUCTOR, TRACE, Bench, Case, Workload
from tests.bench.language import early_block
from tests.bench.report import Table, paired_table
from tests.bench.timing import Job

NOTE = (
    "Bare is the module without its unembedding, `model.transformer(ids)`, so that the share of the blocks that run "
    "is the ratio to reach. Hooks run the whole module, careful hooks end the forward at the block. Every batch's "
    "activations have been compared with those of hooks first."
)


class Harvest:
    """One model, its batches of prompts, and the block whose output is kept."""

    def __init__(self, name: str, quick: bool) -> None:
        from fxsight.model import Model

        net: Any = models.LANGUAGE[name]()
        self.net, self.model = net, Model(net, cache=False)
        self.batches = models.prompts(net, quick)
        self.block = early_block(net)

    def bare(self) -> list[Tensor]:
        """All blocks, no logits."""
        for ids in self.batches:
            self.net.transformer(ids)
        return []

    def hooks(self) -> list[Tensor]:
        """The whole forward, one hook."""
        kept: list[Tensor] = []
        with hooks.outputs({self.net.transformer.h[self.block]: kept.append}):
            for ids in self.batches:
                self.net(ids)
        return [torch.cat(kept)]

    def careful(self) -> list[Tensor]:
        """Each forward ends at the block."""
        kept: list[Tensor] = []
        with hooks.outputs({self.net.transformer.h[self.block]: hooks.keep_and_stop(kept)}):
            for ids in self.batches:
                with suppress(hooks.Stop):
                    self.net(ids)
        return [torch.cat(kept)]

    def traced(self, tier: Backend) -> Job:
        """As a researcher writes it: a trace a batch."""

        def job() -> list[Tensor]:
            kept: list[Tensor] = []
            for ids in self.batches:
                with self.model.trace(ids, backend=tier):
                    hidden = self.model.transformer.h[self.block].output.save()
                kept.append(hidden)
            return [torch.cat(kept)]

        return job


def _run(bench: Bench) -> Iterator[Table]:
    name = "toy" if bench.options.quick else "gpt2"
    rows = bench.compare("w20", _cases(bench, name))
    title = f"W20: activation harvest, {'2 layers of width 64' if name == 'toy' else 'GPT-2 small'}"
    yield paired_table(title, [(row.name, row.times) for row in rows], BARE, NOTE)


def _cases(bench: Bench, name: str) -> Iterator[Case]:
    task = Harvest(name, bench.options.quick)
    jobs: dict[str, Job] = {BARE: task.bare, HOOKS: task.hooks, CAREFUL: task.careful, TRACE: task.traced("eager")}
    if not bench.options.quick:
        jobs[INDUCTOR] = task.traced("inductor")
    run, layers = task.block + 1, task.net.config.n_layer
    prompts = sum(len(ids) for ids in task.batches)
    yield Case(f"{prompts} prompts, {run} of {layers} blocks ({run / layers:.2f}×)", jobs, f"w20 {name}", rounds=9)


WORKLOAD = Workload("w20", "activation harvest: one block's output for many prompts, no logits", _run)
