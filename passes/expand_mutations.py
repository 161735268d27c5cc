"""``ExpandMutations``: in-place calls of a body as plain in-place nodes, without copies nobody needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxsight.editor import Editor
from fxsight.mutate import SELF, mutate
from fxsight.node import origin_of
from fxsight.rewrite import Pass
from fxsight.targets import find_target
from fxsight.tree import map_leaves

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandMutations(Pass):
    """Write ``mutate`` out as a copy, its views, and the in-place call.

        user_mutate = mutate(h, (), 'torch.Tensor.mul_', ('%self', 2), {})    # f32[8]
        neg = aten.neg.default(user_mutate)                                   # f32[8]
    becomes
        user_mutate = aten.clone.default(h)              # f32[8]
        user_mul_ = torch.Tensor.mul_(user_mutate, 2)    # f32[8]
        neg = aten.neg.default(user_mutate)              # f32[8]

    Last of the pipeline: from here on the order of the nodes matters beyond data.
    """

    def rewrite(self, editor: Editor) -> None:
        """One by one, in order; each stays where it is."""
        editor.keeps_order = True
        for node in editor.calls():
            if node.target is mutate:
                _expand(editor, node)


def _expand(editor: Editor, node: fx.Node) -> None:
    base, views, target, args, kwargs = cast(tuple[Any, ...], node.args)
    node.target, node.args = aten.clone.default, (base,)
    last, changed = node, node
    for name, view_args, view_kwargs, path in views:
        changed = last = _call(editor, last, name, _fill(view_args, changed), _fill(view_kwargs, changed))
        for key in path:
            changed = last = _call(editor, last, "operator.getitem", (changed, key), {})
    _call(editor, last, str(target), _fill(args, changed), _fill(kwargs, changed))


def _call(editor: Editor, after: fx.Node, name: str, args: Any, kwargs: Any) -> fx.Node:
    label = "user_" + name.rpartition(".")[2].strip("_")
    return editor.call(
        find_target(name), tuple(args), kwargs, spec=None, name=label, after=after, origin=origin_of(after)
    )


def _fill(arguments: Any, value: fx.Node) -> Any:
    return map_leaves(lambda leaf: value if isinstance(leaf, str) and leaf == SELF else leaf, arguments)
