"""What stands behind one value of a body: its spec, its node, what it is a view of, and the recorder that made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from fxsight.errors import NotSavedError
from fxsight.mutate import ViewStep
from fxsight.spec import TensorSpec

if TYPE_CHECKING:
    from fxsight.value import Value


class Recording(Protocol):
    """What a value needs of the recorder that made it."""

    line: Callable[[], str]
    """The user's line of the statement that is written down."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One torch call on values."""
        ...

    def apply(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Any function on the numbers of values, now."""
        ...

    def value(self, cell: Cell) -> Value:
        """The value of a cell."""
        ...

    def returned(self, cell: Cell, is_kept: bool) -> Value:
        """A value that autograd makes of one: kept for a backward, else a result that is an input."""
        ...

    def keep(self, value: Any) -> None:
        """Mark a structured value as saved."""
        ...

    def fake(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data, in memory of its own."""
        ...

    def stop(self, cell: Cell) -> None:
        """The forward ends where this value is there."""
        ...

    def force(self) -> None:
        """Run the ended block, which waits for the end of its session: its values become tensors."""
        ...

    def why_unset(self, cell: Cell) -> str:
        """Why a value has no number though it was saved; empty when it was not saved."""
        ...

    @property
    def series(self) -> tuple[object, int] | None:
        """The generation that the block is a step of, and which; None for a block of its own."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether the block is still being written."""
        ...

    @property
    def is_waiting(self) -> bool:
        """Whether the block has ended and runs with its session."""
        ...


@dataclass(eq=False)
class Cell:
    """What stands behind one ``Value``.

    spec: dtype, shape, strides and device, in numbers.  fake: the same as a tensor without data, made when a torch call
    needs it.  node: the value in the intervention's graph.  what, line: for messages.
    base, step: of a view, what it is a view of and how.  version: how often the memory was changed in place, at the
    base; ``seen`` the version that ``node`` belongs to.  handles: locations that an in-place change of it edits.
    """

    recorder: Recording
    spec: TensorSpec
    node: fx.Node
    what: object
    line: str
    base: Cell | None = None
    step: ViewStep | None = None
    version: int = 0
    seen: int = 0
    handles: list[Any] = field(default_factory=list[Any])
    is_still: bool = False  # made under ``torch.no_grad()``: no gradient flows through it
    is_rows: bool = False  # the rows of an invoke, of a value that the model has for the whole batch
    known_fake: torch.Tensor | None = None  # in memory of its own: what shares memory is said by ``base``

    @property
    def fake(self) -> torch.Tensor:
        """The value as a tensor without data."""
        if self.known_fake is None:
            self.known_fake = self.recorder.fake(self.spec)
        return self.known_fake

    @property
    def root(self) -> Cell:
        """The base of the views, or itself."""
        return self if self.base is None else self.base.root


class Ended:
    """Stands for the recorder of a block that has ended."""

    is_open = is_waiting = False
    series = None

    def why_unset(self, cell: Cell) -> str:
        """Nothing is known but that it was not saved."""
        return ""


def check_usable(cell: Cell) -> None:
    """A value is of an open block, or of one that waits for the end of its session, and was not in a branch not taken.

    Raises: NotSavedError.
    """
    if not (cell.recorder.is_open or cell.recorder.is_waiting) or cell.recorder.why_unset(cell):
        raise not_saved(cell)


def not_saved(cell: Cell) -> NotSavedError:
    """The error for a value used after its block."""
    why = cell.recorder.why_unset(cell) or "was not saved: write .save() where it is made"
    return NotSavedError(
        f"Accessing value before it's been set. {cell.what} ({_kind(cell.spec)}), made at {cell.line}, {why}"
    )


def _kind(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')}{list(spec.shape)}"
