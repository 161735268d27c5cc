"""A body's backward passes, written down: ``loss.backward()``, ``h.grad``, ``torch.autograd.grad``.

Nothing is computed. A gradient is a value of the body's graph (``arrivals``); what is there when the block ends goes on
from ``h`` to what comes before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import fx

from fxsight.arrivals import NEXT, Arrivals, Writer, gradient_spec
from fxsight.cell import Recording
from fxsight.context import here
from fxsight.custom_calls import CustomCalls
from fxsight.errors import TraceError
from fxsight.gradient import Backward
from fxsight.value import Value


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


class Gradients(Arrivals):
    """All backward passes of one body."""

    def __init__(self, owner: Recording, body: Writer) -> None:
        super().__init__(owner, body)
        self._passes: list[Backward] = []
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
        spec = gradient_spec(loss)
        if seed is None:
            if any(d != 1 for d in spec.shape):
                raise RuntimeError("grad can be implicitly created only for scalar outputs")
            return None
        given = gradient_spec(seed).shape
        if given != spec.shape:
            raise RuntimeError(
                f"Mismatch in shape: grad_output[0] has a shape of {list(given)} and output[0] has a shape of "
                f"{list(spec.shape)}."
            )
        return self._body.node_of(seed).name

    # -- the end ----------------------------------------------------------------------------------------------------

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


def about_gradients(func: Any, name: str) -> str:
    """By which name ``Gradients.call`` knows a torch call; empty for all others.  name: of the function."""
    if name in ("__get__", "__set__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return _ATTRIBUTES.get((name, attribute), "")
    return _FUNCTIONS.get(func, "") if func in _FUNCTIONS else name if name in STATEMENTS else ""


STATEMENTS = frozenset(["backward", "requires_grad_", "retain_grad", "register_hook"])
_FUNCTIONS = {torch.autograd.grad: "grad", torch.autograd.backward: "backward of several"}
_ATTRIBUTES = {("__get__", "grad"): "get", ("__set__", "grad"): "set", ("__set__", "requires_grad"): "requires_grad"}
