"""The address book: every module call, Python call and torch call of one forward, and where their values are.

Filled while the model is captured (``provenance``), kept with the program, stored with it. A ``Call`` says what was
called from where, with which structured inputs, and what it returned; the leaves of both are references to nodes of
the graph. Times are positions on one clock that ticks at every call, return and node: a value at a *place and time* is
what an address means (see ``weave``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from fxsight.address import Address
from fxsight.tree import Json, Tree

Kind = Literal["module", "function", "torch"]


@dataclass(frozen=True)
class Ref:
    """A value in the graph: the name of its node."""

    node: str


@dataclass(frozen=True)
class Const:
    """A plain Python value: number, string, None."""

    value: Any


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, by its name in the module."""

    name: str


@dataclass(frozen=True)
class SizeRef:
    """An integer computed from sizes, as text."""

    expr: str


@dataclass(frozen=True)
class Opaque:
    """Anything else: only its type is known."""

    type: str


LISTS, PARTIAL = "lists parts", "part of: "
Leaf = Ref | Const | Weight | SizeRef | Opaque
_LEAVES: Mapping[str, type[Any]] = {c.__name__: c for c in (Ref, Const, Weight, SizeRef, Opaque)}


@dataclass(frozen=True)
class Structure:
    """A structured value whose leaves are references."""

    tree: Tree
    leaves: tuple[Leaf, ...]

    def to_json(self) -> Json:
        """Lists, strings and numbers only."""
        return [self.tree.to_json(), [[type(x).__name__, *vars(x).values()] for x in self.leaves]]

    @staticmethod
    def from_json(data: Json) -> Structure:
        """The inverse of ``to_json``."""
        return Structure(Tree.from_json(data[0]), tuple(_LEAVES[name](value) for name, value in data[1]))


@dataclass(frozen=True)
class Call:
    """One call in the forward.

    id: position in the book.  parent: the call whose source makes it; None for the root.
    name: its operation name in the parent's source.  n: how many calls of that name the parent made before.
    module, module_call: the module it is (kind "module") or belongs to, and which of its calls.
    title: class of the module, or name of the function.  line: where it is called, ``file:line``.
    body: file, name and first line of the function that runs; None when it is not Python.
    inputs: of ``(args, kwargs)``.  start, end: on the clock, fractions in what has been opened.
    ran: sites of its source that ran but left no value.
    """

    id: int
    parent: int | None
    kind: Kind
    name: str
    n: int
    module: str
    module_call: int
    title: str
    line: str
    body: tuple[str, str, int] | None
    inputs: Structure
    output: Structure
    start: float
    end: float
    ran: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """A dict of plain values."""
        return {**vars(self), "inputs": self.inputs.to_json(), "output": self.output.to_json()}

    @staticmethod
    def from_json(data: Json) -> Call:
        """The inverse of ``to_json``."""
        body = data["body"]
        changes: dict[str, Any] = {
            "inputs": Structure.from_json(data["inputs"]),
            "output": Structure.from_json(data["output"]),
            "body": tuple(body) if body else None,
            "ran": tuple(data["ran"]),
        }
        return Call(**{**data, **changes})


@dataclass(frozen=True)
class CustomFunction:
    """A call of a ``torch.autograd.Function`` of the model's: its forward is in the program, its backward is not.

    name: of the class.  line: where it is called.  start, end: on the clock.
    """

    name: str
    line: str
    start: int
    end: int


@dataclass(frozen=True)
class Book:
    """All calls of one forward, in order of their start.

    names: what the code that ran mentions: names and short texts, ``LISTS`` if it lists the parts of a module, and
    ``PARTIAL`` + text where a name may be put together; None when that is not known.
    after: the caches among the inputs, a tuple in their order, as the forward leaves them; None where it is given none.
    functions: calls whose backward is not that of the operators in the program (``custom``).
    """

    calls: tuple[Call, ...] = field(default=())
    names: frozenset[str] | None = None
    after: Structure | None = None
    functions: tuple[CustomFunction, ...] = ()

    @property
    def left(self) -> tuple[str, ...]:
        """The nodes of the tensors in ``after``, in order."""
        return () if self.after is None else tuple(leaf.node for leaf in self.after.leaves if isinstance(leaf, Ref))

    @cached_property
    def modules(self) -> Mapping[tuple[str, int], Call]:
        """Module calls by path and number."""
        return {(c.module, c.module_call): c for c in self.calls if c.kind == "module"}

    @cached_property
    def _children(self) -> Mapping[int | None, tuple[Call, ...]]:
        found: dict[int | None, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.parent, []).append(call)
        return {parent: tuple(calls) for parent, calls in found.items()}

    @cached_property
    def _by_name(self) -> Mapping[tuple[int | None, str, int], Call]:
        return {(c.parent, c.name, c.n): c for c in self.calls}

    def children(self, call: Call) -> tuple[Call, ...]:
        """The calls that the source of ``call`` makes, in order."""
        return self._children.get(call.id, ())

    def child(self, call: Call, name: str, n: int = 0) -> Call | None:
        """One of them by operation name and number."""
        return self._by_name.get((call.id, name, n))

    def find(self, address: Address) -> Call | None:
        """The call at a place; None when this forward does not make it."""
        call = self.modules.get((address.module, address.call))
        for step in address.steps:
            call = None if call is None else self.child(call, step.name, step.n)
        return call

    def address(self, call: Call) -> Address:
        """The place of a call: module calls by their path, others by the way down from their module."""
        if call.kind == "module":
            return Address(call.module, call.module_call)
        if call.parent is None:
            return Address("").step(call.name, call.n)
        return self.address(self.calls[call.parent]).step(call.name, call.n)

    def within(self, call: Call) -> Iterator[Call]:
        """The call and all calls below it."""
        yield call
        for child in self.children(call):
            yield from self.within(child)

    def may_see(self, parent: Any, name: str) -> bool:
        """Whether the forward could have done something else if ``parent`` had (or had not) a child ``name``.

        parent: asked whether it is a container, which gives its children away by being iterated; None: it is none.
        """
        if self.names is None or LISTS in self.names or name in self.names or hasattr(type(parent), "__iter__"):
            return True
        return any(n.startswith(PARTIAL) and n.removeprefix(PARTIAL) in name for n in self.names)

    def extended(self, calls: tuple[Call, ...], replaced: Mapping[int, Call] = {}) -> Book:
        """With more calls, and some replaced (by id)."""
        return replace(self, calls=tuple(replaced.get(c.id, c) for c in self.calls) + calls)
