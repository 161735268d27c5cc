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


@dataclass(frozen=True)
class Backward:
    """One backward pass of a body; its number is its place among them.

    losses, seeds: nodes of the body's graph, and the gradients that they begin with; None for ones.
    edits: nodes of gradients as they arrive, and of those that go on instead.
    leaves: placeholders whose tensors get a ``.grad``; None for all that require gradients.
    retain, create: as ``retain_graph`` and ``create_graph`` in torch.  unused: what a gradient without a path is:
    an error ("refuse") or zeros ("zeros").
    """

    losses: tuple[str, ...]
    seeds: tuple[str | None, ...]
    edits: tuple[tuple[str, str], ...] = ()
    leaves: tuple[str, ...] | None = None
    retain: bool = False
    create: bool = False
    unused: str = "refuse"
    line: str = ""

    def __str__(self) -> str:
        edits = ", ".join(f"{arrives} <- {new}" for arrives, new in self.edits)
        flags = f"retain={self.retain}, create={self.create}, unused={self.unused}"
        return f"backward {self.losses} seeds {self.seeds} for {self.leaves} {flags} {edits}".rstrip()


def gradient(value: Any, number: int, *losses: Any) -> NoReturn:
    """The gradient of the losses of a pass with respect to a value, as it arrives there."""
    raise RuntimeError(_WRITTEN_OUT)


def backward(
    number: int, losses: Any, seeds: Any, edits: Any, leaves: Any, flags: Any, learned: Any, marked: Any
) -> NoReturn:
    """One backward pass: see ``Backward``.

    learned: placeholders whose tensors require gradients.  marked: values that the body has made require them.
    """
    raise RuntimeError(_WRITTEN_OUT)


def accumulate(leaves: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """Add gradients to the ``.grad`` of tensors that require them; of one that was computed, to its leaves'."""
    torch.autograd.backward(list(leaves), list(gradients))


_WRITTEN_OUT = "a backward pass is written out as plain operators before a program runs"
FUNCTIONS: Mapping[str, Callable[..., Any]] = {"gradient": gradient, "backward": backward, "accumulate": accumulate}
