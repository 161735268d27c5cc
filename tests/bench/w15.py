"""W15: a generation of greedy tokens with a vector added to every block's output at every step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxsight.auto import Backend
from fxsight.language import LanguageModel
from tests.bench import models
from tests.bench.case import BARE, HOOKS, INDUCTOR, TRACE, Bench, Case, Workload, say
from tests.bench.report import Table, paired_table
from tests.bench.timing import Job

LENGTH = 16
NOTE = "One prompt of 16 tokens. Bare is the `generate` of transformers without any edit, hooks the same with them."


class Setting:
    """A model that generates: ``net`` bare, ``model`` in fxsight."""

    def __init__(self, name: str, tokens: int) -> None:
        net: Any = models.SPEAKING[name]()
        self.net, self.model = net, LanguageModel(net, cache=False)
        self.ids, self.vector = models.tokens(net, 1, LENGTH), models.direction(net)
        self.options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def bare(self) -> list[Tensor]:
        """Without an edit."""
        return [self.net.generate(self.ids, **self.options)]

    def hooks(self) -> list[Tensor]:
        """With hooks."""
        handles = [block.register_forward_hook(lambda m, a, out: out + self.vector) for block in self.net.transformer.h]
        try:
            return self.bare()
        finally:
            for handle in handles:
                handle.remove()

    def ours(self, tier: Backend) -> Job:
        """As a researcher writes it."""

        def job() -> list[Tensor]:
            with self.model.generate(self.ids, backend=tier, **self.options) as tracer:
                for _ in tracer.all():
                    for block in self.model.transformer.h:
                        block.output += self.vector
                ids = tracer.result.save()
            return [ids]

        return job


def _cases(bench: Bench, name: str, tokens: int) -> Iterator[Case]:
    setting = Setting(name, tokens)
    jobs: dict[str, Job] = {BARE: setting.bare, HOOKS: setting.hooks}
    for tier, label in (("eager", TRACE), ("inductor", INDUCTOR)):
        jobs[label] = setting.ours(tier)  # type: ignore[arg-type]
        start = time.perf_counter()
        jobs[label]()
        say(f"{name}, {tier}: the first generation, capture included, takes {time.perf_counter() - start:.1f} s")
    yield Case(f"{tokens} tokens", jobs, f"w15 {name}", rounds=9, calls=1)


def _run(bench: Bench) -> Iterator[Table]:
    torch.manual_seed(0)
    sizes = [("toy", 16)] if bench.options.quick else [("toy", 128), ("gpt2", 32)]
    for name, tokens in sizes:
        rows = bench.compare("w15", _cases(bench, name, tokens))
        title = f"W15: a steered generation, {'2 layers of width 64' if name == 'toy' else 'GPT-2 small'}"
        yield paired_table(title, [(row.name, row.times) for row in rows], BARE, NOTE)


WORKLOAD = Workload("w15", "a generation with a vector added at every block", _run, default=False)
