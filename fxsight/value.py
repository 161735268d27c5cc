"""``Value``: what a body holds instead of a tensor: it knows shape and dtype, and every torch call on it is recorded.

After the block a saved value *is* a plain ``torch.Tensor``, for every variable that holds it; one that was not saved
says so when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import fx

from fxsight import _torch
from fxsight.errors import NotSavedError, TraceError
from fxsight.mutate import ViewStep
from fxsight.spec import TensorSpec
from fxsight.tree import flatten


class Recording(Protocol):
    """What a value needs of the recorder that made it."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One torch call on values."""
        ...

    def keep(self, value: Any) -> None:
        """Mark a structured value as saved."""
        ...

    def fake(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data, in memory of its own."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether the block is still being written."""
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


class Value(torch.Tensor):
    """A tensor of the model, or made from one, inside a body. Never made by users.

    ``.save()`` keeps it: after the block it is a plain tensor of the same shape, dtype and device.
    """

    cell: Cell

    @staticmethod
    def of(cell: Cell) -> Value:
        """The value with the node and shape of ``cell``."""
        spec = cell.spec
        made: Value = torch.Tensor._make_wrapper_subclass(
            Value, spec.numbers, strides=spec.steps, dtype=spec.dtype, device=torch.device(spec.device)
        )
        made.cell = cell
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = list(values_in((args, kwargs)))
        for value in values:
            if not value.cell.recorder.is_open:
                raise not_saved(value.cell)
        if len({id(value.cell.recorder) for value in values}) > 1:
            raise TraceError(
                f"values of two traces in one call: {', '.join(str(v.cell.what) for v in values)}; "
                "save the first and use it after its block"
            )
        return values[0].cell.recorder.call(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        raise TraceError(f"{func} was reached without being recorded; call torch functions on values of a trace")

    def save(self) -> Value:
        """Keep the value: after the block this object is a plain tensor.  Returns: itself."""
        if not self.cell.recorder.is_open:
            raise not_saved(self.cell)
        self.cell.recorder.keep(self)
        return self

    @property
    def value(self) -> Value:
        """The value itself; after the block, the tensor."""
        if not self.cell.recorder.is_open:
            raise not_saved(self.cell)
        return self


def not_saved(cell: Cell) -> NotSavedError:
    """The error for a value used after its block."""
    return NotSavedError(
        f"Accessing value before it's been set. {cell.what} ({_kind(cell.spec)}), made at {cell.line}, was not saved: "
        "write .save() where it is made"
    )


def _kind(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')}{list(spec.shape)}"


def values_in(value: Any) -> Iterator[Value]:
    """The values among the leaves of an argument structure, slices included."""
    for leaf in flatten(value)[0]:
        if isinstance(leaf, Value):
            yield leaf
        elif isinstance(leaf, slice):
            yield from values_in((leaf.start, leaf.stop, leaf.step))


def fake_mode() -> Any:
    """A mode in which tensors are shapes."""
    return _torch.FakeMode(allow_non_fake_inputs=False)


class Members(tuple[Any, ...]):
    """A tuple of a location, in a body: assigning a member edits it (``attn.output[0] = t``)."""

    writer: Any

    def __setitem__(self, key: int, value: Any) -> None:
        self.writer(range(len(self))[key], value)

    def save(self) -> Members:
        """Keep all members.  Returns: itself; after the block, of plain tensors."""
        first = next(values_in(tuple(self)), None)
        if first is not None:
            first.cell.recorder.keep(tuple(self))
        return self
