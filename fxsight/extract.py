"""A part of a program as a program of its own: from given values to wanted ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from fxsight.node import Binding, Origin, spec_of_node
from fxsight.program import Program
from fxsight.tree import LEAF, Tree
from fxsight.verify import verify

_LABEL = "extract"


def extract(
    program: Program, inside: Iterable[fx.Node], given: Sequence[fx.Node], wanted: Sequence[fx.Node], first: int
) -> Program:
    """Some nodes of a program, in its order; the placeholders they need come along.

        x: 'input 0'                           # f32[batch, 8]
        relu = aten.relu.default(x)            # f32[batch, 8]
        neg = aten.neg.default(relu)           # f32[batch, 8]
        exp = aten.exp.default(neg)            # f32[batch, 8]
        return (exp,)
    with ``neg`` inside, ``relu`` given and ``neg`` wanted is
        relu: 'constant 0'                     # f32[batch, 8]
        neg = aten.neg.default(relu)           # f32[batch, 8]
        return (neg,)

    given: become the constants from number ``first`` on, under their names.

    Raises: ProgramError when a node inside needs one that is neither inside nor given.
    """
    chosen, graph, made = set(inside), fx.Graph(), dict[fx.Node, fx.Node]()
    needed = {a for node in chosen for a in node.all_input_nodes} | set(wanted)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node in needed:
            made[node] = graph.node_copy(node, made.__getitem__)
    for number, node in enumerate(given, first):
        made[node] = _constant(graph, node, number)
    for node in program.graph.nodes:
        if node in chosen and node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in wanted))
    structure = Tree("tuple", "", tuple(range(len(wanted))), (LEAF,) * len(wanted))
    taken = program.with_graph(graph, _LABEL, outputs=structure, output_leaves=(None,) * len(wanted))
    return verify(taken)


def _constant(graph: fx.Graph, node: fx.Node, number: int) -> fx.Node:
    place = graph.create_node("placeholder", node.name, (), {}, node.name)
    origin = replace(node.meta.get("origin", Origin()), made_by=_LABEL)
    place.meta.update(spec=spec_of_node(node), origin=origin, binding=Binding("constant", number))
    return place
