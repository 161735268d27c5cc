"""A ``torch.autograd.Function`` that a body calls: its own backward is written down, once for each backward pass.

``Function.apply`` is no torch function: the body sees the calls of its forward alone, under ``torch.no_grad()``. But
values require gradients as tensors do, so torch gives the results a history, as it does to tensors. At the next
statement the body finds it, and with it the inputs and the context of the function. From then on the results are those
of one ``custom_function``; a backward pass calls the function's backward on the gradients that arrive there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch.autograd.function import BackwardCFunction, once_differentiable

from fxsight import _torch
from fxsight.cell import Cell, Recording
from fxsight.errors import TraceError
from fxsight.gradient import arrived, custom_function
from fxsight.node import Origin
from fxsight.spec import TensorSpec
from fxsight.tree import flatten
from fxsight.value import Value

Written = tuple[str, tuple[str, ...], tuple[str | None, ...]]  # as in ``Backward.functions``


class Body(Protocol):
    """What is needed of the body that is written."""

    graph: fx.Graph
    seen: set[fx.Node]

    @property
    def given(self) -> Sequence[torch.Tensor]:
        """The plain tensors that it uses."""
        ...

    def node_of(self, value: Any) -> fx.Node:
        """The node of a value's or tensor's present state."""
        ...

    def is_own(self, leaf: Any) -> bool:
        """Whether it is a value of this body."""
        ...

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that computes something, written down."""
        ...


@dataclass(eq=False)
class CustomCall:
    """One call.

    context: what its backward is called with.  node: of its results.  results: their numbers among all that the
    function returns, and their specs.  kept: values that its backward has, and the versions of their memory.
    lost: why there is no gradient; empty when there is one.
    """

    context: Any
    node: fx.Node
    results: tuple[tuple[int, TensorSpec], ...]
    inputs: int
    kept: tuple[tuple[Cell, int], ...]
    line: str
    lost: str

    @property
    def name(self) -> str:
        """Of the function."""
        found: str = self.context._forward_cls.__qualname__
        return found


class CustomCalls:
    """All such calls of one body."""

    def __init__(self, owner: Recording, body: Body) -> None:
        self._owner, self._body = owner, body
        self._waiting: list[Value] = []  # made under ``torch.no_grad()``; some are results
        self._calls: list[CustomCall] = []
        self._results: list[Value] = []
        self._views: list[tuple[Cell, int, str]] = []  # the memory that a result was a view of
        self._is_busy = False

    # -- the call ----------------------------------------------------------------------------------------------------

    def see(self, value: Value) -> None:
        """A value made under ``torch.no_grad()``: a result of a function, perhaps."""
        self._waiting.append(value)

    def returned(self, value: Value) -> Value:
        """The result of a function that returns one of its inputs."""
        with torch.no_grad():
            made: Value = self._body.operation(torch.Tensor.view_as, (value, value), {})
        return made

    def adopt(self) -> None:
        """Find the calls since the last statement.

        Raises: TraceError for a function that does what a body cannot.
        """
        if not self._waiting or not torch.is_grad_enabled():
            return
        waiting, self._waiting = self._waiting, []
        found: dict[int, tuple[Any, dict[int, Value]]] = {}
        for value in waiting:
            context, number = _torch.history(value)
            if isinstance(context, BackwardCFunction):
                found.setdefault(id(context), (context, {}))[1][number] = value
        for context, results in found.values():
            self._adopt(context, results)

    def _adopt(self, context: Any, results: dict[int, Value]) -> None:
        self._results += results.values()
        inputs = [self._input(*edge) for edge in context.next_functions if edge[0] is not None]
        lost = "" if all(x is not None for x in inputs) else _LOST_INPUT
        given = (tuple(results.values()), tuple(x for x in inputs if x is not None))
        made = self._body.operation(custom_function, given, {})
        for value, new in zip(results.values(), made, strict=True):
            cell = value.cell
            if cell.base is not None and cell.root is not cell and not cell.root.is_still:
                self._views.append((cell.root, cell.root.version, self._owner.line()))
            cell.node, cell.spec, cell.base, cell.step = new.cell.node, new.cell.spec, None, None
            cell.version = cell.seen = 0
        node = made[0].cell.node.args[0]
        self._body.seen.add(node)
        shapes = tuple((number, value.cell.spec) for number, value in results.items())
        self._calls.append(
            CustomCall(context, node, shapes, len(inputs), tuple(_kept(context)), self._owner.line(), lost)
        )

    def _input(self, function: Any, number: int) -> Any:
        """The tensor that requires gradients behind an edge: a leaf, a result, or one that the forward has used."""
        if hasattr(function, "variable"):
            return function.variable
        return next((x for x in [*self._results, *self._body.given] if _torch.history(x) == (function, number)), None)

    def check_given(self, tensor: torch.Tensor, line: str) -> None:
        """A plain tensor is used by the body.

        Raises: TraceError for one that a function has made without a call on the value that it was given.
        """
        waiting = [] if isinstance(tensor, Value) or tensor.grad_fn is None else [tensor.grad_fn]
        seen: set[Any] = set()
        while waiting:
            function = waiting.pop()
            if isinstance(getattr(function, "variable", None), Value):
                raise TraceError(
                    f"{line}: this tensor comes from a torch.autograd.Function that was given a value of the model and "
                    "has computed its result without it: its gradient has no way; compute the result from the value"
                )
            before = [one for one, _ in function.next_functions if one is not None and one not in seen]
            seen.update(before)
            waiting += before

    # -- its backward ------------------------------------------------------------------------------------------------

    def go_back(self, number: int, create: bool) -> tuple[Written, ...]:
        """Write the backwards of all calls down for one pass.  create: whether their results are differentiated.

        Raises: TraceError, RuntimeError where a backward cannot be.
        """
        if self._is_busy:
            raise TraceError(
                "the backward of a torch.autograd.Function asks for gradients itself, which a body cannot do; write "
                "its formula (checkpointing is of no use in a body)"
            )
        self._is_busy = True
        try:
            with torch.enable_grad():
                return tuple(self._go_back(call, number, create) for call in reversed(self._calls))
        finally:
            self._is_busy = False

    def _go_back(self, call: CustomCall, number: int, create: bool) -> Written:
        self._check(call, create)
        numbers = [place for place, _ in call.results]
        nodes = [self._arrived(call, index, number) for index in range(len(numbers))]
        given = [self._zeros(x) for x in _torch.result_shapes(call.context)]
        for place, node in zip(numbers, nodes, strict=True):
            given[place] = self._value(call, node)
        found: Any = call.context.apply(*given)
        gradients = found if isinstance(found, tuple) else (found,)
        wanted = call.context.needs_input_grad
        if len(gradients) < len(wanted) or any(x is not None for x in gradients[len(wanted) :]):
            raise RuntimeError(
                f"function {call.name}Backward returned an incorrect number of gradients (expected {len(wanted)}, got "
                f"{len(gradients)})"
            )
        passed = [x for x, is_wanted in zip(gradients, wanted, strict=False) if is_wanted]
        names = tuple(None if x is None else self._body.node_of(x).name for x in passed)
        self.adopt()
        return call.node.name, tuple(node.name for node in nodes), names

    def _check(self, call: CustomCall, create: bool) -> None:
        if call.lost:
            raise TraceError(f"{call.line}: {call.name}: {call.lost}")
        if any(cell.root.version != version for cell, version in call.kept):
            raise RuntimeError(
                f"{call.line}: one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: {call.name} has kept it for its backward"
            )
        function: Any = call.context._forward_cls.backward
        if create and getattr(function, "__code__", None) is _ONCE:
            raise RuntimeError(
                f"{call.name}: trying to differentiate twice a function that was marked with @once_differentiable"
            )

    def _arrived(self, call: CustomCall, index: int, number: int) -> fx.Node:
        node = self._body.graph.create_node("call_function", arrived, (call.node, index, number), {}, "user_arrived")
        node.meta.update(spec=call.results[index][1], origin=Origin(user=self._owner.line(), made_by="body"))
        self._body.seen.add(node)
        return node

    def _value(self, call: CustomCall, node: fx.Node) -> Value:
        what = f"the gradient that arrives at {call.name}"
        return self._owner.value(Cell(self._owner, node.meta["spec"], node, what, self._owner.line()))

    def _zeros(self, shape: Any) -> torch.Tensor | None:
        return None if shape is None else torch.zeros(shape[0], dtype=shape[1], device=shape[2])

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The block has ended: nothing is kept by the contexts.

        Raises: TraceError for a result that was a view of what has been changed since.
        """
        self.adopt()
        for value in [*self._results, *self._waiting]:
            _torch.forget_history(value)
        self._calls, self._results, self._waiting = [], [], []
        _check_views(self._views)

    def freeze(self) -> Callable[[], None]:
        """In a branch not taken: calls from now on are forgotten.  Returns: forgets them."""
        calls, views = list(self._calls), list(self._views)

        def forget() -> None:
            self.adopt()
            self._calls, self._views = calls, views

        return forget


def _kept(context: Any) -> list[tuple[Cell, int]]:
    """The values that a backward has."""
    held = [*context.saved_tensors, *vars(context).values()]
    values = [x for leaf in held for x in flatten(leaf)[0] if isinstance(x, Value)]
    return [(value.cell, value.cell.root.version) for value in values]


def _check_views(views: Sequence[tuple[Cell, int, str]]) -> None:
    for root, version, line in views:
        if root.version != version:
            raise TraceError(
                f"{line}: a torch.autograd.Function has returned a view of {root.what}, which is changed in place "
                "later on; let it return a copy"
            )


_ONCE = once_differentiable(lambda *_: None).__code__
_LOST_INPUT = (
    "an input of this torch.autograd.Function is a tensor that was computed, and its forward uses it in no call with a "
    "value of the model: its gradient has no way; give a parameter, or compute the tensor in the forward"
)
