"""What is known of operations, and how it is printed: types, a source with notes beside it, one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from fxsight.address import Address
from fxsight.book import Call, Const, Leaf, Opaque, Ref, SizeRef, Structure, Weight
from fxsight.errors import NotExecuted, TraceError, UnknownAddress
from fxsight.node import Binding
from fxsight.passes.open_fused import open_above, open_place
from fxsight.place import Place, Places
from fxsight.program import Program
from fxsight.provenance import Libraries
from fxsight.sites import Site
from fxsight.source import Source
from fxsight.spec import SizeSpec, Spec, TensorSpec
from fxsight.targets import target_name
from fxsight.tree import Tree

if TYPE_CHECKING:
    from fxsight.model import Model

NOTHING_CAPTURED = "nothing has been captured yet; model.capture(*inputs), or a trace, tells what runs"
NOT_EXECUTED = "not executed"
_SHOWN = 8  # members of a container that are shown before the rest is counted


class Text(str):
    """A string that a REPL and a notebook show as it is printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


# -- what is known -------------------------------------------------------------------------------------------


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
    """A look at a model at this moment: at the program of the open trace, else at the one asked for last.

    Looking opens fused operators in copies of its own: nothing that runs changes by it.
    """

    root: Model
    _opened: dict[tuple[int, Address], tuple[Places, Places]] = field(
        default_factory=dict[tuple[int, Address], tuple[Places, Places]], compare=False, repr=False
    )

    @property
    def trace(self) -> Any:
        """The open trace, or None."""
        return self.root._captures.open

    @property
    def sizes(self) -> Mapping[str, int]:
        """The named sizes of the open trace; none outside."""
        return {} if self.trace is None else self.trace.sizes

    @property
    def captured(self) -> Places | None:
        """The places of the program; None while nothing has been captured."""
        captures, trace = self.root._captures, self.trace
        program: Program | None = captures.latest if trace is None else trace.captured
        places: Places | None = None if program is None else captures.places(program)
        return places

    def places(self, address: Address) -> Places:
        """The places of the program, with the fused operators above an address opened.

        Raises: UnknownAddress, NotExecuted for operations; TraceError while nothing has been captured.
        """
        places = self.captured
        if places is None:
            raise TraceError(f"{_shown(address)}: {NOTHING_CAPTURED}")
        try:
            if address.steps:
                places.find(address)
        except (UnknownAddress, NotExecuted):
            if len(address.steps) < 2:
                raise
            return self._open(places, address.parent, lambda p: open_above(p, address, places.reader))
        return places

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
    leaf = place.output.leaves[0]
    assert isinstance(leaf, Ref), "the output of an operator is its node"
    return program.nodes[leaf.node]


def _shown(address: Address) -> str:
    return str(address) or "the root module"


def has_forward(module: nn.Module) -> bool:
    """Whether the class of a module has a forward (``ModuleList`` has none)."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


# -- types ---------------------------------------------------------------------------------------------------


def value_text(structure: Structure, program: Program) -> str:
    """The type of a structured value: ``f32[batch, length, 64]``, ``(f32[batch, 2, length, 16], None)``."""
    return _structured(structure.tree, iter([_leaf_text(leaf, program) for leaf in structure.leaves]))


def tensor_spec_of(structure: Structure, program: Program) -> TensorSpec | None:
    """The spec of a value that is one tensor; None for any other."""
    spec = _spec(structure.leaves[0], program) if structure.tree.kind == "leaf" else None
    return spec if isinstance(spec, TensorSpec) else None


def _spec(leaf: Leaf, program: Program) -> Spec:
    name = leaf.node if isinstance(leaf, Ref) else ""
    if isinstance(leaf, Weight):
        bindings = program.bindings.items()
        name = next((node for node, known in bindings if known == Binding("weight", leaf.name)), "")
    found: Spec = program.nodes[name].meta.get("spec") if name in program.nodes else None
    return found


def _leaf_text(leaf: Leaf, program: Program) -> str:
    match leaf:
        case Const(value):
            return repr(value)
        case SizeRef(expr):
            return expr
        case Opaque(name):
            return name
        case _:
            spec = _spec(leaf, program)
            return "tensor" if spec is None else _spec_text(spec)


def _spec_text(spec: Spec) -> str:
    if isinstance(spec, tuple):
        return f"({', '.join(map(_spec_text, spec))})"
    return str(spec.expr if isinstance(spec, SizeSpec) else spec)


def _structured(tree: Tree, leaves: Iterator[str]) -> str:
    if tree.kind == "leaf":
        return next(leaves)
    parts = [_structured(child, leaves) for child in tree.children]
    if tree.kind not in ("tuple", "list"):
        form = "{!r}: {}" if tree.kind == "dict" else "{}={}"
        parts = [form.format(key, part) for key, part in zip(tree.keys, parts, strict=True)]
    if len(parts) > _SHOWN:
        parts = [*parts[: _SHOWN // 2], f"... {len(parts) - _SHOWN // 2} more"]
    inner = ", ".join(parts)
    match tree.kind:
        case "tuple":
            return f"({inner},)" if len(parts) == 1 else f"({inner})"
        case "list":
            return f"[{inner}]"
        case "dict":
            return "{" + inner + "}"
        case _:
            return f"{tree.name.partition(':')[2].rpartition('.')[2]}({inner})"


# -- pages ---------------------------------------------------------------------------------------------------


def body_text(body: Body, address: Address, operators: bool) -> Text:
    """A body with its operations beside their lines; without a source, the first line alone.

    operators: with those operators, subscripts and attributes that have a value, too.
    """
    file = f"{Libraries().short(body.source.file)}:{body.source.first_line}" if body.source is not None else ""
    header = "  ".join(filter(None, (body.title, _shown(address), file)))
    header = "\n".join(filter(None, (header, body.note)))
    if body.source is None:
        return Text(header)
    program = body.program
    if program is None:
        return Text(f"{header}\n{body.source.render()}")
    sites = {site.name: site for site in body.source.sites}
    notes = {name: _site_note(site, body, program) for name, site in sites.items()}
    notes = {name: note for name, note in notes.items() if note}
    shown = tuple(s for s in body.source.sites if s.kind == "call" or (operators and s.name in notes))
    text = replace(body.source, sites=shown).render(notes, operators=operators)
    rest = [f"{name}    # {_note(calls, program)}" for name, calls in body.calls.items() if name not in sites]
    more = ["made by attributes and constructors that the source uses:", *rest] if rest else []
    return Text("\n".join([header, text, *more]))


def _site_note(site: Site, body: Body, program: Program) -> str:
    """What stands behind the line of an operation; nothing where nothing is known."""
    if site.name in body.calls:
        return _note(body.calls[site.name], program)
    return NOT_EXECUTED if site.name not in body.ran else ""


def _note(calls: Sequence[Call], program: Program) -> str:
    """The type of the first output, and how often there is one."""
    output = calls[0].output
    is_plain = output.leaves and all(isinstance(leaf, Const | SizeRef) for leaf in output.leaves)
    times = f", runs {len(calls)} times" if len(calls) > 1 else ""
    return f"{'= ' if is_plain else ''}{value_text(output, program)}{times}"


def empty_text(body: Body, module: nn.Module) -> str:
    """Why there is no source, in words."""
    if body.is_torch:
        return "made of these operators:" if body.names else "an operator of the graph: there is nothing in it"
    if has_forward(module):
        return "its forward has no source in Python to read: it is compiled, generated, or from exec"
    names = [f"[{name}].ops" if name.isdigit() else f".{name}.ops" for name, _ in module.named_children()]
    return f"it has no forward; its modules have: {', '.join(names)}" if names else "it has no forward"


def operation_text(address: Address, facts: Mapping[str, str], window: str) -> Text:
    """One operation: its address, its facts in a column, and the lines around it."""
    width = max(map(len, facts))
    column = [f"  {name:<{width}}  {fact}" for name, fact in facts.items() if fact]
    return Text("\n".join([str(address), *column, *(["", window] if window else [])]))


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Text:
    """Rows in columns."""
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in table]
    return Text("\n".join(line.rstrip() for line in lines))
