"""Values of a program as they are without what differs from cell to cell: what all cells share of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from fxsight.numbering import Numbering, formula
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


class Clean:
    """The run in which each edit is left out: the model goes on with what the edit began with."""

    def __init__(self, program: Program, stride: Stride) -> None:
        self.program = program
        self.wanted = wanted_clean(program, stride) if stride.partial else []
        self._lifts = {step.node: step.lifts for step in stride.late}
        needed = set(self.wanted)
        for node in reversed(program.graph.nodes):
            if node in needed and node.op == "call_function":
                needed |= {self.source(node, a) for a in node.all_input_nodes}
        self.needed = needed

    def source(self, node: fx.Node, argument: fx.Node) -> fx.Node:
        """What a node has for an argument in that run."""
        lift = self._lifts.get(node, {}).get(argument)
        return argument if lift is None or lift.clean is None else lift.clean

    def numbers(self, shared: Mapping[fx.Node, int], own: Iterable[fx.Node], numbering: Numbering) -> list[int]:
        """The value numbers of what is wanted.

        shared: those of the program itself.  own: what differs from cell to cell, in order.
        """
        found = dict(shared)
        for node in own:
            if node in self.needed:
                found[node] = numbering.of(formula(node, lambda a, node=node: found[self.source(node, a)]))  # type: ignore[misc]
        return [found[node] for node in self.wanted]

    def made(self) -> Program:
        """The program of what is wanted.

        Raises: KeyError where a value that an edit began with comes later than where it is used.
        """
        graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.program.graph.nodes:
            if node in self.needed and node.op != "output":
                made[node] = graph.node_copy(node, lambda a, node=node: made[self.source(node, a)])  # type: ignore[misc]
        graph.output(tuple(made[node] for node in self.wanted))
        count = len(self.wanted)
        structure = Tree("tuple", "", tuple(range(count)), (LEAF,) * count)
        return verify(self.program.with_graph(graph, "clean", outputs=structure, output_leaves=(None,) * count))
