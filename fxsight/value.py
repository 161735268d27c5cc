"""``Value``: what a body holds instead of a tensor: it knows shape and dtype, and every torch call on it is recorded.

After the block a saved value *is* a plain ``torch.Tensor``, for every variable that holds it; one that was not saved
says so when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from fxsight import _torch
from fxsight.cell import Cell, Recording, check_usable, not_saved
from fxsight.containers import savable
from fxsight.context import here
from fxsight.errors import NeedsValueError, TraceError
from fxsight.spec import TensorSpec
from fxsight.tree import flatten

NUMBERS = frozenset(  # calls that need numbers
    (
        *("item", "tolist", "numpy", "cpu_numpy", "__array__", "is_nonzero", "equal", "allclose", "__contains__"),
        *("__bool__", "__int__", "__float__", "__index__", "__complex__"),
        *("__repr__", "__str__", "__format__", "__reduce_ex__", "__deepcopy__"),
    )
)


class Walking(Protocol):
    """What a value needs of the walk that made it (``walk``)."""

    @property
    def live(self) -> bool:
        """Whether statements go through it."""
        ...

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One torch call."""
        ...

    def save(self, value: Any) -> None:
        """Keep the values of a structure."""
        ...

    def save_one(self, value: Value) -> None:
        """Keep one value of this body."""
        ...

    def leave(self) -> None:
        """What follows is recorded and not remembered."""
        ...

    def cell_of(self, index: int) -> Cell:
        """The cell of one of its values."""
        ...


class Value(torch.Tensor):
    """A tensor of the model, or made from one, inside a body. Never made by users.

    ``.save()`` keeps it: after the block it is a plain tensor of the same shape, dtype and device.
    """

    known_cell: Cell | None = None
    walk: Walking | None = None  # what remembers its statement
    number: int = -1  # its number in the walk

    @staticmethod
    def of(cell: Cell) -> Value:
        """The value with the node and shape of ``cell``."""
        made = Value.shaped(*shaped(cell.spec))
        made.known_cell = cell
        return made

    @staticmethod
    def shaped(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Value:
        """A value of which nothing else is known yet: a walk makes its cell when it is needed."""
        requires_grad = (
            dtype.is_floating_point or dtype.is_complex
        ) and torch.is_grad_enabled()  # see ``custom_calls``
        return torch.Tensor._make_wrapper_subclass(
            Value, shape, strides=stride, dtype=dtype, device=device, requires_grad=requires_grad
        )

    @property
    def cell(self) -> Cell:
        """What stands behind it."""
        if self.known_cell is None and self.walk is not None:
            self.known_cell = self.walk.cell_of(self.number)
        assert self.known_cell is not None
        return self.known_cell

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_first = bool(args) and type(args[0]) is Value
        first = args[0] if is_first else next((x for x in args if type(x) is Value), None)
        if first is not None and first.walk is not None and first.walk.live:
            return first.walk.call(func, args, kwargs)
        values = list(values_in((args, kwargs)))
        walk = next((v.walk for v in values if v.walk is not None and v.walk.live), None)
        if walk is not None:
            return walk.call(func, args, kwargs)
        owner = _owner(values)
        if owner is not None:
            return owner.call(func, args, kwargs)
        if _is_known(func):
            return func(*(x.cell.fake if isinstance(x, Value) else x for x in args), **kwargs)
        return _between(func, values, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Value:  # type: ignore[override]
        """What autograd does below torch's functions to the results of a ``torch.autograd.Function``."""
        if func in _OF_AUTOGRAD and type(args[0]) is Value:
            leave_walks(args[:1])
            cell = args[0].cell
            return cell.recorder.returned(cell, func is torch.ops.aten.detach.default)
        raise TraceError(
            f"{func} was reached without being recorded: torch.vmap and the other transforms of torch.func do not see "
            "through values of a trace; write it without them, or as fxsight.apply(torch.vmap(f), value)"
        )

    def save(self) -> Value:
        """Keep the value: after the block this object is a plain tensor.  Returns: itself."""
        if self.walk is not None and self.walk.live:
            self.walk.save_one(self)
        else:
            keep(self)
        return self

    def stop(self) -> None:
        """End the forward here: what is computed later than this value has no value in this trace."""
        check_usable(self.cell)
        leave_walks([self])
        self.cell.recorder.stop(self.cell)

    @property
    def value(self) -> Value:
        """The value itself; after the block, the tensor."""
        if self.walk is None or not self.walk.live:
            check_usable(self.cell)
        return self


def shaped(spec: TensorSpec) -> tuple[Sequence[int], Sequence[int], torch.dtype, torch.device]:
    """What a value of this spec is made from."""
    return spec.numbers, spec.steps, spec.dtype, torch.device(spec.device)


def given_spec(leaf: torch.Tensor) -> TensorSpec:
    """What a value or tensor is; to look at a value's ``shape`` would fix the program's sizes."""
    return leaf.cell.spec if isinstance(leaf, Value) else TensorSpec.of(leaf)


def keep(value: Any) -> None:
    """Mark the values of a structure as saved, each with its own block.

    Raises: NotSavedError for a value of a block that has ended.
    """
    values = [value] if type(value) is Value else list(values_in(value))
    walks = {id(v.walk): v.walk for v in values if v.walk is not None and v.walk.live}
    if len(walks) == 1 and all(v.walk is not None and v.walk.live for v in values):
        return next(iter(walks.values())).save(value)
    for leaf in values:
        check_usable(leaf.cell)
    leave_walks(values)
    for recorder in {id(leaf.cell.recorder): leaf.cell.recorder for leaf in values}.values():
        recorder.keep(value)


def leave_walks(values: Iterable[Value]) -> None:
    """From here on the bodies of these values are recorded, not remembered."""
    for value in values:
        if value.walk is not None and value.walk.live:
            value.walk.leave()


def _owner(values: list[Value]) -> Recording | None:
    """Who records a call on these values: the open block among them, or the one open now; None to compute at once.

    Raises: NotSavedError, TraceError for values of two open blocks.
    """
    owners = {id(v.cell.recorder): v.cell.recorder for v in values if v.cell.recorder.is_open}
    for value in values:
        check_usable(value.cell)
    if len(owners) > 1 and one_series(owners.values()):
        return max(owners.values(), key=lambda owner: owner.series[1] if owner.series is not None else 0)
    if len(owners) > 1:
        raise TraceError(
            f"values of two traces in one call: {', '.join(str(v.cell.what) for v in values)}; "
            "save the first and use it after its block"
        )
    if owners:
        return next(iter(owners.values()))
    traces = here().traces
    return traces[-1].recorder if traces else None


def one_series(owners: Iterable[Recording]) -> bool:
    """Whether blocks are steps of one generation; then the latest records what is done with values of several."""
    series = [owner.series for owner in owners]
    return all(s is not None and series[0] is not None and s[0] is series[0][0] for s in series)


def _is_known(func: Any) -> bool:
    """Whether the call asks for what is known without numbers: shape, dtype, ..."""
    name = getattr(func, "__name__", "")
    asked = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
    return asked in _KNOWN


_OF_AUTOGRAD = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.view.default)
_KNOWN = frozenset(
    ["shape", "dtype", "device", "ndim", "layout", "size", "dim", "numel", "stride", "nelement", "__len__"]
)


def _between(func: Any, values: list[Value], args: Any, kwargs: Any) -> Any:
    """A call on values of ended blocks, outside the traces of their session: now, or when the loop around runs.

    Raises: NotSavedError, NeedsValueError.
    """
    session = here().session
    if session is not None and session.is_written_down:
        if getattr(func, "__name__", "") in NUMBERS:
            raise NeedsValueError(
                f"{values[0].cell.what} in a block of `with session.iter(...)` or `session.cond(...)` has a number "
                "only when the block runs; write `for item in session.iter(...):`"
            )
        return session.later(func, args, kwargs)
    for value in values:
        value.cell.recorder.force()  # now they are plain tensors
    for value in values:
        kind: type = type(value)
        if kind is Value:  # it has not become a tensor
            raise not_saved(value.cell)
    return func(*args, **kwargs)


def values_in(value: Any) -> Sequence[Value]:
    """The values among the leaves of an argument structure, slices included."""
    found: list[Value] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Value]) -> None:
    cls = type(value)
    if cls is tuple or cls is list:
        for member in value:
            _collect(member, found)
    elif isinstance(value, Value):
        found.append(value)
    elif cls is slice:
        _collect((value.start, value.stop, value.step), found)
    elif cls not in _PLAIN:
        for leaf in flatten(value)[0]:
            if isinstance(leaf, (Value, slice)):
                _collect(leaf, found)


_PLAIN = frozenset((bool, int, float, str, type(None), torch.Tensor))


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
        keep(tuple(self))
        return self


def apply_now(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function on the numbers of values; without values, simply call it."""
    values = list(values_in((args, dict(kwargs))))
    leave_walks(values)
    owner = _owner(values) if values else None
    if owner is not None:
        return owner.apply(function, args, kwargs)
    result = _between(function, values, args, dict(kwargs)) if values else function(*args, **kwargs)
    return savable(result)
