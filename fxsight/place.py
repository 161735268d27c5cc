"""From an address to the place it names in one program: which node, and when.

A value in a program is a node *at a time*: the same tensor can be a function's argument, its result and the next
module's input. A place says which uses of the node a write there changes: for an output, all that come later; for an
input, those inside the call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from fxsight.address import Address, Step
from fxsight.book import Call, Const, Ref, Structure
from fxsight.errors import NotExecuted, UnknownAddress, nearest
from fxsight.node import origin_of
from fxsight.node_call import operator_name, output_of, structure_of
from fxsight.parse import parse_arguments
from fxsight.program import Program
from fxsight.rules import Table
from fxsight.source import Source, SourceReader
from fxsight.spec import TensorSpec
from fxsight.tree import LEAF


@dataclass(frozen=True)
class Place:
    """One call of a program, or one node: its structured input and output, and when they are there.

    key: equal for equal places.  start, end: of the call, on the clock of the book.
    """

    address: Address
    key: str
    inputs: Structure
    output: Structure
    start: float
    end: float
    call: Call | None = None

    def port(self, port: str) -> tuple[Structure, int]:
        """The structure at a port, and the number of its first leaf in the whole input or output."""
        if port == "output":
            return self.output, 0
        if port == "inputs":
            return self.inputs, 0
        if not self.inputs.leaves:  # called without arguments
            return Structure(LEAF, (Const(None),)), 0
        args, kwargs = self.inputs.tree.children
        number = 0 if args.children else args.size
        first = (args.children or kwargs.children or (LEAF,))[0]
        return Structure(first, self.inputs.leaves[number : number + first.size]), number


@dataclass(frozen=True)
class Location:
    """One leaf of a place's input or output: a node of the graph, and the uses of it that belong to the leaf.

    node: its name.  since, until: a use at time t belongs to it when ``since < t <= until``.
    """

    place: str
    side: str
    leaf: int
    node: str
    since: float
    until: float
    address: Address

    @property
    def key(self) -> tuple[str, str, int]:
        """Equal for equal locations."""
        return (self.place, self.side, self.leaf)


def locations(place: Place, port: str) -> tuple[Structure, tuple[Location | None, ...]]:
    """The structure at a port and, per leaf, its location; None for leaves that are not values of the graph."""
    structure, first = place.port(port)
    side = "output" if port == "output" else "input"
    found: list[Location | None] = []
    for number, (leaf, path) in enumerate(zip(structure.leaves, structure.tree.paths(), strict=True)):
        since, until = (place.end, math.inf) if side == "output" else (place.start, place.end)
        address = place.address.at(port, *(k if isinstance(k, int) else str(k) for k in path))
        known = isinstance(leaf, Ref)
        found.append(Location(place.key, side, first + number, leaf.node, since, until, address) if known else None)  # type: ignore[union-attr]
    return structure, tuple(found)


class Places:
    """All places of one program, by address."""

    def __init__(self, program: Program, reader: SourceReader) -> None:
        self.program = program
        self.reader = reader
        self._found: dict[Address, Place] = {}
        self._located: dict[tuple[str, str], tuple[Structure, tuple[Location | None, ...]]] = {}
        self.rules: Table = {}
        self._specs: dict[tuple[tuple[str, int], ...], dict[str, TensorSpec]] = {}

    def locations(self, place: Place, port: str) -> tuple[Structure, tuple[Location | None, ...]]:
        """``locations`` of a place of this program; remembered."""
        found = self._located.get((place.key, port))
        if found is None:
            found = self._located[place.key, port] = locations(place, port)
        return found

    def specs(self, sizes: Mapping[str, int]) -> dict[str, TensorSpec]:
        """A table for the specs of the program's nodes at these sizes; filled by those who need them."""
        return self._specs.setdefault(tuple(sizes.items()), {})

    def find(self, address: Address) -> Place:
        """The place an address names.

        Raises: UnknownAddress with the nearest names; NotExecuted where the source has it but this forward does not
        run it.
        """
        known = self._found.get(address)
        if known is None:
            known = self._found[address] = self._find(address)
        return known

    def _find(self, address: Address) -> Place:
        call = self._module(address)
        for depth, step in enumerate(address.steps):
            below = self.program.book.child(call, step.name, step.n)
            if below is None or below.id in self._operators:
                node = self.node_places(call).get(str(step))
                if node is not None and depth == len(address.steps) - 1:
                    return node
                if node is not None and self.inside(node) is None:
                    raise UnknownAddress(f"{node.address}: one operator, which has not been opened")
                below = None if node is None else self.inside(node)
            if below is None:
                raise self._missing(call, step)
            call = below
        return self.place(call)

    def inside(self, place: Place) -> Call | None:
        """The call whose body the parts of an opened operator are; None for all that has not been opened."""
        number = place.call.id if place.call is not None else self._bodies.get(place.key.removeprefix("%"), -1)
        return self.program.book.calls[number] if number in self._opened else None

    def place(self, call: Call) -> Place:
        """The place of a call."""
        return Place(
            self.program.book.address(call),
            str(call.id),
            call.inputs,
            call.output,
            call.start,
            call.end,
            call,
        )

    def _module(self, address: Address) -> Call:
        modules = self.program.book.modules
        call = modules.get((address.module, address.call))
        if call is not None:
            return call
        calls = sum(path == address.module for path, _ in modules)
        if calls:
            raise NotExecuted(
                f"{address.place}: this forward calls {address.module!r} {_times(calls)}; "
                f"the last is {_numbered(address.module, calls - 1)}"
            )
        paths = sorted({path for path, _ in modules})
        raise NotExecuted(
            f"{address.place}: this forward never calls the module {address.module!r}, "
            "so it has no input and no output; "
            f"{nearest(address.module, paths) or 'see model.ops for what runs'}"
        )

    def _missing(self, call: Call, step: Step) -> Exception:
        place, source = self.program.book.address(call), self.source(call)
        made = [c for c in self.program.book.children(call) if c.name == step.name]
        if made:
            return NotExecuted(
                f"{place}/{step}: {step.name} runs {_times(len(made))} here; "
                f"the last is {_numbered(step.name, len(made) - 1)}"
            )
        site = source.find(step.name) if source is not None else None
        if site is not None and step.name in call.ran:
            return NotExecuted(
                f"{place}/{step}: it runs, but calls nothing of torch or Python whose value could be kept: {site.text}"
            )
        if site is not None:
            return NotExecuted(
                f"{place}/{step}: on a branch that this forward does not take (line {site.span.line}: {site.text})"
            )
        known = [c.name for c in self.program.book.children(call)]
        hint = nearest(step.name, [*known, *self.node_places(call)])
        listed = ", ".join(dict.fromkeys(known)) or "no operations"
        return UnknownAddress(
            f"no operation {step.name!r} in {str(place) or 'the root module'}; {hint}\n  it has: {listed}".replace(
                "; \n", "\n"
            )
        )

    def source(self, call: Call) -> Source | None:
        """The source whose operations are the call's children."""
        return None if call.body is None else self.reader.find(*call.body)

    def node_places(self, call: Call) -> Mapping[str, Place]:
        """Every node made by a call or below it, under its own stable name: operator and number in the call.

        An opened operator keeps its name, and its parts have names below it alone: no other is renumbered.
        """
        return self._named(call)[0]

    def parts(self, call: Call) -> Mapping[str, Place]:
        """What a call is made of: of an opened operator its parts, of any other its nodes."""
        named, parts = self._named(call)
        return parts if call.id in self._opened else named

    def _named(self, call: Call) -> tuple[Mapping[str, Place], Mapping[str, Place]]:
        """The places of the nodes of a call by name; those of its parts, when it is opened, again."""
        calls = self._own(call) if call.kind == "module" else {c.id for c in self._below(call)}
        made = [n for n in self.program.graph.nodes if n.op == "call_function" and origin_of(n).call in calls]
        around, opened = self._around(call), self._opened.get(call.id)
        own = [n for n in made if origin_of(n).part_of == around]
        parts = [n for n in made if origin_of(n).part_of == opened]
        counts: dict[str, int] = {}
        named = {}
        for node in (*own, *parts):
            name = operator_name(node).split(".")
            label = f"aten_{name[1]}" if name[0] == "aten" else "_".join(name)
            number = counts[label] = counts.get(label, -1) + 1
            named[f"{label}_{number}"] = self._node_place(call, f"{label}_{number}", node)
        return named, dict(list(named.items())[len(own) :])

    @cached_property
    def _bodies(self) -> Mapping[str, int]:
        """The opened operators, by name of their node: the call whose body their parts are."""
        book, found = self.program.book, dict[str, int]()
        for name in dict.fromkeys(origin_of(n).part_of for n in self.program.graph.nodes):
            if name in self.program.nodes:
                made_in = book.calls[origin_of(self.program.nodes[name]).call]
                own = (c.id for c in book.children(made_in) if c.output.leaves == (Ref(name),) and c.kind == "torch")
                found[name] = next(own, made_in.id)
        return found

    @cached_property
    def _opened(self) -> Mapping[int, str]:
        """The same by number of the call."""
        return {call: name for name, call in self._bodies.items()}

    @cached_property
    def _operators(self) -> Set[int]:
        """Calls that stand for one operator of several that a call makes."""
        made_in = {call: origin_of(self.program.nodes[name]).call for name, call in self._bodies.items()}
        return {call for call, outer in made_in.items() if call != outer}

    def _around(self, call: Call) -> str:
        """The node of the innermost opened operator around a call; empty when there is none."""
        while call.parent is not None:
            call = self.program.book.calls[call.parent]
            if call.id in self._opened:
                return self._opened[call.id]
        return ""

    def _own(self, call: Call) -> set[int]:
        """The call and what is below it, without other modules."""
        return {c.id for c in self._below(call, modules=False)}

    def _below(self, call: Call, modules: bool = True) -> Iterator[Call]:
        """The call and what is below it, but not what the operators below it were opened to: that has its own names."""
        yield call
        for child in self.program.book.children(call):
            if child.kind == "torch":
                yield child
            elif modules or child.kind != "module":
                yield from self._below(child, modules)

    def _node_place(self, call: Call, name: str, node: fx.Node) -> Place:
        time = origin_of(node).time
        was = origin_of(node).was
        args, kwargs = parse_arguments(was, self.program.nodes) if was else (tuple(node.args), dict(node.kwargs))
        inputs = structure_of((args, kwargs))
        output = Structure(LEAF, (output_of(node),))
        return Place(self.program.book.address(call).step(name), f"%{node.name}", inputs, output, time - 0.5, time)


def _numbered(name: str, n: int) -> str:
    return f"{name}#{n}" if n else name


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
