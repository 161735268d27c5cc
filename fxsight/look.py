"""A look at a model at this moment: what is known of the body and of the place at an address.

``Look`` asks the program of the open trace, else the one asked for last, else, while nothing has been captured, the
source alone. It opens fused operators in copies: nothing that runs changes by it. Those of an open trace are kept, for
the trace and for later ones; others live as long as the look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx, nn

from fxsight.address import Address
from fxsight.book import Call
from fxsight.errors import InputError, NotExecuted, TraceError, UnknownAddress
from fxsight.passes.open_fused import open_above, open_place
from fxsight.place import Place, Places
from fxsight.program import Program
from fxsight.source import Source
from fxsight.spec import Dim, number
from fxsight.targets import target_name
from fxsight.tracer import Tracer

if TYPE_CHECKING:
    from fxsight.model import Model

NOTHING_CAPTURED = "nothing has been captured yet; model.capture(*inputs), or a trace, tells what runs"


@dataclass(frozen=True)
class Body:
    """What is known of one body.

    names: of its operations, in the order of the source.  calls: by name, in the order of execution.
    ran: as in ``Call``.  note: why there are no values.  program, call: where they are from, if it has run; no call
    for an operator.
    """

    title: str
    source: Source | None
    names: tuple[str, ...]
    calls: Mapping[str, Sequence[Call]] = field(default_factory=dict[str, Sequence[Call]])
    ran: tuple[str, ...] = ()
    note: str = ""
    program: Program | None = None
    call: Call | None = None

    @property
    def is_torch(self) -> bool:
        """Whether its operations, if there are any, are operators of the graph."""
        return self.source is None and self.program is not None and (self.call is None or self.call.kind == "torch")


@dataclass(frozen=True)
class Look:
    """A look at a model at this moment: at the program of the open trace, else at the one asked for last."""

    root: Model
    _opened: dict[tuple[int, Address], tuple[Places, Places]] = field(
        default_factory=dict[tuple[int, Address], tuple[Places, Places]], compare=False, repr=False
    )

    @property
    def trace(self) -> Tracer | None:
        """The open trace, or None."""
        trace: Tracer | None = self.root._captures.open
        return trace

    @property
    def sizes(self) -> Mapping[str, int]:
        """The named sizes of the open trace; none outside."""
        return {} if self.trace is None else self.trace.sizes

    @property
    def captured(self) -> Places | None:
        """The places of the program; None while nothing has been captured."""
        captures, trace = self.root._captures, self.trace
        if trace is not None:
            return self._of_trace(trace)
        latest: Program | None = captures.latest
        return None if latest is None else captures.places(latest)

    def _of_trace(self, trace: Tracer) -> Places:
        places: Places = self.root._captures.places(trace.captured)
        return places

    def number(self, dim: Dim) -> Dim:
        """A dimension as a number, where the sizes tell it."""
        try:
            return number(dim, self.sizes)
        except InputError:
            return dim

    def places(self, address: Address) -> Places:
        """The places of the program, with the fused operators above an address opened.

        Raises: UnknownAddress, NotExecuted for operations; TraceError while nothing has been captured.
        """
        places = self.captured if self.trace is None else self._of_trace(self.trace.meant(address))
        if places is None:
            raise TraceError(f"{in_words(address)}: {NOTHING_CAPTURED}")
        try:
            if address.steps:
                places.find(address)
        except (UnknownAddress, NotExecuted):
            if len(address.steps) < 2:
                raise
            return self._opened_above(places, address)
        return places

    def _opened_above(self, places: Places, address: Address) -> Places:
        """What a trace will open, too, when it reads there, is opened once for both; elsewhere in a copy."""
        if self.trace is None:
            return self._open(places, address.parent, lambda p: open_above(p, address, places.reader))
        captures = self.root._captures
        kept: Places = captures.places(captures.opened(places.program, address))
        return kept

    def find(self, address: Address) -> Place:
        """The place of an address.

        Raises: as ``places``, and NotExecuted for modules.
        """
        return self.places(address).find(address)

    def inside(self, address: Address, places: Places) -> Places:
        """The places of the program in which the torch call at an address is opened; as before if it cannot be."""
        try:
            return self._open(places, address, lambda p: open_place(p, address, places.reader))
        except UnknownAddress:
            return places

    def _open(self, places: Places, address: Address, opened: Callable[[Program], Program]) -> Places:
        key = (id(places.program), address)
        if key not in self._opened:  # with the places, so that the id stays theirs
            self._opened[key] = places, Places(opened(places.program), places.reader)
        return self._opened[key][1]

    def module(self, path: str) -> nn.Module:
        """A module of the model."""
        module: nn.Module = self.root._module.get_submodule(path)
        return module

    def forward(self, path: str) -> Source | None:
        """The source of a module's forward, whether it has run or not; None when it has none in Python."""
        module, captures = self.module(path), self.root._captures
        if not path and captures.method != "forward":
            return captures.reader.of_function(getattr(module, captures.method))  # type: ignore[no-any-return]
        source: Source | None = captures.reader.of_function(module.forward) if has_forward(module) else None
        return source

    def body(self, address: Address) -> Body:
        """What is known of the body at an address.

        Raises: UnknownAddress, NotExecuted, but for modules, of which the source is there in any case.
        """
        if self.captured is None:
            return self._unknown(address, NOTHING_CAPTURED)
        places = self.places(address)
        try:
            place = places.find(address)
        except NotExecuted as error:
            return self._unknown(address, str(error))
        if place.call is None or (place.call.kind == "torch" and place.call.body is None):
            places = self.inside(address, places)
            place = places.find(address)
        call = place.call or places.inside(place)
        if call is None:
            return Body(target_name(node_of(place, places.program).target), None, (), program=places.program)
        return _body(call, places)

    def _unknown(self, address: Address, reason: str) -> Body:
        module, source = self.module(address.module), self.forward(address.module)
        names = source.names("call") if source is not None and self.captured is None else ()
        return Body(type(module).__name__, source, names, note=reason if has_forward(module) else "")


def _body(call: Call, places: Places) -> Body:
    """That of a call that was made."""
    source, program = places.source(call), places.program
    if source is None and call.kind == "torch":
        return Body(call.title, None, tuple(places.parts(call)), program=program, call=call)
    calls: dict[str, list[Call]] = {}
    for child in program.book.children(call):
        calls.setdefault(child.name, []).append(child)
    order = {} if source is None else {name: number for number, name in enumerate(source.names())}
    names = tuple(sorted(calls, key=lambda name: order.get(name, len(order))))
    return Body(call.title, source, names, calls, call.ran, "", program, call)


def node_of(place: Place, program: Program) -> fx.Node:
    """The node of a place that is an operator of the graph."""
    assert place.call is None, "a call is many nodes, or none"
    return program.nodes[place.key.removeprefix("%")]


def in_words(address: Address) -> str:
    """An address in words."""
    return str(address) or "the root module"


def has_forward(module: nn.Module) -> bool:
    """Whether the class of a module has a forward (``ModuleList`` has none)."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward
