"""The same tasks in nnsight 0.8, as its documentation writes them; of equal ways, the fastest measured.

Run in nnsight's environment only.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tests.bench import grid, models, nnsight_edges, nnsight_grids
from tests.bench.timing import Job

# Only the worker's environment has it; where doctest imports this file, nothing here is called.
nnsight: Any = importlib.import_module("nnsight") if find_spec("nnsight") else None
BATCH, LENGTH = 2, 16


def version() -> str:
    return metadata.version("nnsight")


# -- T1 ------------------------------------------------------------------------------------------------------


def empty(model: Any, x: Tensor) -> list[Tensor]:
    with model.trace(x):
        pass
    return []


def one_save(model: Any, x: Tensor) -> list[Tensor]:
    with model.trace(x):
        kept = model.layers[-1].output.save()
    return [kept]


def twelve_saves(model: Any, x: Tensor) -> list[Tensor]:
    with model.trace(x):
        kept = nnsight.save([layer.output for layer in model.layers])
    return list(kept)


def edits(model: Any, x: Tensor) -> list[Tensor]:
    with model.trace(x):
        for layer in model.layers:
            layer.output[:, 0] = 0
        out = model.output.save()
    return [out]


def _layers(body: Callable[[Any, Tensor], list[Tensor]], quick: bool) -> Job:
    model, x = nnsight.NNsight(models.layers()), models.rows()
    return lambda: body(model, x)


# -- language models -----------------------------------------------------------------------------------------


def read(model: Any, ids: Tensor, vector: Tensor) -> list[Tensor]:
    block = model.config.n_layer // 2 - 1
    with model.trace(ids):
        hidden = model.transformer.h[block].output.save()
        last = model.output.logits[:, -1].save()
    return [hidden, last]


def steer(model: Any, ids: Tensor, vector: Tensor) -> list[Tensor]:
    block = model.config.n_layer // 2 - 1
    with model.trace(ids):
        model.transformer.h[block].output += vector
        last = model.output.logits[:, -1].save()
    return [last]


def only(model: Any, ids: Tensor, vector: Tensor) -> list[Tensor]:
    block = min(2, model.config.n_layer // 2 - 1)
    with model.trace(ids) as tracer:
        hidden = model.transformer.h[block].output.save()
        tracer.stop()
    return [hidden]


_models: dict[str, Any] = {}


def _model(name: str) -> Any:
    return _models.get(name) or _models.setdefault(name, nnsight.NNsight(models.MODELS[name]()))


def _language(name: str, body: Callable[[Any, Tensor, Tensor], list[Tensor]], quick: bool) -> Job:
    model = _model(name)
    ids, vector = models.tokens(model, BATCH, LENGTH), models.direction(model)
    return lambda: body(model, ids, vector)


# -- W1 ------------------------------------------------------------------------------------------------------


def residual_grid(name: str, quick: bool) -> Job:
    """A trace for each cell."""
    model = _model(name)
    task = grid.Task.of(model, quick)
    blocks = model.transformer.h

    def job() -> list[Tensor]:
        with model.trace(task.clean):
            kept = nnsight.save([blocks[layer].input for layer in range(task.layers)])
        cells: list[Tensor] = []
        for layer, position in task.cells():
            with model.trace(task.corrupted):
                blocks[layer].input[:, position] = kept[layer][:, position]
                cells.append(task.metric(model.output.logits).save())
        return [torch.stack(cells)]

    return job


# -- W14 -----------------------------------------------------------------------------------------------------

POSITIONS: Mapping[str, slice] = {"every position": slice(None), "last position": slice(-1, None)}


def lens(name: str, where: slice, quick: bool) -> Job:
    """The model's own modules, called in the block."""
    model = _model(name)
    ids = models.tokens(model, BATCH, LENGTH)

    def job() -> list[Tensor]:
        inner = model.transformer
        with model.trace(ids):
            found = nnsight.save([model.lm_head(inner.ln_f(block.output[:, where])) for block in inner.h])
        return list(found)

    return job


# -- W20 -----------------------------------------------------------------------------------------------------


def harvest(name: str, quick: bool) -> Job:
    """A trace a batch, stopped at the block."""
    model = _model(name)
    batches = models.prompts(model, quick)
    number = min(2, model.config.n_layer // 2 - 1)

    def job() -> list[Tensor]:
        kept: list[Tensor] = []
        for ids in batches:
            with model.trace(ids) as tracer:
                hidden = model.transformer.h[number].output.save()
                tracer.stop()
            kept.append(hidden)
        return [torch.cat(kept)]

    return job


# -- W15 -----------------------------------------------------------------------------------------------------


def steered(name: str, tokens: int, quick: bool) -> Job:
    """A vector at every block and step."""
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained("docs/demo/model")
    model = nnsight.LanguageModel(models.SPEAKING[name](), tokenizer=tokenizer)
    ids, vector = models.tokens(model, 1, LENGTH), models.direction(model)

    def job() -> list[Tensor]:
        with model.generate(ids, max_new_tokens=16 if quick else tokens, do_sample=False, pad_token_id=0) as tracer:
            for _ in tracer.iter[: 16 if quick else tokens]:
                for block in model.transformer.h:
                    block.output = block.output + vector
            found = tracer.result.save()
        return [found]

    return job


# -- W8 ------------------------------------------------------------------------------------------------------


def attribution(name: str, quick: bool) -> Job:
    """All values of a model and their gradients, asked for in the order in which they come."""
    model = _model(name)
    task = grid.Task.of(model, quick)
    parts = [part for block in list(model.transformer.h)[: task.layers] for part in (block.attn, block.mlp, block)]

    def first(output: Any) -> Any:
        return output[0] if isinstance(output, tuple) else output

    def job() -> list[Tensor]:
        with torch.no_grad(), model.trace(task.clean):
            clean = nnsight.save([first(part.output) for part in parts])
        with model.trace(task.corrupted):
            values = nnsight.save([])
            for part in parts:
                value = first(part.output)
                values.append(value if value.requires_grad else value.requires_grad_())
            loss = task.metric(model.lm_head.output).sum()
            with loss.backward():
                found = nnsight.save([value.grad for value in reversed(values)])
        with torch.no_grad():
            return [((a - b) * g).sum(-1) for a, b, g in zip(clean, values, reversed(found), strict=True)]

    return job


JOBS: Mapping[str, Callable[[bool], Job]] = {
    "t1 empty trace": partial(_layers, empty),
    "t1 1 save": partial(_layers, one_save),
    "t1 12 saves": partial(_layers, twelve_saves),
    "t1 12 in-place edits": partial(_layers, edits),
    **{
        f"{name} {body.__name__}": partial(_language, name, body)
        for name in models.LANGUAGE
        for body in (read, steer, only)
    },
    **{f"w15 {name}": partial(steered, name, tokens) for name, tokens in (("toy", 128), ("gpt2", 32))},
    **{
        f"w14 {name} {title}": partial(lens, name, where)
        for name in models.LANGUAGE
        for title, where in POSITIONS.items()
    },
    **{f"w8 {name} attribution": partial(attribution, name) for name in models.LANGUAGE},
    **{f"w20 {name}": partial(harvest, name) for name in models.LANGUAGE},
    **{f"w1 {name}": partial(residual_grid, name) for name in ("toy", "small", "gpt2")},
    **nnsight_edges.JOBS,
    **nnsight_grids.JOBS,
}
