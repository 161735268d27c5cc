"""``UseKnown``: what has been computed already is not computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from fxsight.editor import Editor
from fxsight.effects import is_random, mutated_arguments, mutated_storages, storages
from fxsight.node import Binding, binding_of, is_tensor, origin_of
from fxsight.rewrite import Pass
from fxsight.targets import argument_text, target_name


@dataclass(frozen=True)
class UseKnown(Pass):
    """Replace operations whose values are at hand by constants.

        layer_norm = aten.layer_norm.default(x, [64])     # f32[batch, length, 64]
        user_sum = torch.Tensor.sum(layer_norm)           # f32[]
    with ``user_sum`` and ``layer_norm`` known becomes
        known_0: 'constant 0'                             # f32[batch, length, 64]
        known_1: 'constant 1'                             # f32[]

    known: fingerprints (``fingerprints``) of known values, in the order of their constants, the first of which has
    the number ``first``.  Safe: equal fingerprints mean the same functions of the same inputs; memory that anything
    changes in place is left alone; random operators count by their place, so each draws once.
    """

    known: tuple[str, ...] = field(repr=False)
    first: int

    def rewrite(self, editor: Editor) -> None:
        """One constant for each known value that is still used."""
        numbers = {mark: self.first + i for i, mark in enumerate(self.known)}
        made: dict[str, fx.Node] = {}
        for name, mark in fingerprints(editor.graph).items():
            node = editor.nodes[name]
            if mark in numbers and is_tensor(node):
                if mark not in made:
                    binding = Binding("constant", numbers[mark])
                    made[mark] = editor.placeholder(f"known_{numbers[mark]}", binding, node.meta["spec"])
                editor.replace(node, made[mark])
                if is_random(node):  # it has drawn
                    editor.erase(node)


def fingerprints(graph: fx.Graph, known: UseKnown | None = None) -> Mapping[str, str]:
    """A name for what each operation computes: its function of its inputs; none where memory is changed in place.

    known: the pass that has put constants for known values into this graph; they keep their fingerprints.
    """
    nodes = list(graph.nodes)
    changed = mutated_storages(nodes)
    marks: dict[str, str] = {}
    found: dict[str, str] = {}
    for node in nodes:
        if node.op == "placeholder":
            marks[node.name] = _given(binding_of(node), known)
        elif _is_pure(node, changed) and all(a.name in marks for a in node.all_input_nodes):
            marks[node.name] = found[node.name] = _mark(node, marks)
    return found


def _is_pure(node: fx.Node, changed: frozenset[str]) -> bool:
    """Whether the node is an operation on memory that nothing changes in place."""
    return node.op == "call_function" and not (storages(node) & changed or mutated_arguments(node))


def _given(binding: Binding, known: UseKnown | None) -> str:
    if known is not None and binding.kind == "constant" and int(binding.key) >= known.first:
        return known.known[int(binding.key) - known.first]
    return str(binding)


def _mark(node: fx.Node, marks: Mapping[str, str]) -> str:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: marks[n.name])
    place = str(origin_of(node).time) if is_random(node) else ""
    text = f"{target_name(node.target)}{argument_text(args)}{argument_text(kwargs)}{place}"
    return hashlib.sha1(text.encode()).hexdigest()
