"""Browsing operations: ``model.transformer.h[0].attn.ops`` (= ``.source``).

``Operations`` are those of one body: of a module's forward, of a Python function it calls, or of a torch
call, whose operations are the operators it became. An ``Operation`` is one of them. Both hold an address and
nothing else, and look up what is known when they are asked: in the program of the open trace, else in the one
asked for last, else, while nothing has been captured, in the source alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxsight.address import Address
from fxsight.conditions import Selector
from fxsight.errors import AddressError, NotExecuted, TraceError, UnknownAddress, nearest
from fxsight.facts import Facts
from fxsight.look import NOTHING_CAPTURED, Look, in_words
from fxsight.query import Query, WantedDim
from fxsight.show import body_text, empty_text, operation_text, table_text
from fxsight.spec import Dim
from fxsight.text import Text

if TYPE_CHECKING:
    from fxsight.model import Model

_COLUMNS = ("name", "line", "target", "type")


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
            return self._number(key)
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"ops[{key!r}]: give a name or a number; for several, list(ops)[...] or ops.find(...)")
        end = Address.parse(f"/{key}")
        if end.port:
            raise AddressError(f"ops[{key!r}]: name the operation alone, and read ops[...].{end.port}")
        address = replace(self.address, steps=(*self.address.steps, *end.steps))
        if self._look.captured is not None:
            self._look.find(address)
        else:
            self._check_source(address)
        return Operation(self._look, address)

    def _number(self, number: int) -> Operation:
        names = self._names()
        if not -len(names) <= number < len(names):
            has = f"{len(names)} operations, 0 to {len(names) - 1}" if names else "no operations"
            raise IndexError(f"{in_words(self.address)} has {has}; there is no {number}")
        return Operation(self._look, self.address.step(names[number]))

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
        selector: Selector | str | None = None,
        *,
        name: str | None = None,
        target: str | Callable[..., Any] | None = None,
        shape: str | Sequence[WantedDim] | None = None,
        module_class: str | type[nn.Module] | None = None,
        recursive: bool = True,
    ) -> list[Operation]:
        """The operations of this body, and of all below it, for which all that is asked for holds.

        selector: ``"op:relu and layer:0-3"``, or the same in Python: see ``selectors``.
        name: pattern of the operation's name, ``"self_c_*"``.
        target: what is called: a function, a class, an operator (``torch.ops.aten.tanh.default``), or a pattern
        of its name (``"tanh"``, ``"aten.view.*"``).
        shape: of the output where that is one tensor: ``("batch", "length", 64)``; None stands for any size,
        ``...`` for any sizes. With the dtype, as text: ``"f32[batch, length, 64]"``.
        module_class: of the module that is called, or a class it inherits from; its name will do.
        recursive: False for this body alone.

        Raises: TypeError without any criterion, or for one that is none of these; TraceError before a capture;
        SelectionError for a selector that cannot be read, or that selects nothing.
        """
        found = Query.of(selector, name, target, shape, module_class).answers(self._look, self.address, recursive)
        return [Operation(self._look, address) for address in found]

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
        return self._facts.target

    @property
    def title(self) -> str:
        """The same in words: ``module Conv1D at transformer.h.0.attn.c_proj``."""
        return self._facts.title

    @property
    def line(self) -> str:
        """Where it is called: ``file:line``."""
        return self._facts.line

    @property
    def type(self) -> str:
        """Dtype and shape of the output, for all inputs: ``(f32[batch, length, 64], None)``."""
        return self._facts.type

    @property
    def shape(self) -> tuple[Dim, ...] | None:
        """Shape of the output, in numbers inside a trace; None if it is not one tensor."""
        spec = self._facts.spec
        return None if spec is None else tuple(self.look.number(dim) for dim in spec.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the output; None if it is not one tensor."""
        spec = self._facts.spec
        return None if spec is None else spec.dtype

    @property
    def count(self) -> int:
        """How many times it runs in one call of the body around it."""
        return self._facts.count

    # -- around it -------------------------------------------------------------------------------------------

    def call(self, n: int) -> Operation:
        """The same operation, its execution number ``n`` (0 is the first)."""
        around = Operations(self.look, self.address.parent)
        return around[str(replace(self.address.steps[-1], n=n))]

    @property
    def ops(self) -> Operations:
        """The operations in it: of a module or function, those of its source; of a torch call, operators."""
        place = self._facts.place
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
        return operation_text(self.look, self.address)

    @property
    def _facts(self) -> Facts:
        return Facts.of(self.look, self.address)
