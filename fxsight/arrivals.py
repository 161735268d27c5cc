"""The gradients of a body's values: ``h.grad`` is a value of its graph, ``gradient(h, 0)``, read, edited and replaced.

It is there before the pass that computes it: what is asked for before any ``backward()`` is of the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from fxsight.cell import Cell, Recording
from fxsight.custom_calls import Body
from fxsight.errors import TraceError, WriteError
from fxsight.gradient import gradient
from fxsight.node import Origin
from fxsight.spec import TensorSpec
from fxsight.value import Value, given_spec

NEXT = -1  # the pass that is not there yet


class Writer(Body, Protocol):
    """What is needed of the body that is written."""

    def current(self, cell: Cell) -> fx.Node:
        """The node of a cell's present value."""
        ...

    def remember(self, cell: Cell) -> None:
        """In a branch not taken: keep what the cell was."""
        ...


@dataclass(eq=False)
class Arrival:
    """The gradient of one value in one pass.

    arrives: its node as it arrives.  node: as the body has it now.  version: how often it was edited.
    """

    value: fx.Node
    number: int
    arrives: fx.Node
    node: fx.Node
    what: str
    line: str
    version: int = 0

    def edited(self, node: fx.Node, line: str) -> None:
        """Another gradient goes on from here."""
        self.node, self.line = node, line
        self.version += 1


class Arrivals:
    """The gradients of one body, by value and pass."""

    def __init__(self, owner: Recording, body: Writer) -> None:
        self._owner, self._body = owner, body
        self._arrivals: dict[tuple[fx.Node, int], Arrival] = {}
        self._full: list[int] = []  # the passes of ``backward()``: what ``.grad`` can mean
        self._marked: dict[fx.Node, None] = {}
        self.inside: list[int] = []

    def of(self, value: Value) -> Value:
        """The gradient of a value: of the pass whose block is open, else of the last; before any, of the next.

        Raises: RuntimeError for integers; TraceError for a value of another block.
        """
        cell = value.cell
        if cell.is_rows and cell.base is not None and cell.step is not None:  # the model has the whole batch
            whole = self.of(self._owner.value(cell.base))
            rows: Value = self._owner.call(torch.Tensor.narrow, (whole, *cell.step[1][1:]), {})
            rows.cell.is_rows = True
            return rows
        arrival = self._arrival(value, self._present)
        return self._value(arrival, cell.spec)

    def write(self, value: Value, new: Any) -> None:
        """Another gradient goes on from a value.

        Raises: WriteError where shape, dtype or device differ; TraceError for None.
        """
        cell = value.cell
        if cell.is_rows and cell.base is not None and cell.step is not None:
            _, dim, start, count = cell.step[1]
            self._check(value, new)
            whole = self._owner.value(cell.base)
            return self.write(
                whole, self._owner.call(torch.slice_scatter, (self.of(whole), new, dim, start, start + count), {})
            )
        self._check(value, new)
        arrival, node = self._arrival(value, self._present), self._body.node_of(new)
        if node is not arrival.node:
            arrival.edited(node, self._owner.line())
            if isinstance(new, Value) and self._body.is_own(new) and new.cell.base is None:
                self._body.remember(new.cell)
                new.cell.handles.append((arrival, arrival.version))

    def _of_input(self, value: Any, number: int) -> Value:
        if isinstance(value, Value) and value.cell.is_rows:
            self.inside.append(number)
            try:
                return self.of(value)
            finally:
                self.inside.pop()
        return self._value(self._arrival(value, number), gradient_spec(value))

    def _require(self, value: Value, requires: bool = True) -> Value:
        """``requires_grad_()`` and the like: what is asked for is there without, but kernels depend on it."""
        if requires:
            self._check_float(value)
            self._marked[self._whole(value)] = None
        return value

    def requires(self, value: Value) -> bool:
        """Whether the body has said so."""
        return self._whole(value) in self._marked

    @property
    def _present(self) -> int:
        return self.inside[-1] if self.inside else max(self._full, default=NEXT)

    def _whole(self, value: Value) -> fx.Node:
        cell = value.cell
        return self._body.current(cell.base if cell.is_rows and cell.base is not None else cell)

    def _arrival(self, value: Any, number: int) -> Arrival:
        self._check_float(value)
        if isinstance(value, Value) and not self._body.is_own(value):
            raise TraceError(f"{value.cell.what} is a value of another block: its gradient is asked for there")
        node = self._body.node_of(value)
        found = self._arrivals.get((node, number))
        if found is None:
            line = self._owner.line()
            arrives = self._body.graph.create_node("call_function", gradient, (node, number), {}, "user_grad")
            arrives.meta.update(spec=gradient_spec(value), origin=Origin(user=line, made_by="body"))
            self._body.seen |= {node, arrives}
            what = str(value.cell.what) if isinstance(value, Value) else "a tensor of yours"
            found = self._arrivals[node, number] = Arrival(node, number, arrives, arrives, what, line)
        return found

    def _value(self, arrival: Arrival, spec: TensorSpec) -> Value:
        what = f"the gradient of {arrival.what}"
        return self._owner.value(
            Cell(self._owner, spec, arrival.node, what, self._owner.line(), handles=[(arrival, arrival.version)])
        )

    def _check(self, value: Value, new: Any) -> None:
        if not isinstance(new, torch.Tensor):
            raise WriteError(
                f"the gradient of {value.cell.what} is {value.cell.spec}, and what is written is a "
                f"{type(new).__name__}; write h.grad[:] = ... for a number"
            )
        spec, given = value.cell.spec, gradient_spec(new)
        if (spec.shape, spec.dtype, spec.device) != (given.shape, given.dtype, given.device):
            raise WriteError(f"the gradient of {value.cell.what} is {spec}, and what is written is {given}")

    def _check_float(self, value: Any) -> None:
        dtype = gradient_spec(value).dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise RuntimeError("only Tensors of floating point dtype can require gradients")


def gradient_spec(value: Any) -> TensorSpec:
    """What the gradient of a value or tensor is.

    Raises: TraceError for what is none.
    """
    if not isinstance(value, torch.Tensor):
        raise TraceError(f"a gradient of a {type(value).__name__}: give a value or a tensor")
    return given_spec(value)
