"""Backward passes as data, and the functions that stand for them in a graph.

    loss.backward()
    g = h.grad
are written down as ``gradient(h, 0)``, which is a value like any other, and as one ``Backward``. ``JointGradient``
turns both into plain operators; only ``accumulate`` is left, where leaves that require gradients get theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fxsight.errors import TraceError


@dataclass(frozen=True)
class Backward:
    """One backward pass of a body; its number is its place among them.

    losses, seeds: nodes of the body's graph, and the gradients that they begin with; None for ones.
    edits: nodes of gradients as they arrive, and of those that go on instead.
    leaves: placeholders whose tensors get a ``.grad``; None for all that require gradients.
    retain, create: as ``retain_graph`` and ``create_graph`` in torch.  unused: what a gradient without a path is:
    an error ("refuse") or zeros ("zeros").
    functions: for each ``torch.autograd.Function`` of the body its node, the nodes of the gradients that arrive at its
    results, and of those that go on from its inputs (None for none), as its backward has written them down.
    """

    losses: tuple[str, ...]
    seeds: tuple[str | None, ...]
    edits: tuple[tuple[str, str], ...] = ()
    leaves: tuple[str, ...] | None = None
    retain: bool = False
    create: bool = False
    unused: str = "refuse"
    line: str = ""
    functions: tuple[tuple[str, tuple[str, ...], tuple[str | None, ...]], ...] = ()

    def __str__(self) -> str:
        edits = ", ".join(f"{arrives} <- {new}" for arrives, new in self.edits)
        flags = f"retain={self.retain}, create={self.create}, unused={self.unused}"
        own = "".join(f" {name}{arrives} <- {found}" for name, arrives, found in self.functions)
        return f"backward {self.losses} seeds {self.seeds} for {self.leaves} {flags} {edits}{own}".rstrip()


def gradient(value: Any, number: int, *losses: Any) -> NoReturn:
    """The gradient of the losses of a pass with respect to a value, as it arrives there."""
    raise RuntimeError(_WRITTEN_OUT)


def arrived(function: Any, index: int, number: int, *losses: Any) -> NoReturn:
    """The gradient that a pass brings to one result of a ``custom_function``; zeros where it brings none."""
    raise RuntimeError(_WRITTEN_OUT)


def custom_function(results: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What a ``torch.autograd.Function`` in a body has returned for the inputs that require gradients.

    How gradients go on from there is known to the backward passes of its body alone.
    """
    made: tuple[torch.Tensor, ...] = _Custom.apply(len(results), *results, *inputs)  # type: ignore[no-untyped-call]
    return made


class _Custom(torch.autograd.Function):
    """Refuses where a gradient comes in from outside of the body."""

    @staticmethod
    def forward(ctx: Any, count: int, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results, as tensors of their own."""
        return tuple(tensor.clone() for tensor in given[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        """Raises: TraceError."""
        raise TraceError(
            "a gradient would flow through a torch.autograd.Function that a body has called, from outside of its "
            "block: its backward is known inside alone; write loss.backward() in the block, or write the function with "
            "plain operators (x + (y - x).detach() has the value of y and the gradient of x)"
        )


def backward(
    number: int, losses: Any, seeds: Any, edits: Any, leaves: Any, flags: Any, learned: Any, marked: Any, functions: Any
) -> NoReturn:
    """One backward pass: see ``Backward``.

    learned: placeholders whose tensors require gradients.  marked: values that the body has made require them.
    """
    raise RuntimeError(_WRITTEN_OUT)


def accumulate(leaves: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """Add gradients to the ``.grad`` of tensors that require them; of one that was computed, to its leaves'."""
    torch.autograd.backward(list(leaves), list(gradients))


_WRITTEN_OUT = "a backward pass is written out as plain operators before a program runs"
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function for function in (gradient, backward, accumulate, arrived, custom_function)
}
