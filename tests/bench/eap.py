"""EAP: edge attribution patching, the scores of all edges by three forwards, one backward, an einsum for each part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxsight.auto import Backend
from fxsight.model import Model
from tests.bench import edges, models
from tests.bench.case import CAREFUL, HOOKS, INDUCTOR, TRACE, Bench, Case, Workload
from tests.bench.grid import Task
from tests.bench.report import Table, paired_table
from tests.bench.timing import Job

NOTE = (
    "An edge leads from the embedding, a head or an MLP to the query, key or value of each head, to each MLP and to "
    "the logits, where these are computed later. Three forwards (corrupted; clean, for the metric's unit; clean, with "
    "gradients), one backward, and for each part of the model one einsum over what is computed before it. The "
    "gradients of a layer's queries, keys and values are split into heads by the columns of the input projection, and "
    "taken back through the layer norm, by the same lines for all. Hooks ask `torch.autograd.grad` for what is needed "
    "and no more; careful hooks compute the last logits only. Scores are compared with the hooks' first, in shares of "
    "the largest: nnsight's and fxsight's are bitwise equal; those of careful hooks (a last product of another shape) "
    "and of Inductor (kernels of its own) within 1e-4 of the largest and 1e-4 of their own."
)


class Edges:
    """The scores of all edges, f32[edges], as shares of the largest."""

    def __init__(self, net: Any, task: Task) -> None:
        self.net, self.task, self.model = net, task, Model(net, cache=False)
        self.forward = edges.forward(net)

    def _run(self, ids: Tensor, *kinds: str, **options: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """The metric, and what has been read, by kind."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}

        def keep(kind: str, port: str, _module: nn.Module, args: Any, output: Any) -> None:
            value = args[0] if port == "input" else output
            if kind == "use" and not value.requires_grad:
                value.requires_grad_()
            found[kind].append(value)

        with ExitStack() as stack:
            for kind, module, port in edges.reads(self.net):
                if kind in kinds:
                    handle = module.register_forward_hook(partial(keep, kind, port))
                    stack.callback(handle.remove)
            logits = self.net(ids, **options).logits
        return self.task.metric(logits).mean(), found

    def hooked(self, careful: bool) -> Job:
        """With hooks."""
        options = {"logits_to_keep": 1} if careful else {}

        def job() -> list[Tensor]:
            with torch.no_grad():
                bad, other = self._run(self.task.corrupted, "source", **options)
                good, _ = self._run(self.task.clean, **options)
            loss, clean = self._run(self.task.clean, "source", "stream", "use", **options)
            gradients = torch.autograd.grad((loss - bad) / (good - bad), clean["use"])
            with torch.no_grad():
                found = edges.scores(self.net, clean, other["source"], gradients)
            return edges.shares(found, self.forward)

        return job

    def traced(self, backend: Backend = "eager") -> list[Tensor]:
        """As a researcher writes it."""
        trace = partial(self.model.trace, backend=backend)
        with torch.no_grad():
            with trace(self.task.corrupted):
                other = [value.save() for value in edges.kept(self.model, "source")["source"]]
                bad = self.task.metric(self.model.lm_head.output).mean().save()
            with trace(self.task.clean):
                good = self.task.metric(self.model.lm_head.output).mean().save()
        with trace(self.task.clean):
            clean = edges.kept(self.model, "source", "stream", "use")
            loss = (self.task.metric(self.model.lm_head.output).mean() - bad) / (good - bad)
            gradients = torch.autograd.grad(loss, clean["use"])
            found = edges.scores(self.net, clean, other, gradients).save()
        return edges.shares(found, self.forward)


def run(bench: Bench) -> Iterator[Table]:
    """One row."""
    rows = bench.compare("eap", _cases(bench.options.quick))
    named = "T2's toy transformer" if bench.options.quick else "GPT-2 small"
    title = f"EAP: edge attribution patching, {named}, 8 prompts × 15 tokens"
    yield paired_table(title, [(row.name, row.times) for row in rows], HOOKS, NOTE)


def _cases(quick: bool) -> Iterator[Case]:
    model = "toy" if quick else "gpt2"
    net: Any = models.LANGUAGE[model]()
    task = Edges(net, Task.of(net, quick))
    jobs = {HOOKS: task.hooked(False), CAREFUL: task.hooked(True), TRACE: task.traced}
    jobs[INDUCTOR] = partial(task.traced, "inductor")
    name = f"{int(task.forward.sum()):,} edges"
    yield Case(name, jobs, f"eap {model}", reference=HOOKS, rounds=9, calls=1)


WORKLOAD = Workload("eap", "edge attribution patching: three forwards, one backward", run, default=False)
