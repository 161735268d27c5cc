"""``DropUnused``: what nobody reads is not computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxsight.editor import Editor
from fxsight.effects import is_random, mutated_arguments, storages
from fxsight.node import binding_of
from fxsight.rewrite import Pass


@dataclass(frozen=True)
class DropUnused(Pass):
    """Remove every operation whose value nothing needs; a program that reads layer 2 does not run layer 3.

        relu = aten.relu.default(x)        # f32[8]
        neg = aten.neg.default(x)          # f32[8]
        return (relu,)
    becomes
        relu = aten.relu.default(x)        # f32[8]
        return (relu,)

    Safe: an in-place operator stays while memory that it changes is read later, or belongs to a weight (the running
    statistics of a ``BatchNorm`` in training are part of what a forward does); one that draws random numbers stays
    while a later one is needed, which would draw others without it. Placeholders stay: they are the signature.
    """

    def rewrite(self, editor: Editor) -> None:
        """Walk backwards from what is returned."""
        needed: set[fx.Node] = set(editor.output.all_input_nodes)
        memory = {s for node in needed for s in storages(node)} | _weights(editor)
        draws = False  # whether something later draws random numbers: what draws before it must, too
        for node in reversed(editor.calls()):
            changed = {s for argument in mutated_arguments(node) for s in storages(argument)}
            if node in needed or changed & memory or (draws and is_random(node)):
                draws = draws or is_random(node)
                needed |= {node, *node.all_input_nodes}
                memory |= {s for source in node.all_input_nodes for s in storages(source)}
        for node in reversed(editor.calls()):
            if node not in needed:
                editor.erase(node)


def _weights(editor: Editor) -> set[str]:
    weights = [n for n in editor.graph.nodes if n.op == "placeholder" and binding_of(n).kind == "weight"]
    return {s for node in weights for s in storages(node)}
