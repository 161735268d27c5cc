"""``Item``: an element of a recorded loop, or what was made of it; known when the loop runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from fxsight.errors import NeedsValueError
from fxsight.tree import map_leaves

Elements = Mapping[object, Any]  # loop → its present element


class Item:
    """A value of which the body of ``with session.iter(...) as item`` knows only how it will be computed.

    compute: from the present elements of the loops around.
    """

    def __init__(self, compute: Callable[[Elements], Any]) -> None:
        self.compute = compute

    def _with(self, function: Callable[..., Any], *others: Any) -> Item:
        return Item(lambda now: function(self.compute(now), *(evaluate(other, now) for other in others)))

    def __getitem__(self, key: Any) -> Item:
        return self._with(operator.getitem, key)

    def __eq__(self, other: object) -> Any:
        return self._with(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._with(operator.ne, other)

    def __lt__(self, other: Any) -> Item:
        return self._with(operator.lt, other)

    def __le__(self, other: Any) -> Item:
        return self._with(operator.le, other)

    def __gt__(self, other: Any) -> Item:
        return self._with(operator.gt, other)

    def __ge__(self, other: Any) -> Item:
        return self._with(operator.ge, other)

    def __add__(self, other: Any) -> Item:
        return self._with(operator.add, other)

    def __radd__(self, other: Any) -> Item:
        return self._with(lambda mine, yours: yours + mine, other)

    def __sub__(self, other: Any) -> Item:
        return self._with(operator.sub, other)

    def __mul__(self, other: Any) -> Item:
        return self._with(operator.mul, other)

    def __rmul__(self, other: Any) -> Item:
        return self._with(lambda mine, yours: yours * mine, other)

    def __floordiv__(self, other: Any) -> Item:
        return self._with(operator.floordiv, other)

    def __mod__(self, other: Any) -> Item:
        return self._with(operator.mod, other)

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise NeedsValueError(_UNKNOWN)

    def _unknown(self) -> NoReturn:
        raise NeedsValueError(_UNKNOWN)

    def save(self) -> NoReturn:
        """Raises: NeedsValueError: what is made of items is there in no block."""
        self._unknown()

    def __bool__(self) -> bool:
        self._unknown()

    def __int__(self) -> int:
        self._unknown()

    def __index__(self) -> int:
        self._unknown()

    def __float__(self) -> float:
        self._unknown()

    def __iter__(self) -> Any:
        self._unknown()

    def __len__(self) -> int:
        self._unknown()


def check_none(leaf: Any) -> None:
    """Raises: NeedsValueError for an item among the arguments of a torch call."""
    if isinstance(leaf, Item):
        raise NeedsValueError(_UNKNOWN)


_UNKNOWN = (
    "an item of `with session.iter(...)` is known only when the loop runs, and can be the input of a trace, not an "
    "argument of a torch call; write `for item in session.iter(...):`, where it is a plain value"
)


def evaluate(value: Any, now: Elements) -> Any:
    """A structure with its items computed."""
    return map_leaves(lambda leaf: leaf.compute(now) if isinstance(leaf, Item) else leaf, value)
