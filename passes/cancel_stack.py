"""``CancelStack``: ``unbind(stack(xs))[i]`` is ``xs[i]``."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxsight.editor import Editor
from fxsight.effects import mutated_storages, storages
from fxsight.rewrite import Pass
from fxsight.spec import TensorSpec

aten = torch.ops.aten
_STACK: tuple[Any, ...] = (torch.stack, aten.stack.default)
_UNBIND: tuple[Any, ...] = (torch.unbind, torch.Tensor.unbind, aten.unbind.int)
_SELECT: tuple[Any, ...] = (torch.select, torch.Tensor.select, aten.select.int)


@dataclass(frozen=True)
class CancelStack(Pass):
    """Take what was stacked instead of unstacking it.

        stack = torch.stack([a, b])                 # f32[2, 8]
        unbind = torch.unbind(stack, 0)             # (f32[8], f32[8])
        getitem = operator.getitem(unbind, 1)       # f32[8]
        neg = aten.neg.default(getitem)             # f32[8]
    becomes
        neg = aten.neg.default(b)                   # f32[8]

    Also for ``stack[i]`` and ``stack.select(0, i)``. Safe: stacking copies, so the member has the numbers of the
    original; where the memory of either is changed in place, and where stacking would promote the dtype, it is left
    alone. It is what makes a program that stacks all layers, and then patches each with its own member, causal.
    """

    def rewrite(self, editor: Editor) -> None:
        """Redirect the members; the stack goes when nothing else uses it."""
        cancel_stacks(editor)


def cancel_stacks(editor: Editor) -> None:
    """``CancelStack`` on a graph that is being edited."""
    changed = mutated_storages(editor.calls())
    for node in editor.calls():
        original = _original(node)
        if original is not None and not (storages(node) | storages(original)) & changed:
            editor.replace(node, original)
            _erase_unused(editor, node)


def _original(node: fx.Node) -> fx.Node | None:
    """The stacked value this node takes out again."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem and source.target in _UNBIND:
        return _member(source.args[0], _dim(source, 1), node.args[1], node)
    if node.target in _SELECT:
        return _member(source, _dim(node, 1), node.args[2] if len(node.args) > 2 else None, node)
    if node.target is torch.Tensor.__getitem__:
        return _member(source, 0, node.args[1], node)
    return None


def _member(stack: Any, dim: int, index: Any, node: fx.Node) -> fx.Node | None:
    if not isinstance(stack, fx.Node) or stack.target not in _STACK or type(index) is not int:
        return None
    members, spec = stack.args[0], stack.meta["spec"]
    if (
        not isinstance(members, (list, tuple))
        or not isinstance(spec, TensorSpec)
        or (dim - _dim(stack, 1)) % len(spec.shape)
    ):
        return None
    original = members[index] if -len(members) <= index < len(members) else None
    same = isinstance(original, fx.Node) and getattr(original.meta["spec"], "dtype", None) == node.meta["spec"].dtype
    return original if same else None  # type: ignore[return-value]


def _dim(node: fx.Node, position: int) -> int:
    kwargs: Mapping[str, Any] = node.kwargs
    return int(node.args[position]) if len(node.args) > position else int(kwargs.get("dim", 0))  # type: ignore[arg-type]


def _erase_unused(editor: Editor, node: fx.Node) -> None:
    """Drop the node and what only it needed, up to the stack."""
    sources = node.all_input_nodes if node.target not in _STACK else []
    if not node.users and node.op == "call_function":
        editor.erase(node)
        for source in sources:
            if source.target in (*_STACK, *_UNBIND):
                _erase_unused(editor, source)
