"""Browsing operations: ``model.transformer.h[0].attn.ops`` (= ``.source``).

``Operations`` are those of one body: of a module's forward, of a Python function it calls, or of a torch
call, whose operations are the operators it became. An ``Operation`` is one of them. Both hold an address and
nothing else, and look up what is known when they are asked: in the program of the open trace, else in the one
asked for last, else, while nothing has been captured, in the source alone.
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

from fxsight import _torch
from fxsight.address import Address
from fxsight.book import Call, Structure
from fxsight.errors import AddressError, InputError, NotExecuted, TraceError, UnknownAddress, nearest
from fxsight.node import origin_of
from fxsight.place import Place, Places, operator_name
from fxsight.program import Program
from fxsight.show import (
    NOTHING_CAPTURED,
    Look,
    Text,
    body_text,
    empty_text,
    node_of,
    operation_text,
    table_text,
    tensor_spec_of,
    value_text,
)
from fxsight.spec import Dim, TensorSpec, number, parse_dims, parse_tensor
from fxsight.targets import target_name
from fxsight.text import node_line

if TYPE_CHECKING:
    from fxsight.model import Model

_COLUMNS = ("name", "line", "target", "type")
WantedDim = Dim | str | EllipsisType | None


class Operations:
    """The operations of one body, by name: ``ops.self_c_proj_0``, ``ops["torch_tanh_0#2"]``, ``list(ops)``.

    Prints as the source with the operations beside their lines. ``iter``, ``len`` and ``dir`` are about those
    that ran; one that did not is printed, too, and says why it did not when it is asked for.
    """

    __slots__ = ("_look", "address")

    def __init__(self, look: Look, address: Address) -> None:
        self._look, self.address = look, address

    @staticmethod
    def of_module(root: Model, address: Address) -> Operations:
        """Those of the forward of a module."""
        return Operations(Look(root), address)

    # -- one by one ------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: str | int) -> Operation:
        if isinstance(key, int):
            return list(self)[key]
        end = Address.parse(f"/{key}")
        if end.port:
            raise AddressError(f"ops[{key!r}]: name the operation alone, and read ops[...].{end.port}")
        address = replace(self.address, steps=(*self.address.steps, *end.steps))
        if self._look.captured is not None:
            self._look.find(address)
        else:
            self._check_source(address)
        return Operation(self._look, address)

    def _check_source(self, address: Address) -> None:
        """While nothing has been captured, the source says which names there are."""
        known, name = self._names(), address.steps[0].name
        if len(address.steps) > 1 or name not in known:
            hint = nearest(name, known)
            raise UnknownAddress(f"no operation '{address}'; {hint}\n  {NOTHING_CAPTURED}".replace("; \n", "\n"))

    def _names(self) -> tuple[str, ...]:
        return self._look.body(self.address).names

    def __iter__(self) -> Iterator[Operation]:
        return iter([Operation(self._look, self.address.step(name)) for name in self._names()])

    def __len__(self) -> int:
        return len(self._names())

    def __contains__(self, name: str | Operation) -> bool:
        if isinstance(name, Operation):
            return any(name == op for op in self)
        try:
            self[name]
        except (AddressError, NotExecuted):
            return False
        return True

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._names()})

    # -- many ------------------------------------------------------------------------------------------------

    def find(
        self,
        *,
        name: str | None = None,
        target: str | Callable[..., Any] | None = None,
        shape: str | Sequence[WantedDim] | None = None,
        module_class: str | type[nn.Module] | None = None,
        recursive: bool = True,
    ) -> list[Operation]:
        """The operations of this body, and of all below it, for which all that is asked for holds.

        name: pattern of the operation's name, ``"self_c_*"``.
        target: what is called: a function, a class, an operator (``torch.ops.aten.tanh.default``), or a pattern
        of its name (``"tanh"``, ``"aten.view.*"``).
        shape: of the output where that is one tensor: ``("batch", "length", 64)``; None stands for any size,
        ``...`` for any sizes. With the dtype, as text: ``"f32[batch, length, 64]"``.
        module_class: of the module that is called, or a class it inherits from; its name will do.
        recursive: False for this body alone.

        Raises: TypeError without any criterion, or for one that is none of these; TraceError before a capture.
        """
        query = _Query.of(name, target, shape, module_class)
        calls, program = self._calls(recursive)
        made = _operators_made(program)
        found = [c for c in calls if query.matches(c, self._look, program, made)]
        parents = [program.book.calls[c.parent or 0] for c in found]
        steps = [program.book.address(p).step(c.name, c.n) for p, c in zip(parents, found, strict=True)]
        return [Operation(self._look, address) for address in steps]

    def _calls(self, recursive: bool) -> tuple[list[Call], Program]:
        """The calls in this body; for a module without a forward (``ModuleList``), those of its modules."""
        body = self._look.body(self.address)
        program = body.program or self._look.places(Address("")).program
        book, path = program.book, f"{self.address.module}."
        if body.call is not None:
            below = list(book.within(body.call))[1:]
            return below if recursive else list(book.children(body.call)), program
        if self.address.steps:
            return [], program
        parts = [c for c in book.modules.values() if c.module.startswith(path)]
        top = [c for c in parts if not book.calls[c.parent or 0].module.startswith(path)]
        if not top:
            self._look.find(self.address)  # says that the module is not called
        return [c for t in top for c in (book.within(t) if recursive else (t,))], program

    # -- text ------------------------------------------------------------------------------------------------

    def show(self, operators: bool = False) -> Text:
        """The source with the operations beside their lines: name, type of the output, or ``not executed``.

        operators: with infix operators and subscripts that have a value, too.
        """
        body = self._look.body(self.address)
        text = body_text(body, self.address, operators)
        if body.source is not None:
            return text
        reason = empty_text(body, self._look.module(self.address.module))
        return Text("\n".join([text, reason, *([self.table()] if body.names else [])]))

    def table(self) -> Text:
        """The operations: name, line, what is called, type of the output."""
        if self._look.captured is None:
            return table_text(_COLUMNS, [(name, "", "", "") for name in self._names()])
        return table_text(_COLUMNS, [(op.name, op.line, op.target, op.type) for op in self])

    def __str__(self) -> str:
        return self.show()

    def __repr__(self) -> str:
        return self.show()


class _Port:
    """A value of an operation: read and written inside a trace, like that of a module."""

    def __init__(self, name: str, doc: str) -> None:
        self._name, self.__doc__ = name, doc

    def __get__(self, op: Operation | None, owner: type[Operation]) -> Any:
        if op is None:
            return self
        trace = self._open(op)
        return trace.read(op.address, self._name)

    def __set__(self, op: Operation, value: Any) -> None:
        trace = self._open(op)
        trace.write(op.address, self._name, value)

    def _open(self, op: Operation) -> Any:
        trace = op.look.trace
        if trace is None:
            raise TraceError(f"{op.address}:{self._name} has a value only inside a trace: with model.trace(...):")
        return trace


class Operation:
    """One operation: a call or an operator of a body, at one of its executions.

    Inside a trace ``.output``, ``.input`` and ``.inputs`` are read and written as those of a module. All else is
    there outside, too.
    """

    __slots__ = ("address", "look")

    output = _Port("output", "What the operation returns: a value, or a structure of values.")
    input = _Port("input", "Its first argument.")
    inputs = _Port("inputs", "All arguments: ``(args, kwargs)``.")

    def __init__(self, look: Look, address: Address) -> None:
        self.look, self.address = look, address

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name in the source around it, ``self_c_proj_0``; later executions end in ``#1``, ``#2``."""
        return str(self.address.steps[-1])

    @property
    def target(self) -> str:
        """What is called: the name of a torch function, Python function, module class, or operator."""
        call = self._place.call
        return operator_name(self._node) if call is None else call.title

    @property
    def title(self) -> str:
        """The same in words: ``module Conv1D at transformer.h.0.attn.c_proj``."""
        place = self._place
        kind = "operator" if place.call is None else f"{place.call.kind}"
        return f"{kind} {self.target}{f' at {place.address}' if kind == 'module' else ''}"

    @property
    def line(self) -> str:
        """Where it is called: ``file:line``."""
        call = self._place.call or self._maker
        return origin_of(self._node).line if call is None else call.line

    @property
    def type(self) -> str:
        """Dtype and shape of the output, for all inputs: ``(f32[batch, length, 64], None)``."""
        return value_text(self._place.output, self._program)

    @property
    def shape(self) -> tuple[Dim, ...] | None:
        """Shape of the output, in numbers inside a trace; None if it is not one tensor."""
        spec = self._spec
        return None if spec is None else tuple(_number(dim, self.look.sizes) for dim in spec.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the output; None if it is not one tensor."""
        spec = self._spec
        return None if spec is None else spec.dtype

    @property
    def count(self) -> int:
        """How many times it runs in one call of the body around it."""
        call, book = self._place.call, self._program.book
        if call is None or call.parent is None:
            return 1
        return sum(other.name == call.name for other in book.children(book.calls[call.parent]))

    # -- around it -------------------------------------------------------------------------------------------

    def call(self, n: int) -> Operation:
        """The same operation, its execution number ``n`` (0 is the first)."""
        around = Operations(self.look, self.address.parent)
        return around[str(replace(self.address.steps[-1], n=n))]

    @property
    def ops(self) -> Operations:
        """The operations in it: of a module or function, those of its source; of a torch call, operators."""
        place = self._place
        is_module = place.call is not None and place.call.kind == "module"
        return Operations(self.look, place.address if is_module else self.address)

    @property
    def source(self) -> Operations:
        """The same as ``ops``."""
        return self.ops

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and (self.look, self.address) == (other.look, other.address)

    def __hash__(self) -> int:
        return hash(self.address)

    def __repr__(self) -> str:
        return f"<{self.address}: {NOTHING_CAPTURED if self.look.captured is None else self.type}>"

    def __str__(self) -> str:
        if self.look.captured is None:
            return operation_text(self.address, {"output": NOTHING_CAPTURED}, self._window())
        args, kwargs = (value_text(part, self._program) for part in _parts(self._place))
        facts = {
            "calls": self.title,
            "line": self.line,
            "inputs": args if kwargs == "{}" else f"{args} {kwargs}",
            "output": self.type,
            "runs": f"{self.count} times" if self.count > 1 else "",
            **self._parts_of_it(),
        }
        return operation_text(self.address, facts, self._window())

    def _parts_of_it(self) -> Mapping[str, str]:
        """What it opens to; of a torch call, what it became, since opening one takes a second."""
        place = self._place
        if place.call is None:
            return {}
        if place.call.kind == "torch" and place.call.body is None:
            return {"operators": ", ".join(self._places.node_places(place.call))}
        return {"opens to": ", ".join(op.name for op in self.ops)}

    def _window(self) -> str:
        """The lines around it; of an operator, its line of the program."""
        around, name = self.address.parent, self.address.steps[-1].name
        source = self.look.body(around).source
        if source is not None and source.find(name) is not None:
            path = f"model.{around}" if str(around) else "model"
            return source.render_site(path.replace("/", "."), name)
        return "" if self._place.call is not None else node_line(self._node)

    @property
    def _place(self) -> Place:
        return self._places.find(self.address)

    @property
    def _places(self) -> Places:
        return self.look.places(self.address)

    @property
    def _program(self) -> Program:
        return self._places.program

    @property
    def _maker(self) -> Call | None:
        """The torch call that an operator comes from."""
        number, calls = origin_of(self._node).call, self._program.book.calls
        return calls[number] if number >= 0 and calls[number].kind == "torch" else None

    @property
    def _spec(self) -> TensorSpec | None:
        return tensor_spec_of(self._place.output, self._program)

    @property
    def _node(self) -> fx.Node:
        """The node of an operator."""
        return node_of(self._place, self._program)


def _parts(place: Place) -> Iterator[Structure]:
    """Positional and keyword arguments."""
    at = 0
    for tree in place.inputs.tree.children:
        yield Structure(tree, place.inputs.leaves[at : at + tree.size])
        at += tree.size


def _number(dim: Dim, sizes: Mapping[str, int]) -> Dim:
    """A dimension as a number, where the sizes tell it."""
    try:
        return number(dim, sizes)
    except InputError:
        return dim


# -- finding -------------------------------------------------------------------------------------------------


def _operators_made(program: Program) -> Mapping[int, list[str]]:
    """Names of the operators that each call made itself, by its number in the book."""
    made: dict[int, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            made.setdefault(origin_of(node).call, []).append(operator_name(node))
    return made


@dataclass(frozen=True)
class _Query:
    """What is asked of operations, as in ``Operations.find``; what is None is not asked.

    target: pattern for the name of what is called, or of an operator it made.
    """

    name: str | None
    target: str | None
    dtype: torch.dtype | None
    dims: tuple[Dim | EllipsisType | None, ...] | None
    module_class: str | type[nn.Module] | None

    @staticmethod
    def of(name: Any, target: Any, shape: Any, module_class: Any) -> _Query:
        """What a user asks for.

        Raises: TypeError, saying what is meant.
        """
        if name is None and target is None and shape is None and module_class is None:
            raise TypeError("find what? Give at least one of name=, target=, shape=, module_class=")
        if not isinstance(name, str | None):
            raise TypeError(f"name={name!r}: give a pattern of names, such as 'self_c_*'")
        is_class = isinstance(module_class, type) and issubclass(module_class, nn.Module)
        if not is_class and not isinstance(module_class, str | None):
            raise TypeError(f"module_class={module_class!r}: give a class of modules, or its name")
        dtype, dims = (None, None) if shape is None else _wanted_shape(shape)
        return _Query(name, _wanted_target(target), dtype, dims, module_class)

    def matches(self, call: Call, look: Look, program: Program, made: Mapping[int, list[str]]) -> bool:
        """Whether all that is asked holds for a call."""
        operators = made.get(call.id, []) if call.kind == "torch" else []
        labels = [call.title, call.title.strip("_"), *operators]
        spec = tensor_spec_of(call.output, program)
        return (
            (self.name is None or fnmatch.fnmatchcase(call.name, self.name))
            and (self.target is None or bool(fnmatch.filter(labels, self.target)))
            and (self.dtype is None or (spec is not None and spec.dtype == self.dtype))
            and (self.dims is None or (spec is not None and _fits(self.dims, spec.shape, look.sizes)))
            and (self.module_class is None or self._is_of_class(call, look))
        )

    def _is_of_class(self, call: Call, look: Look) -> bool:
        classes = type(look.module(call.module)).__mro__ if call.kind == "module" else ()
        return any(self.module_class in (cls, cls.__name__) for cls in classes)


def _wanted_target(target: Any) -> str | None:
    """A pattern for the names that calls of ``target`` have."""
    if target is None or isinstance(target, str):
        return target
    if isinstance(target, _torch.OpOverload):
        return target_name(target)
    name = getattr(target, "__name__", None)
    if not callable(target) or not isinstance(name, str):
        raise TypeError(f"target={target!r}: give a function, class or operator, or a pattern such as 'tanh'")
    return name.strip("_")


def _wanted_shape(shape: Any) -> tuple[torch.dtype | None, tuple[Dim | EllipsisType | None, ...]]:
    """Dtype, if it is given, and dimensions."""
    try:
        return parse_tensor(shape) if isinstance(shape, str) else (None, tuple(map(_wanted_dim, shape)))
    except (SyntaxError, TypeError, ValueError):  # TextError is a ValueError
        example = "('batch', None, 64) or 'f32[batch, length, 64]'"
        raise TypeError(f"shape={shape!r}: give sizes, such as {example}") from None


def _wanted_dim(dim: Any) -> Dim | EllipsisType | None:
    if isinstance(dim, str):
        (parsed,) = parse_dims(dim)
        return parsed
    if dim is None or dim is ... or isinstance(dim, int | sympy.Expr):
        return dim
    raise TypeError


def _fits(wanted: Sequence[Dim | EllipsisType | None], shape: Sequence[Dim], sizes: Mapping[str, int]) -> bool:
    """Whether a shape is the wanted one."""
    gap = next((i for i, w in enumerate(wanted) if w is ...), None)
    if gap is not None:
        more = len(shape) - len(wanted) + 1
        wanted = (*wanted[:gap], *[None] * max(more, 0), *wanted[gap + 1 :])
    if len(wanted) != len(shape):
        return False
    return all(w is None or w in (h, _number(h, sizes)) for w, h in zip(wanted, shape, strict=True))
