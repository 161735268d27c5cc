"""Where the places of a captured program are in a graph of Dynamo's.

Dynamo says which module an operator was called in, and not what a module was given and returned. The capture says
that. The two are laid side by side, module call by module call: where a call makes the same operators and the same
calls in the same order in both, each of its operators in one is that of the other. A place is taken over only if the
value at it is such an operator's, or what such operators use, and if nothing else tells another story; else the
reason why not is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.address import Address
from fxsight.book import Book, Call, Const, Leaf, Opaque, Ref, Structure
from fxsight.dynamo import Graph, located
from fxsight.node import Origin, binding_of, origin_of
from fxsight.place import Location, Place, locations
from fxsight.program import Program
from fxsight.sides import ModuleCall, Side, does_nothing, is_operator, side_of, tensors_in, values_of
from fxsight.spec import TensorSpec

aten = torch.ops.aten


class Unfit(Exception):
    """Why a place cannot be found in a graph."""


class Beside:
    """A captured program and a graph, laid side by side.

    captured: of a forward of the same model, in its present mode.  same: per further name of a weight, the first.
    """

    def __init__(self, captured: Program, graph: Graph, same: Mapping[str, str]) -> None:
        self.captured, self.graph, self.same = captured, graph, same
        self.seen = {hidden: seen for seen, hidden in graph.hidden.items()}
        self.nodes = list(captured.graph.nodes)
        self._chains = {n: self._chain(n) for n in self.nodes if n.op == "call_function" and not _is_border(n)}
        self.there = side_of(self._chains.items())
        self.here = side_of(graph.chains.items())
        self.equal = {c for c in self.here.tokens if self._same_calls(c)}
        self.image: dict[fx.Node, fx.Node] = {}
        self.outer: dict[fx.Node, fx.Node] = {}
        while self._drop_contradictions():
            pass
        self._found: dict[int, Call] = {}

    def _chain(self, node: fx.Node) -> tuple[ModuleCall, ...]:
        calls, number = self.captured.book.calls, origin_of(node).call
        chain: list[ModuleCall] = []
        call = calls[number] if number >= 0 else None
        while call is not None:
            if call.kind == "module":
                chain.append(ModuleCall(call.module, call.module_call))
            call = None if call.parent is None else calls[call.parent]
        return tuple(reversed(chain))

    def _same_calls(self, call: ModuleCall) -> bool:
        return self.here.tokens[call] == self.there.tokens.get(call)

    def _drop_contradictions(self) -> bool:
        """Pair the operators of equal calls; a call whose operators use other values than their pairs is not equal."""
        self.image = {
            theirs: mine
            for call in self.equal
            for theirs, mine in zip(self.there.own.get(call, []), self.here.own.get(call, []), strict=True)
        }
        self.outer = {}
        for call in sorted(self.equal, key=lambda c: (c.path, c.number)):
            for theirs, mine in zip(self.there.own.get(call, []), self.here.own.get(call, []), strict=True):
                if not self._agree(theirs, mine):
                    self.equal.discard(call)
                    return True
        return False

    def _agree(self, theirs: fx.Node, mine: fx.Node) -> bool:
        """Whether two operators are of one kind, and use the same values."""
        if _kind(theirs) != _kind(mine):
            return False
        a, b = _arguments(theirs), _arguments(mine)
        both = [name for name in a if name in b]  # a mask may be given in one, and left out in the other
        pairs = [(a[name], b[name]) for name in both]
        return all(len(x) == len(y) and all(map(self._is_same, map(_root, x), map(self._told, y))) for x, y in pairs)

    def _told(self, mine: fx.Node) -> fx.Node:
        return self.graph.hidden.get(mine, mine)

    def _is_same(self, theirs: fx.Node, mine: fx.Node) -> bool:
        if theirs in self.image:
            return self.image[theirs] is mine
        if theirs.op == "placeholder" and binding_of(theirs).kind == "weight":
            name = str(binding_of(theirs).key)
            known = mine.op == "placeholder" and binding_of(mine).kind == "weight"
            return not known or binding_of(mine).key == self.same.get(name, name)
        return self.outer.setdefault(theirs, mine) is mine

    # -- places ------------------------------------------------------------------------------------------------------

    def locate(self, address: Address) -> None:
        """Take a place over.

        Raises: Unfit, with the reason, where it cannot be told for certain.
        """
        call = self.captured.book.find(replace(address, port="", keys=()))
        if call is None:
            raise Unfit("the capture has no such call, or it is inside a fused operator; edited.compile() can edit it")
        module = ModuleCall(call.module, call.module_call)
        self._check_count(call.module)
        mine = self._nodes(call, module)
        sides = [self._input(call, leaf, module, mine) for leaf in call.inputs.leaves]
        ends = [self._output(call, leaf, module, mine) for leaf in call.output.leaves]
        known = Place(address, "", Structure(call.inputs.tree, tuple(_shown(sides))),
                      Structure(call.output.tree, tuple(_shown(ends))), 0, 0)  # fmt: skip
        found = [x for x in locations(known, address.port)[1] if x is not None]
        if not any(_keys(x) == address.keys for x in found):
            reasons = [x for x in (sides if address.port != "output" else ends) if isinstance(x, str)]
            raise Unfit(reasons[0] if reasons else "there is no tensor at this place")
        start, end = self._times(call, mine)
        inputs, output = known.inputs, known.output
        self._found[call.id] = replace(call, inputs=inputs, output=output, start=start, end=end)

    def _check_count(self, path: str) -> None:
        here = sum(c.path == path for c in self.here.inside)
        there = sum(c.path == path for c in self.there.inside)
        if here != there:
            raise Unfit(f"this graph calls {path or 'the model'!r} {here} times, and a forward {there} times")

    def _nodes(self, call: Call, module: ModuleCall) -> list[fx.Node]:
        """The operators of a call in the graph."""
        if call.kind == "module":
            return self.here.inside.get(module, [])
        theirs = [n for n in self._chains if is_operator(n) and call.start <= origin_of(n).time <= call.end]
        if module not in self.equal or not all(n in self.image for n in theirs) or not theirs:
            raise Unfit(
                f"{module.path or 'the model'} makes other operators here than when it is captured; edit the input or "
                "output of a module in it"
            )
        return [self.image[n] for n in theirs]

    def _output(self, call: Call, leaf: Leaf, module: ModuleCall, mine: list[fx.Node]) -> fx.Node | str | None:
        """The value of one leaf of what a call returns; or the reason why it is not known."""
        if not isinstance(leaf, Ref):
            return None
        border = self.captured.nodes[leaf.node]
        root = _root(border)
        value = self.image.get(root)
        if value is None or value not in mine:
            return f"{call.module or 'the model'} does not return a value that an operator of it makes in this graph"
        twins = [x for x in call.output.leaves if isinstance(x, Ref) and _root(self.captured.nodes[x.node]) is root]
        if len(twins) > 1:
            return "it is returned twice, and the graph does not say which of the two is used where"
        if call.kind != "module":
            return self.seen.get(value, value)
        if module not in self.equal and not self._same_end(module, root, value):
            return f"{call.module or 'the model'} makes other operators here than when it is captured"
        inside = set(self.there.inside[module])
        if any(border not in _way(a) for a in self._uses(root, lambda n: n not in inside)):
            return "it is used outside of the module that returns it, in another way than by being returned"
        seen = self.seen.get(value, value)
        return seen if self._leaves(seen, set(mine)) else "nothing in this graph uses it"

    def _same_end(self, module: ModuleCall, root: fx.Node, value: fx.Node) -> bool:
        """Whether in both, the same operators and calls follow a value in a call that is not equal as a whole."""
        if module not in self.graph.whole and self.graph.frame.is_cut:
            return False
        chain = self._chains[root]
        return all(
            self._tail(self.there, c, root) == self._tail(self.here, c, value) for c in chain[chain.index(module) :]
        )

    def _tail(self, side: Side, call: ModuleCall, node: fx.Node) -> list[tuple[Any, ...]] | None:
        """What a call does after an operator of it."""
        at = side.at.get((call, node))
        return None if at is None else side.tokens[call][at:]

    def _input(self, call: Call, leaf: Leaf, module: ModuleCall, mine: list[fx.Node]) -> fx.Node | str | None:
        """The same of what it is given."""
        if not isinstance(leaf, Ref):
            return None
        border = self.captured.nodes[leaf.node]
        root = _root(border)
        value = self.image.get(root) or self.outer.get(root)
        if value is None or value in mine:
            return "no operator of this graph says which value it is"
        given = [x for x in call.inputs.leaves if isinstance(x, Ref) and _root(self.captured.nodes[x.node]) is root]
        if len(given) > 1:
            return "it is given twice, and the graph does not say which of the two is used where"
        if module not in self.equal and module not in self.graph.whole:
            return f"the call of {module.path or 'the model'} is cut by a graph break"
        inside = set(self.there.inside[module]) if call.kind == "module" else set()
        if any(border not in _way(a) for a in self._uses(root, inside.__contains__)):
            return "the module uses it in another way than as what it is given"
        seen = self.seen.get(value, value)
        return seen if any(seen in values_of(n) for n in mine) else "no operator of the module in this graph uses it"

    def _uses(self, root: fx.Node, where: Any) -> list[fx.Node]:
        """The arguments that are a value, seen through borders, of the operators in some place."""
        users = [n for n in self.nodes if not _is_border(n) and where(n)]
        return [a for n in users for a in n.all_input_nodes if _root(a) is root]

    def _leaves(self, value: fx.Node, inside: set[fx.Node]) -> bool:
        returned = any(x is value for x in self.graph.returned)
        return returned or any(user not in inside for user in value.users)

    def _times(self, call: Call, mine: list[fx.Node]) -> tuple[int, int]:
        depth, deepest = self._depth(call), self._deepest
        first, last = (self._time(n, deepest) for n in (mine[0], mine[-1]))
        return first - (deepest + 1 - depth), last + (deepest + 1 - depth)

    def _time(self, node: fx.Node, deepest: int) -> int:
        return (self._order[node] + 1) * (2 * deepest + 4)

    @property
    def _order(self) -> Mapping[fx.Node, int]:
        return {node: number for number, node in enumerate(self.graph.program.graph.nodes)}

    @property
    def _deepest(self) -> int:
        return max((self._depth(call) for call in self.captured.book.calls), default=0)

    def _depth(self, call: Call) -> int:
        depth, calls = 0, self.captured.book.calls
        while call.parent is not None:
            call, depth = calls[call.parent], depth + 1
        return depth

    def program(self) -> Program:
        """The graph as a program in which the places that were located have their addresses."""
        calls = tuple(self._found.get(call.id, _absent(call)) for call in self.captured.book.calls)
        ids = {ModuleCall(c.module, c.module_call): c.id for c in calls if c.kind == "module"}
        deepest, order = self._deepest, self._order
        origins: dict[fx.Node, Origin] = {}
        for node, chain in self.graph.chains.items():
            known = [ids[c] for c in chain if c in ids]
            origins[node] = Origin(known[-1] if known else 0, (order[node] + 1) * (2 * deepest + 4))
        return located(self.graph, Book(calls), origins)


def _absent(call: Call) -> Call:
    nothing = Opaque("not in this graph")
    inputs = Structure(call.inputs.tree, tuple(_without(x, nothing) for x in call.inputs.leaves))
    output = Structure(call.output.tree, tuple(_without(x, nothing) for x in call.output.leaves))
    return replace(call, inputs=inputs, output=output, start=-1, end=-1)


def _without(leaf: Leaf, nothing: Opaque) -> Leaf:
    return nothing if isinstance(leaf, Ref) else leaf


def _shown(found: Iterable[fx.Node | str | None]) -> list[Leaf]:
    return [Ref(x.name) if isinstance(x, fx.Node) else Const(None) if x is None else Opaque(x) for x in found]


def _keys(location: Location) -> tuple[Any, ...]:
    return location.address.keys


def _is_border(node: fx.Node) -> bool:
    return node.target is aten.alias.default or does_nothing(node)


def _way(node: fx.Node) -> list[fx.Node]:
    """A node and the borders that it has come through."""
    way = [node]
    while _is_border(way[-1]):
        way.append(way[-1].all_input_nodes[0])
    return way


def _root(node: fx.Node) -> fx.Node:
    return _way(node)[-1]


def _arguments(node: fx.Node) -> dict[str, list[fx.Node]]:
    """The tensors that an operator is given, by the names of its arguments."""
    schema = _torch.schema(node.target).arguments if isinstance(node.target, _torch.OpOverload) else ()
    names = [argument.name for argument in schema] or [str(number) for number in range(len(node.args))]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    found = {name: tensors_in(value) for name, value in given.items()}
    return {name: nodes for name, nodes in found.items() if nodes}


def _kind(node: fx.Node) -> Any:
    spec = node.meta.get("spec")
    return (spec.dtype, len(spec.shape)) if isinstance(spec, TensorSpec) else type(spec)
