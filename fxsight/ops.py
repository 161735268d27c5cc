"""Browsing operations: ``model.transformer.h[0].attn.ops`` (= ``.source``).

``Operations`` are those of one body: of a module's forward, of a Python function it calls, or of a torch call, whose
operations are the operators it became. An ``Operation`` is one of them. Both hold an address and nothing else, and look
up what is known when they are asked: in the program of the open trace, else in the one asked for last, else, while
nothing has been captured, in the source alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx, nn

from fxsight import _torch, show
from fxsight.address import Address
from fxsight.book import Call, Ref, Structure
from fxsight.errors import AddressError, InputError, NotExecuted, TextError, TraceError, UnknownAddress, nearest
from fxsight.node import origin_of
from fxsight.place import Place, Places
from fxsight.program import Program
from fxsight.provenance import Libraries
from fxsight.source import Source
from fxsight.spec import Dim, TensorSpec, number, parse_dims, parse_tensor
from fxsight.targets import target_name
from fxsight.text import node_line

if TYPE_CHECKING:
    from fxsight.model import Model

NOTHING_CAPTURED = "nothing has been captured yet: model.capture(*inputs), or a trace, tells what runs, and with which shapes"
AnyDim = Dim | str | EllipsisType | None


@dataclass(frozen=True)
class _Look:
    """What is known of a model at the moment of asking."""

    root: Model

    @property
    def trace(self) -> Any:
        """The open trace, or None."""
        return self.root._captures.open

    @property
    def captured(self) -> Places | None:
        """The places of the program that is browsed; None while nothing has been captured."""
        captures, trace = self.root._captures, self.trace
        program: Program | None = captures.latest if trace is None else trace._captured
        return None if program is None else Places(program, captures.reader)

    @property
    def sizes(self) -> Mapping[str, int]:
        """The named sizes of the open trace; none outside."""
        return {} if self.trace is None else self.trace._sizes

    def places(self, address: Address) -> Places:
        """As ``captured``.

        Raises: TraceError while nothing has been captured.
        """
        places = self.captured
        if places is None:
            raise TraceError(f"{address}: {NOTHING_CAPTURED}")
        return places

    def find(self, address: Address) -> Place:
        """The place of an address.

        Raises: UnknownAddress, NotExecuted; TraceError while nothing has been captured.
        """
        found: Place = self.places(address).find(address) if self.trace is None else self.trace.place(address)
        return found

    def module(self, path: str) -> nn.Module:
        """A module of the model."""
        module: nn.Module = self.root._module.get_submodule(path)
        return module

    def forward(self, path: str) -> Source | None:
        """The source of a module's forward, whether it has run or not; None without one in Python."""
        forward = self.module(path).forward
        is_missing = getattr(forward, "__func__", None) is nn.Module.forward
        source: Source | None = None if is_missing else self.root._captures.reader.of_function(forward)
        return source


@dataclass(frozen=True)
class _Body:
    """What is known of one body.

    names: of its operations, in the order of the source.  calls: by name, in the order of execution.
    operators: of a torch call, what it became.  note: why nothing is known of values here.
    """

    title: str
    source: Source | None
    names: tuple[str, ...]
    calls: Mapping[str, Sequence[Call]]
    ran: tuple[str, ...] = ()
    operators: Mapping[str, Place] | None = None
    note: str = ""


class Operations:
    """The operations of one body, by name: ``ops.self_c_proj_0``, ``ops["torch_tanh_0#2"]``, ``list(ops)``.

    Prints as the source with the operations beside their lines. Iteration, ``len`` and ``dir`` are about those that
    ran; those that did not are printed, and refuse to be had, with the reason.
    """

    __slots__ = ("_look", "address")

    def __init__(self, look: _Look, address: Address) -> None:
        self._look, self.address = look, address

    @staticmethod
    def of_module(root: Model, address: Address) -> Operations:
        """Those of the forward of a module."""
        return Operations(_Look(root), address)

    # -- one by one --------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: str | int) -> Operation:
        if isinstance(key, int):
            return list(self)[key]
        end = Address.parse(f"/{key}")
        if end.port:
            raise AddressError(f"ops[{key!r}]: an operation is meant here, not a value of it; write ops[...].{end.port}")
        address = replace(self.address, steps=(*self.address.steps, *end.steps))
        if self._look.captured is None:
            self._check_name(address)
        else:
            self._look.find(address)
        return Operation(self._look, address)

    def _check_name(self, address: Address) -> None:
        """While nothing has been captured, the source says which names there are."""
        known, name = self._body().names, address.steps[-1].name
        if name not in known or len(address.steps) > 1:
            hint = nearest(name, known)
            raise UnknownAddress(f"no operation {name!r} in {_shown(self.address)}{'; ' * bool(hint)}{hint}\n  {NOTHING_CAPTURED}")

    def __iter__(self) -> Iterator[Operation]:
        return iter([Operation(self._look, self.address.step(name)) for name in self._body().names])

    def __len__(self) -> int:
        return len(self._body().names)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and isinstance(self[name], Operation)
        except (AddressError, NotExecuted):
            return False

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._body().names})

    def _body(self) -> _Body:
        places = self._look.captured
        if places is None:
            return self._unknown_body(NOTHING_CAPTURED)
        try:
            place = self._look.find(self.address)
        except NotExecuted as error:
            if self.address.steps:
                raise
            return self._unknown_body(str(error))
        call = place.call
        if call is None:
            return _Body(_target(place, places.program), None, (), {}, operators={})
        if call.kind == "torch":
            operators = places.node_places(call)
            return _Body(call.title, None, tuple(operators), {}, operators=operators)
        return _body(call, places)

    def _unknown_body(self, reason: str) -> _Body:
        """That of a module which has not run."""
        title, source = type(self._look.module(self.address.module)).__name__, self._look.forward(self.address.module)
        names = source.names("call") if source is not None and self._look.captured is None else ()
        return _Body(title, source, names, {}, note=reason)

    # -- many --------------------------------------------------------------------------------------------------------

    def find(
        self,
        *,
        name: str | None = None,
        target: str | Callable[..., Any] | None = None,
        shape: str | Sequence[AnyDim] | None = None,
        module_class: str | type[nn.Module] | None = None,
        recursive: bool = True,
    ) -> list[Operation]:
        """The operations of this body, and of all below it, of which all that is asked for is true.

        name: pattern of the operation's name, ``"self_c_*"``.
        target: what is called: a function, a class, an operator (``torch.ops.aten.tanh.default``), or a pattern of its
        name (``"tanh"``, ``"aten.view.*"``).
        shape: of the output where it is one tensor: ``("batch", "length", 64)``; None stands for any size and ``...``
        for any sizes. With the dtype as text: ``"f32[batch, length, 64]"``.
        module_class: of the module that is called, or a class it inherits from; its name will do.
        recursive: False for this body alone.

        Raises: TypeError for a criterion that is none of these, and without any; TraceError before a capture.
        """
        query = _Query.of(name, target, shape, module_class)
        places = self._look.places(self.address)
        book, made = places.program.book, _operators_made(places.program)
        found = [c for c in self._calls(places, recursive) if query.matches(c, self._look, places.program, made)]
        return [Operation(self._look, book.address(book.calls[c.parent]).step(c.name, c.n)) for c in found if c.parent is not None]

    def _calls(self, places: Places, recursive: bool) -> list[Call]:
        """The calls in this body; of a module without a forward (``ModuleList``), those of its children."""
        book, path = places.program.book, f"{self.address.module}."
        try:
            call = self._look.find(self.address).call
        except NotExecuted:
            parts = [c for c in book.modules.values() if c.module.startswith(path)]
            if self.address.steps or not parts:
                raise
            top = [c for c in parts if c.parent is None or not book.calls[c.parent].module.startswith(path)]
            return [below for c in top for below in (book.within(c) if recursive else [c])]
        if call is None:
            return []
        return list(book.within(call))[1:] if recursive else list(book.children(call))

    # -- text --------------------------------------------------------------------------------------------------------

    def show(self, operators: bool = False) -> show.Text:
        """The source with the operations beside their lines: name, type of the output, or ``not executed``.

        operators: with infix operators and subscripts that have a value, too.
        """
        body, places = self._body(), self._look.captured
        header = "  ".join(filter(None, (body.title, _shown(self.address), _file(body.source), body.note)))
        if body.source is None:
            return show.Text("\n".join([header, self._reason(body), str(self.table()) if body.names else ""]).rstrip())
        if places is None or body.note:
            return show.source_text(header, body.source, {}, False, ())
        sites = {site.name: site for site in body.source.sites}
        notes = {name: show.site_note(s, body.calls.get(name, ()), body.ran, places.program) for name, s in sites.items()}
        rest = [f"{name}    # {show.note_text(c, places.program)}" for name, c in body.calls.items() if name not in sites]
        lines = ["", "called by what the source uses, without a line of its own:", *rest] if rest else []
        return show.source_text(header, body.source, {k: v for k, v in notes.items() if v}, operators, lines)

    def _reason(self, body: _Body) -> str:
        """Why there is no source to show."""
        if body.operators is not None:
            return "the operators of this call:" if body.operators else "an operator: there is nothing in it to open"
        module = self._look.module(self.address.module)
        if getattr(module.forward, "__func__", None) is not nn.Module.forward:
            return "it has no source in Python to read (compiled, generated or run by exec)"
        names = [f".{name}" if not name.isdigit() else f"[{name}]" for name, _ in module.named_children()]
        return f"it has no forward; its modules have: {', '.join(f'{name}.ops' for name in names) or 'but there are none'}"

    def table(self) -> show.Text:
        """The operations that ran: name, line, type of the output, what is called."""
        if self._look.captured is None:
            return show.table_text(("name", "line", "type", "target"), [(name, "", "", "") for name in self._body().names])
        return show.table_text(("name", "line", "type", "target"), [(op.name, op.line, op.type, op.target) for op in self])

    def __str__(self) -> str:
        return self.show()

    def __repr__(self) -> str:
        return self.show()


class Operation:
    """One operation: a call or operator of a forward, at one of its executions.

    Inside a trace ``.output``, ``.input`` (first argument) and ``.inputs`` (``(args, kwargs)``) are read and written as
    those of a module. Everything else is there without a trace, too.
    """

    __slots__ = ("_look", "address")

    def __init__(self, look: _Look, address: Address) -> None:
        self._look, self.address = look, address

    # -- values ------------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """What the operation returns."""
        return self._read("output")

    @output.setter
    def output(self, value: Any) -> None:
        self._write("output", value)

    @property
    def input(self) -> Any:
        """Its first argument."""
        return self._read("input")

    @input.setter
    def input(self, value: Any) -> None:
        self._write("input", value)

    @property
    def inputs(self) -> Any:
        """All arguments: ``(args, kwargs)``."""
        return self._read("inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._write("inputs", value)

    def _read(self, port: str) -> Any:
        trace = self._open(port)
        return trace.read(trace.place(self.address), port)

    def _write(self, port: str, value: Any) -> None:
        trace = self._open(port)
        trace.write(trace.place(self.address), port, value)

    def _open(self, port: str) -> Any:
        trace = self._look.trace
        if trace is None:
            raise TraceError(f"{self.address}:{port} has a value only inside a trace: with model.trace(...):")
        return trace

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name in the source it belongs to, ``self_c_proj_0``; later executions end in ``#1``, ``#2``."""
        return str(self.address.steps[-1])

    @property
    def target(self) -> str:
        """What is called: name of the torch function, the Python function, the module's class, or the operator."""
        return _target(self._place, self._program)

    @property
    def title(self) -> str:
        """The same in words: ``module Conv1D at transformer.h.0.attn.c_proj``."""
        call = self._place.call
        if call is None:
            return f"operator {self.target}"
        return f"module {call.title} at {_shown(self._place.address)}" if call.kind == "module" else f"{call.kind} {call.title}"

    @property
    def line(self) -> str:
        """Where it is called: ``file:line``."""
        call = self._place.call
        return origin_of(_node(self._place, self._program)).line if call is None else call.line

    @property
    def type(self) -> str:
        """Dtype and shape of the output, for every size of the inputs: ``(f32[batch, length, 64], None)``."""
        return show.value_text(self._place.output, self._program)

    @property
    def shape(self) -> tuple[Dim, ...] | None:
        """Shape of the output, in numbers inside a trace; None if it is not one tensor."""
        spec = self._spec
        return None if spec is None else tuple(_number(dim, self._look.sizes) for dim in spec.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the output; None if it is not one tensor."""
        return None if self._spec is None else self._spec.dtype

    @property
    def _spec(self) -> TensorSpec | None:
        return show.tensor_spec_of(self._place.output, self._program)

    @property
    def _place(self) -> Place:
        return self._look.find(self.address)

    @property
    def _program(self) -> Program:
        return self._look.places(self.address).program

    # -- around it ---------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many times it runs in one forward."""
        call, book = self._place.call, self._program.book
        if call is None or call.parent is None:
            return 1
        return sum(other.name == call.name for other in book.children(book.calls[call.parent]))

    def call(self, n: int) -> Operation:
        """The same operation, its execution number ``n`` (0 is the first)."""
        steps = (*self.address.steps[:-1], replace(self.address.steps[-1], n=n))
        return Operations(self._look, replace(self.address, steps=()))["/".join(map(str, steps))]

    @property
    def ops(self) -> Operations:
        """The operations in it: of a module or function, those of its source; of a torch call, its operators."""
        place = self._place
        is_module = place.call is not None and place.call.kind == "module"
        return Operations(self._look, place.address if is_module else self.address)

    @property
    def source(self) -> Operations:
        """The same as ``ops``."""
        return self.ops

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and (self._look.root, self.address) == (other._look.root, other.address)

    def __hash__(self) -> int:
        return hash(self.address)

    def __repr__(self) -> str:
        return f"<{self.address}: {NOTHING_CAPTURED if self._look.captured is None else self.type}>"

    def __str__(self) -> str:
        if self._look.captured is None:
            return show.operation_text(str(self.address), {"": NOTHING_CAPTURED}, self._window())
        opens = ", ".join(self.ops._body().names)
        facts = {"calls": self.title, "line": self.line, "inputs": self._inputs(), "output": self.type, "opens to": opens}
        return show.operation_text(str(self.address), facts, self._window())

    def _inputs(self) -> str:
        args, kwargs = (show.value_text(s, self._program) for s in _parts(self._place))
        return args if kwargs == "{}" else f"{args} {kwargs}"

    def _window(self) -> str:
        """The lines around it; of an operator, its line of the program."""
        source, name = Operations(self._look, self.address.parent)._body().source, self.address.steps[-1].name
        if source is not None and source.find(name) is not None:
            return source.render_site(".".join(filter(None, ("model", str(self.address.parent).replace("/", ".")))), name)
        return node_line(_node(self._place, self._program)) if self._place.call is None else ""


def _body(call: Call, places: Places) -> _Body:
    """That of a module or function that has run."""
    source, calls = places.source(call), dict[str, list[Call]]()
    for child in places.program.book.children(call):
        calls.setdefault(child.name, []).append(child)
    order = {name: number for number, name in enumerate(source.names())} if source is not None else {}
    names = tuple(sorted(calls, key=lambda name: order.get(name, len(order))))
    return _Body(call.title, source, names, calls, call.ran)


def _shown(address: Address) -> str:
    return str(address) or "the root module"


def _file(source: Source | None) -> str:
    return f"{Libraries().short(source.file)}:{source.first_line}" if source is not None else ""


def _node(place: Place, program: Program) -> fx.Node:
    """The node of a place that is an operator of the graph."""
    leaf = place.output.leaves[0]
    assert isinstance(leaf, Ref), "an operator's output is a node"
    return program.nodes[leaf.node]


def _target(place: Place, program: Program) -> str:
    return target_name(_node(place, program).target) if place.call is None else place.call.title


def _parts(place: Place) -> Iterator[Structure]:
    """Positional and keyword arguments."""
    number = 0
    for tree in place.inputs.tree.children:
        yield Structure(tree, place.inputs.leaves[number : number + tree.size])
        number += tree.size


def _number(dim: Dim, sizes: Mapping[str, int]) -> Dim:
    """A dimension as a number where the sizes tell it."""
    try:
        return number(dim, sizes)
    except InputError:
        return dim


# -- finding -------------------------------------------------------------------------------------------------------


def _operators_made(program: Program) -> Mapping[int, list[str]]:
    """Names of the operators that each call made itself, by its number in the book."""
    made: dict[int, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            made.setdefault(origin_of(node).call, []).append(target_name(node.target))
    return made


@dataclass(frozen=True)
class _Query:
    """What is asked of operations; what is None is not asked.

    target: pattern of the name of what is called, or of an operator it made.  dims: see ``Operations.find``.
    """

    name: str | None
    target: str | None
    dtype: torch.dtype | None
    dims: tuple[Dim | EllipsisType | None, ...] | None
    module_class: str | type[nn.Module] | None

    @staticmethod
    def of(name: Any, target: Any, shape: Any, module_class: Any) -> _Query:
        """Read what a user asks for.

        Raises: TypeError, saying what is meant.
        """
        if name is target is shape is module_class is None:
            raise TypeError("find() of what? give at least one of name=, target=, shape=, module_class=")
        if not isinstance(name, str | None):
            raise TypeError(f"name={name!r}: a pattern of names is meant, such as 'self_c_*'")
        is_class = isinstance(module_class, type) and issubclass(module_class, nn.Module)
        if not is_class and not isinstance(module_class, str | None):
            raise TypeError(f"module_class={module_class!r}: a class of modules or its name is meant, such as nn.Linear")
        dtype, dims = (None, None) if shape is None else _wanted_shape(shape)
        return _Query(name, _wanted_target(target), dtype, dims, module_class)

    def matches(self, call: Call, look: _Look, program: Program, made: Mapping[int, list[str]]) -> bool:
        """Whether all that is asked for is true of a call."""
        labels = (call.title, call.title.strip("_"), *made.get(call.id, ()) if call.kind == "torch" else ())
        spec = show.tensor_spec_of(call.output, program)
        return (
            (self.name is None or fnmatch.fnmatchcase(call.name, self.name))
            and (self.target is None or any(fnmatch.fnmatchcase(label, self.target) for label in labels))
            and (self.dtype is None or (spec is not None and spec.dtype == self.dtype))
            and (self.dims is None or (spec is not None and _fits(self.dims, spec.shape, look.sizes)))
            and (self.module_class is None or self._is_of_class(call, look))
        )

    def _is_of_class(self, call: Call, look: _Look) -> bool:
        if call.kind != "module":
            return False
        classes = type(look.module(call.module)).__mro__
        return any(self.module_class in (cls, cls.__name__) for cls in classes)


def _wanted_target(target: Any) -> str | None:
    """A pattern of the names that a call of ``target`` has."""
    if target is None or isinstance(target, str):
        return target
    if isinstance(target, _torch.OpOverload):
        return target_name(target)
    name = getattr(target, "__name__", None)
    if not callable(target) or not isinstance(name, str):
        raise TypeError(f"target={target!r}: a function, a class, an operator or a pattern of their names is meant, such as 'tanh'")
    return name.strip("_")


def _wanted_shape(shape: Any) -> tuple[torch.dtype | None, tuple[Dim | EllipsisType | None, ...]]:
    """Dtype, if it is given, and dimensions."""
    try:
        if isinstance(shape, str):
            return parse_tensor(shape)
        if isinstance(shape, tuple | list):
            return None, tuple(_wanted_dim(dim) for dim in shape)
    except (TextError, SyntaxError, ValueError) as error:
        cause = f" ({error})"
    else:
        cause = ""
    raise TypeError(f"shape={shape!r}: sizes are meant, such as ('batch', None, 64), or 'f32[batch, length, 64]'{cause}")


def _wanted_dim(dim: Any) -> Dim | EllipsisType | None:
    if isinstance(dim, str):
        (parsed,) = parse_dims(dim)
        return parsed
    if dim is None or dim is ... or isinstance(dim, int | sympy.Expr):
        return dim
    raise ValueError(f"{dim!r} is not a size")


def _fits(wanted: Sequence[Dim | EllipsisType | None], shape: Sequence[Dim], sizes: Mapping[str, int]) -> bool:
    """Whether a shape is the one that is wanted."""
    if any(w is ... for w in wanted):
        at = next(i for i, w in enumerate(wanted) if w is ...)
        head, tail = wanted[:at], wanted[at + 1 :]
        if len(shape) < len(head) + len(tail):
            return False
        wanted, shape = (*head, *tail), (*shape[: len(head)], *shape[len(shape) - len(tail) :])
    pairs = zip(wanted, shape, strict=False)
    return len(wanted) == len(shape) and all(w is None or w in (have, _number(have, sizes)) for w, have in pairs)
