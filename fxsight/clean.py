"""Values of a program as they are without what differs from cell to cell: what all cells share of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxsight.program import Program
from fxsight.stride import Stride
from fxsight.tree import LEAF, Tree
from fxsight.verify import verify


def wanted_clean(program: Program, stride: Stride) -> list[fx.Node]:
    """The values of which a cell takes rows that it has not computed itself: those of the run without its edits."""
    found: dict[fx.Node, None] = {}
    for step in stride.late:
        if step.way is None:
            found.update({a: None for a in step.node.all_input_nodes if a in stride.lies and a not in step.reads})
        elif step.way.attends:
            found.update({a: None for a in step.node.args[1:3] if isinstance(a, fx.Node) and a in stride.lies})
    found.update({result: None for result in program.results if result in stride.lies})
    return list(found)


def clean_program(program: Program, stride: Stride, wanted: Iterable[fx.Node]) -> Program:
    """The program of these values in which each edit is left out: the model goes on with what the edit began with.

    Raises: KeyError where that comes later than where it is used.
    """
    lifts = {step.node: step.lifts for step in stride.late}
    wanted = list(wanted)

    def source(node: fx.Node, argument: fx.Node) -> fx.Node:
        lift = lifts.get(node, {}).get(argument)
        return argument if lift is None or lift.clean is None else lift.clean

    needed = set(wanted)
    for node in reversed(program.graph.nodes):
        if node in needed and node.op == "call_function":
            needed |= {source(node, a) for a in node.all_input_nodes}
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        if node in needed and node.op != "output":
            made[node] = graph.node_copy(node, lambda a, node=node: made[source(node, a)])  # type: ignore[misc]
    graph.output(tuple(made[node] for node in wanted))
    structure = Tree("tuple", "", tuple(range(len(wanted))), (LEAF,) * len(wanted))
    return verify(program.with_graph(graph, "clean", outputs=structure, output_leaves=(None,) * len(wanted)))
