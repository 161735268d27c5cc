"""W8: attribution patching, all values that a block adds and their gradients; and one step of training a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxsight.auto import Backend
from fxsight.model import Model
from tests.bench import hooks, models
from tests.bench.case import CAREFUL, HOOKS, INDUCTOR, TRACE, Bench, Case, Workload
from tests.bench.grid import Task
from tests.bench.report import Table, paired_table
from tests.bench.timing import Job

RANK = 4
NOTE = (
    "The model is frozen everywhere. Attribution: two forwards and one backward, (clean - corrupted) × gradient of "
    "the outputs of every attention, MLP and block. Hooks: `retain_grad` and `backward()`; careful hooks: "
    "`torch.autograd.grad` for what is asked, last logits only. LoRA: on the last MLP, loss at the last position."
)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


class Attribution:
    """All values of a model and what they are worth, f32[prompts, length] each."""

    def __init__(self, net: Any, task: Task) -> None:
        self.net, self.task, self.model = net, task, Model(net, cache=False)

    def _parts(self, model: Any) -> list[Any]:
        blocks = list(model.transformer.h)[: self.task.layers]
        return [part for block in blocks for part in (block.attn, block.mlp, block)]

    def _values(self, ids: Tensor, into: list[Tensor], **options: Any) -> Any:
        def keep(output: Any) -> None:
            value = _first(output)
            if torch.is_grad_enabled() and not value.requires_grad:
                value.requires_grad_()
            into.append(value)

        with hooks.outputs(dict.fromkeys(self._parts(self.net), keep)):
            return self.net(ids, **options).logits

    def hooked(self, careful: bool) -> Job:
        """With hooks."""
        options = {"logits_to_keep": 1} if careful else {}

        def job() -> list[Tensor]:
            clean: list[Tensor] = []
            values: list[Tensor] = []
            with torch.no_grad():
                self._values(self.task.clean, clean, **options)
            loss: Any = self.task.metric(self._values(self.task.corrupted, values, **options)).sum()
            if careful:
                found: Any = torch.autograd.grad(loss, values)
            else:
                for value in values:
                    value.retain_grad()
                loss.backward()
                found = [value.grad for value in values]
            with torch.no_grad():
                return [((a - b) * g).sum(-1) for a, b, g in zip(clean, values, found, strict=True)]

        return job

    def traced(self, backend: Backend = "eager") -> list[Tensor]:
        """As a researcher writes it."""
        parts = self._parts(self.model)
        with torch.no_grad(), self.model.trace(self.task.clean, backend=backend):
            clean = [_first(part.output).save() for part in parts]
        with self.model.trace(self.task.corrupted, backend=backend):
            values = [_first(part.output) for part in parts]
            self.task.metric(self.model.lm_head.output).sum().backward()
            pairs = zip(clean, values, strict=True)
            return [((a - b) * b.grad).sum(-1).save() for a, b in pairs]


class Lora:
    """A low-rank addition to the last MLP; a step returns the loss and its gradients."""

    def __init__(self, net: Any, task: Task) -> None:
        self.net, self.ids, self.model = net, task.clean, Model(net, cache=False)
        width = net.config.n_embd
        random = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(width, RANK, generator=random))
        self.up = nn.Parameter(torch.randn(RANK, width, generator=random) / width)
        self.target = torch.full((len(self.ids),), 11)

    def _loss(self, logits: Any) -> Any:
        return nn.functional.cross_entropy(logits[:, -1], self.target)

    def _taken(self, loss: Tensor) -> list[Tensor]:
        found = [loss.detach(), *(p.grad for p in (self.down, self.up) if p.grad is not None)]
        self.down.grad = self.up.grad = None
        return found

    def hooked(self, careful: bool) -> Job:
        """With a hook."""

        def add(_module: nn.Module, args: Any, output: Any) -> Any:
            return output + args[0] @ self.down @ self.up

        def job() -> list[Tensor]:
            handle = self.net.transformer.h[-1].mlp.register_forward_hook(add)
            loss = self._loss(self.net(self.ids, **({"logits_to_keep": 1} if careful else {})).logits)
            handle.remove()
            loss.backward()
            return self._taken(loss)

        return job

    def traced(self, backend: Backend = "eager") -> list[Tensor]:
        """As a researcher writes it."""
        mlp = self.model.transformer.h[-1].mlp
        with self.model.trace(self.ids, backend=backend):
            mlp.output = mlp.output + mlp.input @ self.down @ self.up
            loss = self._loss(self.model.lm_head.output)
            loss.backward()
            loss.save()
        return self._taken(loss)


def run(bench: Bench) -> Iterator[Table]:
    """Two rows."""
    rows = bench.compare("w8", _cases(bench.options.quick))
    title = "W8: attribution patching, and a LoRA step, GPT-2 small, 8 prompts × 15 tokens"
    yield paired_table(title, [(row.name, row.times) for row in rows], HOOKS, NOTE)


def _cases(quick: bool) -> Iterator[Case]:
    model = "toy" if quick else "gpt2"
    net: Any = models.LANGUAGE[model]()
    task = Task.of(net, quick)
    kinds: list[tuple[str, Any]] = [("attribution", Attribution(net, task)), ("LoRA step", Lora(net, task))]
    for name, kind in kinds:
        jobs = {HOOKS: kind.hooked(False), CAREFUL: kind.hooked(True), TRACE: kind.traced}
        jobs[INDUCTOR] = partial(kind.traced, "inductor")
        remote = f"w8 {model} attribution" if name == "attribution" else ""
        yield Case(name, jobs, remote, reference=HOOKS, rounds=9, calls=1)


WORKLOAD = Workload("w8", "attribution patching and a LoRA step: two forwards and one backward", run, default=False)
