"""Edges of GPT-2's graph, and their scores by edge attribution patching from values and gradients.

Imported by the nnsight worker, too: torch only. A source writes to the residual stream: the embedding, each head, each
MLP. A target reads from it: each head's query, key and value, each MLP, the logits. An edge leads from a source to each
target that is computed after it; GPT-2 small has 157 sources, 445 targets and 32,491 edges.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Read = tuple[str, Any, str]  # what is kept for what, the module, its port


def reads(model: Any) -> Iterator[Read]:
    """All that is read, in the order in which the model comes by it; of a module or of what a tool has for one."""
    yield "source", model.transformer.drop, "output"
    for block in model.transformer.h:
        yield "stream", block.ln_1, "input"
        yield "use", block.attn.c_attn, "output"
        yield "source", block.attn.c_proj, "input"
        yield "stream", block.ln_2, "input"
        yield "use", block.ln_2, "output"
        yield "source", block.mlp, "output"
    yield "stream", model.transformer.ln_f, "input"
    yield "use", model.transformer.ln_f, "output"


def kept(model: Any, *kinds: str) -> dict[str, list[Any]]:
    """What a tool that has ``module.output`` and ``module.input`` reads in a trace, by kind."""
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for kind, module, port in reads(model):
        if kind in found:
            found[kind].append(getattr(module, port))
    return found


def forward(net: Any) -> Tensor:
    """Which pairs are edges: bool[source, target]."""
    layers, heads = net.config.n_layer, net.config.n_head
    before: list[int] = []
    for layer in range(layers):
        first = 1 + layer * (heads + 1)
        before += [first] * (3 * heads) + [first + heads]
    before.append(1 + layers * (heads + 1))
    return torch.arange(before[-1])[:, None] < torch.tensor(before)


def scores(net: Any, clean: Mapping[str, Any], corrupted: Sequence[Any], gradients: Sequence[Any]) -> Any:
    """(corrupted - clean) of every source times the gradient at every target: f32[source, target], 0 where no edge is.

    For each part of the model one einsum, over what is computed before it.
    clean: sources and streams of the clean run.  corrupted: sources.  gradients: of the clean run's uses.
    """
    change = _written(net, [b - a for a, b in zip(clean["source"], corrupted, strict=True)]).flatten(1)
    heads, before, parts = net.config.n_head, 1, list[Any]()
    for gradient in _read(net, clean["stream"], gradients):
        found = torch.einsum("sn,tn->st", change[:before], gradient.flatten(1))
        parts.append(nn.functional.pad(found, (0, 0, 0, len(change) - before)))
        before += heads if len(found.T) > 1 else 1
    return torch.cat(parts, 1)


def _written(net: Any, changes: Sequence[Any]) -> Any:
    """What each source adds to the residual stream, f32[source, batch, position, width]; a head by its rows of the
    output projection."""
    first, *rest = changes
    parts = [first[None]]
    for block, mixed, mlp in zip(net.transformer.h, rest[::2], rest[1::2], strict=True):
        weight = block.attn.c_proj.weight.unflatten(0, (net.config.n_head, -1))
        parts += [torch.einsum("bphe,hed->hbpd", mixed.unflatten(-1, (net.config.n_head, -1)), weight), mlp[None]]
    return torch.cat(parts)


def _read(net: Any, streams: Sequence[Any], gradients: Sequence[Any]) -> Iterator[Any]:
    """The gradient at each target's own reading of the stream, f32[target, batch, position, width], part by part: a
    layer's heads (query, key and value by their columns of the input projection), its MLP, and at last the logits."""
    for block, i in zip(net.transformer.h, range(0, len(streams) - 1, 2), strict=True):
        weight = block.attn.c_attn.weight.unflatten(-1, (3 * net.config.n_head, -1))
        split = gradients[i].unflatten(-1, (3 * net.config.n_head, -1))
        yield _before(block.ln_1, streams[i], split, weight)
        yield _before(block.ln_2, streams[i + 1], gradients[i + 1])
    yield _before(net.transformer.ln_f, streams[-1], gradients[-1])


def _before(norm: Any, stream: Any, gradient: Any, weight: Any = None) -> Any:
    """The gradients before a layer norm, f32[target, batch, position, width], from those after it.

    weight: f32[width, target, columns], where each target has gradients at columns of its own after a projection.
    The norm's weight and the mean that it subtracts are linear: they are taken in the projection, of fewer numbers.
    """
    centred = stream - stream.mean(-1, keepdim=True)
    rate = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()
    unit = centred * rate
    if weight is None:
        inner = gradient * norm.weight
        inner = ((inner - inner.mean(-1, keepdim=True)) * rate)[None]
    else:
        scaled = weight * norm.weight[:, None, None]
        inner = torch.einsum("bpte,dte->tbpd", gradient * rate[..., None], scaled - scaled.mean(0))
    along = torch.einsum("tbpd,bpd->tbp", inner, unit) / unit.shape[-1]
    return inner - unit * along[..., None]


def shares(found: Tensor, forward: Tensor) -> list[Tensor]:
    """The scores of the edges alone, f32[edges], divided by the largest: differences are shares of it."""
    wanted = found.detach()[forward]
    return [wanted / wanted.abs().max()]
