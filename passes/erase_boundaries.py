"""``EraseBoundaries``: module borders leave no trace in what runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxsight.editor import Editor
from fxsight.rewrite import Pass

_BORDER = torch.ops.aten.alias.default


@dataclass(frozen=True)
class EraseBoundaries(Pass):
    """Remove the ``alias`` nodes that mark where values enter and leave modules.

        alias = aten.alias.default(x)        # f32[8]  mlp
        relu = aten.relu.default(alias)      # f32[8]  mlp/relu_0
    becomes
        relu = aten.relu.default(x)          # f32[8]  mlp/relu_0

    Safe: an alias has the same numbers in the same memory. Runs after everything that asks for addresses.
    """

    def rewrite(self, editor: Editor) -> None:
        """Let every user of an alias use what it is an alias of."""
        for node in editor.calls():
            if node.target is _BORDER:
                editor.replace(node, node.all_input_nodes[0])
                editor.erase(node)
