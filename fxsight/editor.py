"""The only code that mutates an ``fx.Graph``: a copy of a program's graph, and the verbs passes need.

Every node an editor makes gets a name, a spec and an origin; ``finish`` gives the next program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from fxsight.effects import schedule
from fxsight.node import Binding, Origin, origin_of, output_node
from fxsight.program import Program
from fxsight.spec import Spec


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes under the same names; ``meta`` dicts are copied, their values shared."""
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = new.node_copy(node, made.__getitem__)
    return new


class Editor:
    """A graph being edited on behalf of one pass.

    copies: whether it is a copy of the program's; without, the program is given up for the one that ``finish`` makes.
    """

    def __init__(self, program: Program, made_by: str, copies: bool = True) -> None:
        self.program = program
        self.made_by = made_by
        self.graph = copy_graph(program.graph) if copies else program.graph
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.graph.nodes}
        self.touched = False
        self.keeps_order = False  # set by a pass after which the order of nodes means more than data and effects
        self.changes: dict[str, Any] = {}

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return output_node(self.graph)

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """What the program returns."""
        return tuple(self.output.args[0])  # type: ignore[arg-type]

    def calls(self) -> list[fx.Node]:
        """All operations, in order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    # -- making ------------------------------------------------------------------------------------------------------

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        spec: Spec,
        name: str,
        like: fx.Node | None = None,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        origin: Origin | None = None,
    ) -> fx.Node:
        """A new operation at the end, or next to another node; ``like`` gives its origin."""
        place = self.graph.inserting_before(before or self.output)
        with self.graph.inserting_after(after) if after is not None else place:
            node = self.graph.create_node("call_function", target, args, dict(kwargs or {}), self._free(name))
        given = origin or (origin_of(like) if like is not None else Origin())
        return self._made(node, spec, replace(given, made_by=self.made_by, was=""))

    def adopt(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> fx.Node:
        """A copy of another graph's operation, where the graph inserts now.  value: of the nodes it uses."""
        made = self.graph.node_copy(node, value)
        self.nodes[made.name] = made
        self.touched = True
        return made

    def placeholder(self, name: str, binding: Binding, spec: Spec) -> fx.Node:
        """A new input of the graph, after the others."""
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), self.output)
        with self.graph.inserting_before(first):
            node = self.graph.create_node("placeholder", self._free(name), (), {}, self._free(name))
        node.target = node.name
        node.meta["binding"] = binding
        return self._made(node, spec, Origin(made_by=self.made_by))

    def _free(self, name: str) -> str:
        if name not in self.nodes:
            return name
        return next(f"{name}_{i}" for i in range(1, 10**6) if f"{name}_{i}" not in self.nodes)

    def _made(self, node: fx.Node, spec: Spec, origin: Origin) -> fx.Node:
        node.meta.update(spec=spec, origin=origin)
        self.nodes[node.name] = node
        self.touched = True
        return node

    # -- changing ----------------------------------------------------------------------------------------------------

    def replace(self, old: fx.Node, new: fx.Node, users: Iterable[fx.Node] | None = None) -> None:
        """Let ``users`` (all by default) of ``old`` use ``new`` instead."""
        for user in list(old.users) if users is None else users:
            if user is not new:
                user.replace_input_with(old, new)
                self.touched = True

    def replace_argument(self, node: fx.Node, number: int, new: fx.Node) -> None:
        """Let one positional argument of a node be another node."""
        node.args = (*node.args[:number], new, *node.args[number + 1 :])
        self.touched = True

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nobody uses."""
        self.graph.erase_node(node)
        del self.nodes[node.name]
        self.touched = True

    def restart(self) -> None:
        """Begin anew, with the placeholders alone; all names of operators are free again."""
        old, self.graph = self.graph, fx.Graph()
        for node in old.nodes:
            if node.op == "placeholder":
                self.graph.node_copy(node)
        self.graph.output(())
        self.output.meta = dict(output_node(old).meta)
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.touched = True

    def returns(self, values: Iterable[fx.Node], **changes: Any) -> None:
        """What the program returns from now on; ``changes`` are new fields of the program."""
        self.output.args = (tuple(values),)
        self.changes.update(changes)
        self.touched = True

    def finish(self) -> Program:
        """The next program: nodes in an order that respects data and effects, this pass in its history."""
        if not self.touched and not self.changes:
            return self.program
        if not self.keeps_order:
            schedule(self.graph)
        return self.program.with_graph(self.graph, self.made_by, **self.changes)
