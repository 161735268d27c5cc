"""W2, W3 and W21 in nnsight: a trace for each cell.

Run in nnsight's environment only.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.bench import models
from tests.bench.grid import Task
from tests.bench.timing import Job

# Only the worker's environment has it; where doctest imports this file, nothing here is called.
nnsight: Any = importlib.import_module("nnsight") if find_spec("nnsight") else None
SIZES = ("small", "gpt2")


def _made(size: str) -> tuple[Any, Task]:
    net: Any = models.MODELS[size]()
    return nnsight.NNsight(net), Task.of(net, False)


def _clean(model: Any, task: Task, read: Callable[[Any], Any]) -> list[Any]:
    with model.trace(task.clean):
        kept = nnsight.save([read(block) for block in model.transformer.h])
    return list(kept)


def _job(model: Any, task: Task, edit: Callable[..., None], *axes: Any) -> Job:
    def job() -> list[Tensor]:
        cells: list[Tensor] = []
        for labels in product(*axes):
            with model.trace(task.corrupted):
                edit(*labels)
                cells.append(task.metric(model.output.logits).save())
        return [torch.stack(cells)]

    return job


def w2(size: str, quick: bool) -> Job:
    """Residual stream, attention and MLP, layer × position."""
    model, task = _made(size)
    places = {"resid": lambda b: b.input, "attn": lambda b: b.attn.output[0], "mlp": lambda b: b.mlp.output}
    clean = {name: _clean(model, task, read) for name, read in places.items()}

    def edit(kind: str, layer: int, position: int) -> None:
        places[kind](model.transformer.h[layer])[:, position] = clean[kind][layer][:, position]

    return _job(model, task, edit, places, range(task.layers), range(task.length))


def w3(size: str, quick: bool) -> Job:
    """z, q, k and v of each head."""
    model, task = _made(size)
    width, heads = model.config.n_embd, model.config.n_head
    each = width // heads
    mixed = _clean(model, task, lambda block: block.attn.c_attn.output)
    z = _clean(model, task, lambda block: block.attn.c_proj.input)

    def edit(kind: str, layer: int, head: int) -> None:
        attention, first = model.transformer.h[layer].attn, "qkvz".index(kind) % 3 * width + head * each
        own = slice(first, first + each)
        if kind == "z":
            attention.c_proj.input[..., own] = z[layer][..., own]
        else:
            attention.c_attn.output[..., own] = mixed[layer][..., own]

    return _job(model, task, edit, "zqkv", range(task.layers), range(heads))


def w21(size: str, quick: bool) -> Job:
    """Each head zeroed."""
    model, task = _made(size)
    each = model.config.n_embd // model.config.n_head

    def edit(layer: int, head: int) -> None:
        model.transformer.h[layer].attn.c_proj.input[..., head * each : (head + 1) * each] = 0

    return _job(model, task, edit, range(task.layers), range(model.config.n_head))


def w21_invokes(size: str, quick: bool) -> Job:
    """The same as invokes of one trace, which run as one batch."""
    net: Any = models.MODELS[size]()
    model, task = _batching()(net), Task.of(net, False)
    each, cells = net.config.n_embd // net.config.n_head, list(product(range(task.layers), range(net.config.n_head)))

    def job() -> list[Tensor]:
        with model.trace() as tracer:
            found = nnsight.save([])
            for layer, head in cells:
                with tracer.invoke(task.corrupted):
                    model.transformer.h[layer].attn.c_proj.input[..., head * each : (head + 1) * each] = 0
                    found.append(task.metric(model.output.logits))
        return [torch.stack(list(found))]

    return job


def _batching() -> Any:
    """What nnsight asks of a model whose inputs are tensors with rows, to batch invokes."""

    class Batching(nnsight.NNsight):  # type: ignore[misc]
        def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
            return len(inputs[0]) if inputs else 0

        def _batch(self, invokes: list[Any], fn: Any) -> tuple[Any, Any]:
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), {}

    return Batching


JOBS: Mapping[str, Callable[[bool], Job]] = {
    f"{make.__name__} {size}": partial(make, size) for make in (w2, w3, w21) for size in SIZES
}
JOBS = {**JOBS, **{f"w21 {size} invokes": partial(w21_invokes, size) for size in SIZES}}
