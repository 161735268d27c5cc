"""Attribution: which inner values a number depends on, from values and their gradients.

    from fxsight.attribution import attribution_patching
    scores = attribution_patching(model, clean, corrupted, metric, [f"transformer.h.{i}.mlp" for i in range(12)])
    scores.at(place="transformer.h.3.mlp").values        # f32[batch, length]

Places are addresses, of outputs unless they say ``:input``. A metric is a function that is called in a trace and
returns one number, as a value. Inputs are what ``model.trace`` takes: one argument, or a dict of keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxsight.address import Address
from fxsight.errors import InputError
from fxsight.grid import Grid
from fxsight.tree import LEAF

Metric = Callable[[Any], Any]


def attribution_patching(model: Any, clean: Any, corrupted: Any, metric: Metric, places: Iterable[str]) -> Grid:
    """About how much the metric of the corrupted run would change if one place had its clean value: two forwards, one
    backward. (Nanda 2023, "Attribution patching".)

    Returns: f32[place, *shape of a value without its last dimension], (clean - corrupted) times the gradient of the
    corrupted run, added up over the last dimension.

    Raises: InputError where the places have values of several shapes.
    """
    labels = tuple(places)
    with torch.no_grad(), _trace(model, clean) as tracer:
        wanted = [_read(tracer, place).save() for place in labels]
    with torch.enable_grad(), _trace(model, corrupted) as tracer:
        values = [_read(tracer, place) for place in labels]
        gradients = torch.autograd.grad(metric(model), values, materialize_grads=True)
        scores = [((a - b) * g).sum(-1).save() for a, b, g in zip(wanted, values, gradients, strict=True)]
    return _grid({"place": labels}, [s.detach() for s in scores])


def integrated_gradients(
    model: Any, given: Any, metric: Metric, place: str, *, baseline: Tensor | None = None, steps: int = 32
) -> Tensor:
    """How much each number of one inner value adds to the metric, on the way from a baseline to the value.
    (Sundararajan, Taly, Yan 2017, "Axiomatic attribution for deep networks".)

    baseline: of the value's shape, or one that is broadcast to it; None for zeros.  steps: gradients on the way, taken
    in the middle of equal parts.
    Returns: of the value's shape; it adds up to metric(value) - metric(baseline), the better the more steps.

    Raises: InputError for fewer steps than one.
    """
    if steps < 1:
        raise InputError(f"steps={steps}: integrated gradients take at least one")
    with torch.no_grad(), _trace(model, given) as tracer:
        value = _read(tracer, place).save()
    start = torch.zeros_like(value) if baseline is None else baseline.expand_as(value).to(value.dtype)
    total = torch.zeros_like(value)
    for step in range(steps):
        point = start + (value - start) * ((step + 0.5) / steps)
        with torch.enable_grad(), _trace(model, given) as tracer:
            here = point.clone()
            _write(tracer, place, here)
            found: Any = torch.autograd.grad(metric(model), _read(tracer, place))[0]
            found.save()
        total += found.detach()
    attributed: Tensor = (value - start) * total / steps
    return attributed


def edge_attribution(
    model: Any, clean: Any, corrupted: Any, metric: Metric, sources: Iterable[str], targets: Iterable[str]
) -> Grid:
    """About how much the metric of the clean run would change if what flows from a source to a target were corrupted:
    for all edges two forwards, one backward and one product. (Syed, Rager, Conmy 2023, "Attribution patching
    outperforms automated circuit discovery".)

    sources: what is added to the residual stream.  targets: what reads it, mostly inputs: ``"h.3.ln_1:input"``.
    Returns: f32[source, target]; an edge that leads backwards is not done and NaN.

    Raises: InputError where the values have several shapes.
    """
    axes = {"source": tuple(sources), "target": tuple(targets)}
    with torch.no_grad(), _trace(model, corrupted) as tracer:
        other = [_read(tracer, place).save() for place in axes["source"]]
    with torch.enable_grad(), _trace(model, clean) as tracer:
        values = [_read(tracer, place) for place in axes["source"]]
        uses = [_own(tracer, place) for place in axes["target"]]
        gradients: Any = torch.autograd.grad(metric(model), uses, materialize_grads=True)
        changes = [(b - a).save() for a, b in zip(values, other, strict=True)]
        kept = [g.save() for g in gradients]
        since = {place: _since(tracer, place) for places in axes.values() for place in places}
    change, gradient = _stack([c.detach() for c in changes]), _stack([g.detach() for g in kept])
    scores = torch.einsum("s...d,t...d->st...", change, gradient).flatten(2).sum(2)
    done = torch.tensor([[since[s] <= since[t] for t in axes["target"]] for s in axes["source"]])
    return Grid(axes, LEAF, [scores.masked_fill(~done, float("nan"))], done, "exact")


def direct_logit_attribution(
    model: Any,
    given: Any,
    places: Iterable[str],
    *,
    norm: str,
    unembed: str,
    token: Tensor,
    other: Tensor | None = None,
) -> Grid:
    """How much each place adds to the logit of a token, or to the difference of two, by the last norm and the
    unembedding alone. (Elhage et al. 2021, "A mathematical framework for transformer circuits".)

    norm: the last norm, a ``LayerNorm`` or one without mean (RMS); its scale is that of the run.  unembed: a linear
    layer.  token, other: i64[batch], one for each prompt; ``other`` is taken away.
    Returns: f32[place, batch, length]. What all writers of the residual stream add up to is the logit, without biases.

    Raises: InputError where the places have values of several shapes.
    """
    labels, module = tuple(places), model._module
    weight = module.get_submodule(unembed).weight.detach()
    direction = weight[token] - (0 if other is None else weight[other])
    with torch.no_grad(), _trace(model, given) as tracer:
        values = [_read(tracer, place).save() for place in labels]
        stream = _read(tracer, f"{norm}:input").save()
    scale = _scaled(module.get_submodule(norm), stream)
    scores = [(scale(value) * direction[:, None]).sum(-1) for value in values]
    return _grid({"place": labels}, scores)


def _scaled(norm: nn.Module, stream: Tensor) -> Callable[[Tensor], Tensor]:
    """The norm as a linear function, with the scale that it has for one stream."""
    centred = isinstance(norm, nn.LayerNorm)
    eps: Any = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
    weight: Any = norm.weight

    def centre(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if centred else x

    rate = (centre(stream).pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return lambda x: centre(x) * rate * (1.0 if weight is None else weight.detach())


# -- places ----------------------------------------------------------------------------------------------------------


def _trace(model: Any, given: Any) -> Any:
    return model.trace(**given) if isinstance(given, Mapping) else model.trace(given)


def _split(place: str) -> tuple[Address, str]:
    address = Address.parse(place)
    return address.place, address.port or "output"


def _read(tracer: Any, place: str) -> Any:
    """The tensor of a place; the first of several."""
    address, port = _split(place)
    value = getattr(tracer.at(address), port)
    return value[0] if isinstance(value, (tuple, list)) else value


def _write(tracer: Any, place: str, new: Any) -> None:
    address, port = _split(place)
    found: Any = getattr(tracer.at(address), port)
    if isinstance(found, (tuple, list)):
        found[0] = new  # type: ignore[index]
    else:
        setattr(tracer.at(address), port, new)


def _own(tracer: Any, place: str) -> Any:
    """The tensor of a place as one of its own: its gradient is that of its uses there."""
    value = _read(tracer, place).clone()
    _write(tracer, place, value)
    return value


def _since(tracer: Any, place: str) -> float:
    address, port = _split(place)
    found = tracer.find(address.at("output" if port == "output" else "inputs"))[1]
    return float(next(x.since for x in found if x is not None))


# -- results ---------------------------------------------------------------------------------------------------------


def _grid(axes: Mapping[str, tuple[Any, ...]], values: Sequence[Tensor]) -> Grid:
    done = torch.ones([len(labels) for labels in axes.values()], dtype=torch.bool)
    return Grid(axes, LEAF, [_stack(values)], done, "exact")


def _stack(values: Sequence[Tensor]) -> Tensor:
    shapes = dict.fromkeys(tuple(value.shape) for value in values)
    if len(shapes) > 1:
        raise InputError(f"the places have values of several shapes: {', '.join(str(list(s)) for s in shapes)}")
    return torch.stack(list(values))
