"""``SkipOverwritten``: what is overwritten whole is not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxsight.editor import Editor
from fxsight.effects import mutated_storages
from fxsight.mutate import SELF, mutate
from fxsight.node import origin_of
from fxsight.rewrite import Pass
from fxsight.spec import TensorSpec

# Functions that look at the shape, dtype and device of an argument alone, and the number of that argument.
_SHAPE_ONLY: dict[Any, int] = {
    torch.full_like: 0,
    torch.zeros_like: 0,
    torch.ones_like: 0,
    torch.empty_like: 0,
    torch.Tensor.expand_as: 1,
    torch.Tensor.view_as: 1,
    torch.Tensor.reshape_as: 1,
}
_FILLS = frozenset(["torch.Tensor.fill_", "torch.Tensor.zero_", "torch.Tensor.copy_"])


@dataclass(frozen=True)
class SkipOverwritten(Pass):
    """Where only the shape of a value is used, use an earlier value of the same shape.

        mul = aten.mul.Tensor(x, 2)                        # f32[batch, 8]
        zeros = torch.zeros_like(mul)                      # f32[batch, 8]
    becomes
        mul = aten.mul.Tensor(x, 2)                        # f32[batch, 8]
        zeros = torch.zeros_like(x)                        # f32[batch, 8]
    and ``DropUnused`` removes ``mul``. So ``h.mlp.output = 0`` and ``h.mlp.output[:] = 0`` do not run the MLP.

    Safe: the stand-in has the same dtype, device, symbolic shape and strides; it comes earlier in the program, so it
    does not depend on what it stands in for; its memory is never changed in place. Not one number of either is used.
    Functions that draw random numbers keep their argument: with an earlier one they would draw earlier.
    """

    def rewrite(self, editor: Editor) -> None:
        """One walk in the order of the program."""
        changed = mutated_storages(editor.calls())
        seen: dict[Any, fx.Node] = {}
        order: dict[fx.Node, int] = {}
        for number, node in enumerate(editor.graph.nodes):
            order[node] = number
            place = _shape_only(node)
            source = None if place is None else node.args[place]
            if place is not None and isinstance(source, fx.Node):
                kind = _kind(source)
                stand_in = None if kind is None else seen.get(kind)
                if stand_in is not None and order[stand_in] < order[source]:
                    editor.replace_argument(node, place, stand_in)
            kind = _kind(node)
            if kind is not None and node.meta["spec"].storage not in changed:
                seen.setdefault(kind, node)


def _kind(node: fx.Node) -> Any:
    """What a stand-in must have in common; None for what is no tensor, and for what a body has made: its shapes are
    the numbers it was recorded at, and say nothing of other sizes."""
    spec = node.meta.get("spec")
    if not isinstance(spec, TensorSpec) or (node.op == "call_function" and origin_of(node).user):
        return None
    return (spec.dtype, spec.shape, spec.stride, spec.device)


def _shape_only(node: fx.Node) -> int | None:
    """The number of the argument of which the node uses nothing but the shape."""
    if node.op != "call_function":
        return None
    if node.target is not mutate:
        return _SHAPE_ONLY.get(node.target)
    _, views, target, args, _ = node.args
    if views or not isinstance(args, (tuple, list)) or not args or args[0] != SELF or SELF in map(str, args[1:]):
        return None
    if target in _FILLS:
        return 0
    return 0 if target == "torch.Tensor.__setitem__" and _is_whole(args[1]) else None


def _is_whole(index: Any) -> bool:
    """Whether an index means the whole tensor: ``[:]``, ``[...]``, ``[:, :]``."""
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return all(part is Ellipsis or part == slice(None) for part in parts)
