"""What Dynamo says of the frame that a graph is of: whose forward it is, which modules and weights are in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxsight import _torch

_SELF = re.compile(r"[LG]\['\w+'\]$")  # a local of the frame, or a global


@dataclass(frozen=True)
class Frame:
    """What Dynamo says of the frame that a graph is of.

    modules: paths of the model's modules that the graph has operators or weights of.  own: the module whose forward
    the frame is, where that is known.  weights: the inputs that are weights of the model, by number.
    is_cut: whether the graph ends in a graph break.
    """

    modules: frozenset[str]
    own: str | None
    weights: Mapping[int, str]
    is_cut: bool
    calls_root: bool

    @property
    def is_last(self) -> bool:
        """Whether the forward of the model ends in this graph."""
        return self.calls_root or (self.own == "" and not self.is_cut)


def frame_of(gm: fx.GraphModule, module: nn.Module) -> Frame:
    """The frame of a graph, with the parts of a model that are in it."""
    names, tensors = paths_of(module), {id(t): n for n, t in tensors_of(module)}
    named, selves, weights = set[str](), set[str | None](), dict[int, str]()
    for node in gm.graph.nodes:
        for key, (place, _) in (node.meta.get("nn_module_stack") or {}).items():
            path = names.get(int(key.partition("@")[0]))
            if path is not None and node.op != "placeholder":
                named.add(path)
                selves.add(_self_path(place, path))
    for number, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        tensor, place = _torch.graph_argument(node)
        name = tensors.get(id(tensor))
        if name is not None and name not in weights.values():
            weights[number] = name
            selves.add(_self_path(place, name))
    calls_root = "" in named
    selves -= {None, *named}
    own = next(iter(selves)) if len(selves) == 1 and not calls_root else None
    return Frame(
        frozenset(named | ({own} if own is not None else set())), own, weights, _torch.ends_in_break(gm), calls_root
    )


def _self_path(place: str, path: str) -> str | None:
    """Of which module the frame's local is, when ``place`` is how Dynamo calls the module or weight at ``path``."""
    left, right = place.split("."), path.split(".") if path else []
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return ".".join(right) if len(left) == 1 and _SELF.match(left[0]) else None


def paths_of(module: nn.Module) -> dict[int, str]:
    """The modules of a model by ``id``."""
    return {id(part): path for path, part in module.named_modules()}


def first_names(module: nn.Module) -> dict[str, str]:
    """Per further name of a parameter or buffer that has several, the first."""
    own = {id(tensor): name for name, tensor in tensors_of(module)}
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: own[id(tensor)] for name, tensor in every if own[id(tensor)] != name}


def tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name; of one that has several names, the first is the last."""
    return list(reversed([*module.named_parameters(), *module.named_buffers()]))
