"""A body's backward passes, written down: ``loss.backward()``, ``h.grad``, ``torch.autograd.grad``.

Nothing is computed. A gradient is a value of the body's graph, ``gradient(h, 0)``, whichever comes first, the question
or the pass. It is read, edited in place and replaced as any value is; what is there when the block ends goes on from
``h`` to what comes before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import fx

from fxsight.cell import Cell, Recording
from fxsight.context import here
from fxsight.custom_calls import Body, CustomCalls
from fxsight.errors import TraceError, WriteError
from fxsight.gradient import Backward, gradient
from fxsight.node import Origin
from fxsight.spec import TensorSpec
from fxsight.value import Value

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


class Pass:
    """What ``loss.backward()`` returns: ``with loss.backward():`` is a block in which ``.grad`` means this pass."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> Pass:
        self._gradients().inside.append(self.number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gradients().inside.pop()

    def _gradients(self) -> Gradients:
        traces = here().traces
        if not traces:
            raise TraceError("with loss.backward(): stands in a trace")
        found: Gradients = traces[-1].recorder.body.gradients
        return found


class Gradients:
    """All backward passes of one body."""

    def __init__(self, owner: Recording, body: Writer) -> None:
        self._owner, self._body = owner, body
        self._arrivals: dict[tuple[fx.Node, int], Arrival] = {}
        self._passes: list[Backward] = []
        self._full: list[int] = []  # the passes of ``backward()``: what ``.grad`` can mean
        self._marked: dict[fx.Node, None] = {}
        self.inside: list[int] = []
        self.enabled = True  # whether the block began with gradients enabled
        self.on_loss: Callable[[fx.Node], None] = lambda node: None
        self.unseen = ""  # the line of an edit in place that autograd does not see
        self.functions = CustomCalls(owner, body)

    # -- what a body says --------------------------------------------------------------------------------------------

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One of the calls that are about gradients; ``.grad`` and its assignment by the names "get" and "set"."""
        if name == "get":
            return self.of(args[0])
        if name == "set":
            return self.write(*args)
        if name == "backward":
            return self.backward(args[0], **kwargs)
        if name == "backward of several":
            return self.backward_of(*args, **kwargs)
        if name == "grad":
            return self.grad(*args, **kwargs)
        if name in ("requires_grad_", "requires_grad", "retain_grad"):
            return self._require(args[0], *args[1:], *kwargs.values())
        raise TraceError(
            f"{name} of a traced value is not recorded; write h.grad = f(h.grad), before or after backward()"
        )

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

    def backward(
        self,
        loss: Value,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> Pass:
        """One pass from a loss.

        inputs: tensors that get a ``.grad``; None for all that require gradients.

        Raises: RuntimeError as torch does, for a loss that is no scalar, and where gradients are disabled.
        """
        return self.backward_of([loss], [gradient], retain_graph, create_graph, inputs=inputs)

    def backward_of(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> Pass:
        """``torch.autograd.backward``: one pass from several losses.

        Raises: as ``backward``.
        """
        losses, given = _several(tensors), [] if inputs is None else _several(inputs)
        seeds = (None,) * len(losses) if grad_tensors is None else _several(grad_tensors)
        leaves = tuple(self._body.node_of(x).name for x in given if not isinstance(x, Value))
        begun, names = tuple(map(self._seed, losses, seeds)), tuple(map(self._loss, losses))
        retain = create_graph if retain_graph is None else retain_graph
        number = self._begin(Backward(names, begun, (), None if inputs is None else leaves, retain, create_graph))
        self._full.append(number)
        for key, arrival in list(self._arrivals.items()):
            if arrival.number == NEXT:
                arrival.number, arrival.arrives.args = number, (arrival.value, number)
                self._arrivals[key[0], number] = self._arrivals.pop(key)
        return Pass(number)

    def grad(
        self,
        outputs: Any,
        inputs: Any,
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        only_inputs: bool = True,
        allow_unused: bool | None = None,
        is_grads_batched: bool = False,
        materialize_grads: bool = False,
    ) -> tuple[Value, ...]:
        """``torch.autograd.grad``: a pass of its own, of which these gradients alone are computed.

        Raises: TraceError for batched gradients; RuntimeError as torch does.
        """
        if is_grads_batched:
            raise TraceError("torch.autograd.grad(is_grads_batched=True) is not recorded; call it once for each")
        losses, given = _several(outputs), _several(grad_outputs) if grad_outputs is not None else ()
        seeds = tuple(map(self._seed, losses, given or (None,) * len(losses)))
        retain = create_graph if retain_graph is None else retain_graph
        names = tuple(map(self._loss, losses))
        number = self._begin(
            Backward(names, seeds, (), (), retain, create_graph, "zeros" if materialize_grads else "refuse")
        )
        found = [self._of_input(x, number) for x in _several(inputs)]
        return tuple(found)

    def _of_input(self, value: Any, number: int) -> Value:
        if isinstance(value, Value) and value.cell.is_rows:
            self.inside.append(number)
            try:
                return self.of(value)
            finally:
                self.inside.pop()
        return self._value(self._arrival(value, number), _spec(value))

    def _require(self, value: Value, requires: bool = True) -> Value:
        """``requires_grad_()`` and the like: what is asked for is there without, but kernels depend on it."""
        if requires:
            self._check_float(value)
            self._marked[self._whole(value)] = None
        return value

    def requires(self, value: Value) -> bool:
        """Whether the body has said so."""
        return self._whole(value) in self._marked

    # -- in between --------------------------------------------------------------------------------------------------

    @property
    def _present(self) -> int:
        return self.inside[-1] if self.inside else max(self._full, default=NEXT)

    def _whole(self, value: Value) -> fx.Node:
        cell = value.cell
        return self._body.current(cell.base if cell.is_rows and cell.base is not None else cell)

    def _begin(self, asked: Backward) -> int:
        if not self.enabled:
            raise RuntimeError(
                "element 0 of tensors does not require grad and does not have a grad_fn: the block began under "
                "torch.no_grad() or torch.inference_mode()"
            )
        number = len(self._passes)
        self._passes.append(replace(asked, line=self._owner.line()))
        self._passes[number] = replace(self._passes[number], functions=self.functions.go_back(number, asked.create))
        return number

    def _loss(self, loss: Any) -> str:
        node = self._body.node_of(loss)
        self._body.seen.add(node)
        self.on_loss(node)
        return node.name

    def _seed(self, loss: Any, seed: Any) -> str | None:
        spec = _spec(loss)
        if seed is None:
            if any(d != 1 for d in spec.shape):
                raise RuntimeError("grad can be implicitly created only for scalar outputs")
            return None
        if _spec(seed).shape != spec.shape:
            raise RuntimeError(
                f"Mismatch in shape: grad_output[0] has a shape of {list(_spec(seed).shape)} and output[0] has a shape "
                f"of {list(spec.shape)}."
            )
        return self._body.node_of(seed).name

    def _arrival(self, value: Any, number: int) -> Arrival:
        self._check_float(value)
        if isinstance(value, Value) and not self._body.is_own(value):
            raise TraceError(f"{value.cell.what} is a value of another block: its gradient is asked for there")
        node = self._body.node_of(value)
        found = self._arrivals.get((node, number))
        if found is None:
            line = self._owner.line()
            arrives = self._body.graph.create_node("call_function", gradient, (node, number), {}, "user_grad")
            arrives.meta.update(spec=_spec(value), origin=Origin(user=line, made_by="body"))
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
        spec, given = value.cell.spec, _spec(new)
        if (spec.shape, spec.dtype, spec.device) != (given.shape, given.dtype, given.device):
            raise WriteError(f"the gradient of {value.cell.what} is {spec}, and what is written is {given}")

    def _check_float(self, value: Any) -> None:
        dtype = _spec(value).dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise RuntimeError("only Tensors of floating point dtype can require gradients")

    # -- the end -----------------------------------------------------------------------------------------------------

    @property
    def is_off(self) -> bool:
        """Whether a statement stands under ``torch.no_grad()``, in a block that does not."""
        return self.enabled and not torch.is_grad_enabled()

    @property
    def is_empty(self) -> bool:
        """Whether the body has said nothing of gradients."""
        return not (self._passes or self._arrivals)

    def passes(self) -> tuple[Backward, ...]:
        """The passes so far, with the edits of their gradients."""
        edits: dict[int, list[tuple[str, str]]] = {}
        for arrival in self._arrivals.values():
            if arrival.node is not arrival.arrives:
                edits.setdefault(arrival.number, []).append((arrival.arrives.name, arrival.node.name))
        return tuple(replace(asked, edits=tuple(edits.get(n, ()))) for n, asked in enumerate(self._passes))

    @property
    def marked(self) -> tuple[str, ...]:
        """Values that the body has made require gradients."""
        return tuple(node.name for node in self._marked)

    def finish(self) -> None:
        """The block has ended.

        Raises: TraceError for a gradient that no pass computes, and for an edit that none can see.
        """
        self.functions.finish()
        if self._passes and self.unseen:
            raise TraceError(
                f"{self.unseen}: this edit in place stands under torch.no_grad(), and the block has a backward pass, "
                "which would not see it; write it outside of torch.no_grad(), or assign a new value"
            )
        for arrival in self._arrivals.values():
            if arrival.number == NEXT:
                raise TraceError(
                    f"the gradient of {arrival.what} is asked for ({arrival.line}), and no loss.backward() follows in "
                    "this block"
                )

    def freeze(self) -> Callable[[], None]:
        """In a branch not taken: what is said from now on is forgotten.  Returns: forgets it."""
        kept = {key: (arrival, dict(vars(arrival))) for key, arrival in self._arrivals.items()}
        passes, full, marked = list(self._passes), list(self._full), dict(self._marked)
        forget_calls = self.functions.freeze()

        def forget() -> None:
            forget_calls()
            for arrival, was in kept.values():
                vars(arrival).update(was)
            self._arrivals = {key: arrival for key, (arrival, _) in kept.items()}
            self._passes, self._full, self._marked = passes, full, marked

        return forget


def _several(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return tuple(value.values())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _spec(value: Any) -> TensorSpec:
    if isinstance(value, Value):
        return value.cell.spec
    if not isinstance(value, torch.Tensor):
        raise TraceError(f"a gradient of a {type(value).__name__}: give a value or a tensor")
    return TensorSpec(value.dtype, tuple(value.shape), tuple(value.stride()), str(value.device))


def about_gradients(func: Any, name: str) -> str:
    """By which name ``Gradients.call`` knows a torch call; empty for all others.  name: of the function."""
    if name in ("__get__", "__set__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return _ATTRIBUTES.get((name, attribute), "")
    return _FUNCTIONS.get(func, "") if func in _FUNCTIONS else name if name in STATEMENTS else ""


STATEMENTS = frozenset(["backward", "requires_grad_", "retain_grad", "register_hook"])
_FUNCTIONS = {torch.autograd.grad: "grad", torch.autograd.backward: "backward of several"}
_ATTRIBUTES = {("__get__", "grad"): "get", ("__set__", "grad"): "set", ("__set__", "requires_grad"): "requires_grad"}
