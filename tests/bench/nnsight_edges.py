"""EAP in nnsight 0.8, as its documentation writes it.

Run in nnsight's environment only.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tests.bench import edges, grid, models
from tests.bench.timing import Job

nnsight: Any = importlib.import_module("nnsight") if find_spec("nnsight") else None


def scores(name: str, quick: bool) -> Job:
    """Gradients are asked for in the order in which they come; what is not needed of a run is not saved."""
    net: Any = models.LANGUAGE[name]()
    model, task, forward = nnsight.NNsight(net), grid.Task.of(net, quick), edges.forward(net)

    def job() -> list[Tensor]:
        with torch.no_grad():
            with model.trace(task.corrupted):
                other = nnsight.save(edges.kept(model, "source"))
                bad = task.metric(model.lm_head.output).mean().save()
            with model.trace(task.clean):
                good = task.metric(model.lm_head.output).mean().save()
        with model.trace(task.clean):
            clean = nnsight.save({"source": [], "stream": [], "use": []})
            for kind, module, port in edges.reads(model):
                value = getattr(module, port)
                if kind == "use" and not value.requires_grad:
                    value.requires_grad_()
                clean[kind].append(value)
            loss = (task.metric(model.lm_head.output).mean() - bad) / (good - bad)
            with loss.backward():
                found = nnsight.save([value.grad for value in reversed(clean["use"])])
        with torch.no_grad():
            return edges.shares(edges.scores(net, clean, other["source"], found[::-1]), forward)

    return job


JOBS: Mapping[str, Callable[[bool], Job]] = {f"eap {name}": partial(scores, name) for name in models.LANGUAGE}
