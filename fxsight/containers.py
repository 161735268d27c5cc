"""Python containers and numbers that can be saved: ``fxsight.list()``, ``fxsight.dict()``, ``fxsight.int(...)`` …

Each is the Python type of that name with ``.save()`` and ``.value``. Plain ``list`` and ``dict`` do as well: what is in
them becomes plain tensors when it is saved itself, or with ``fxsight.save(xs)``.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, Self

import torch

from fxsight.context import here
from fxsight.item import evaluate
from fxsight.tree import map_leaves


class Saved:
    """What the containers share."""

    def save(self) -> Self:
        """Keep every value in it, those put in later too.  Returns: itself."""
        now = here()
        keeper = now.traces[-1] if now.traces else now.session
        if keeper is not None:
            keeper.save(self)
        return self

    @property
    def value(self) -> Self:
        """Itself."""
        return self


def _in_loops(method: Callable[..., Any]) -> Any:
    """The method; in a block of a session that is written down, it is done when the block runs."""

    def call(self: Any, *args: Any) -> Any:
        session = here().session
        if session is None or not session.is_written_down:
            return method(self, *args)
        session.refer(args)
        return session.do(lambda now: method(self, *map_leaves(_present, evaluate(args, now))))

    return call


def _present(leaf: Any) -> Any:
    """The tensor of this time: in a loop the same variable holds another one the next time."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


class list(Saved, builtins.list[Any]):
    """A ``list`` with ``.save()``."""

    append = _in_loops(builtins.list.append)
    extend = _in_loops(builtins.list.extend)
    insert = _in_loops(builtins.list.insert)
    remove = _in_loops(builtins.list.remove)
    clear = _in_loops(builtins.list.clear)
    __setitem__ = _in_loops(builtins.list.__setitem__)


class dict(Saved, builtins.dict[Any, Any]):
    """A ``dict`` with ``.save()``."""

    update = _in_loops(builtins.dict.update)
    clear = _in_loops(builtins.dict.clear)
    __setitem__ = _in_loops(builtins.dict.__setitem__)


class set(Saved, builtins.set[Any]):
    """A ``set`` with ``.save()``."""

    add = _in_loops(builtins.set.add)
    update = _in_loops(builtins.set.update)
    discard = _in_loops(builtins.set.discard)


class tuple(Saved, builtins.tuple[Any, ...]):
    """A ``tuple`` with ``.save()``."""


class int(Saved, builtins.int):
    """An ``int`` with ``.save()``; of a value of a trace, its number now."""


class bool(int):
    """A truth value with ``.save()``: 0 or 1 (Python's own ``bool`` cannot be extended)."""

    def __new__(cls, value: object = False) -> bool:
        """0 or 1."""
        return super().__new__(cls, builtins.bool(value))

    def __repr__(self) -> builtins.str:
        return repr(builtins.bool(self))


class float(Saved, builtins.float):
    """A ``float`` with ``.save()``; of a value of a trace, its number now."""


class complex(Saved, builtins.complex):
    """A ``complex`` with ``.save()``."""


class str(Saved, builtins.str):
    """A ``str`` with ``.save()``."""


class bytes(Saved, builtins.bytes):
    """A ``bytes`` with ``.save()``."""


class bytearray(Saved, builtins.bytearray):
    """A ``bytearray`` with ``.save()``."""


_SAVED: builtins.dict[type, Any] = {
    builtins.int: int,
    builtins.float: float,
    builtins.bool: bool,
    builtins.complex: complex,
    builtins.str: str,
    builtins.bytes: bytes,
    builtins.bytearray: bytearray,
    builtins.list: list,
    builtins.dict: dict,
    builtins.set: set,
}


def savable(value: Any) -> Any:
    """A plain Python value as one that has ``.save()``; anything else as it is."""
    kind = _SAVED.get(type(value))
    return value if kind is None else kind(value)


def thaw(value: Any) -> Any:
    """The same with plain Python containers, so that what is in them is seen."""
    if isinstance(value, (list, set)):
        return [thaw(x) for x in value]
    if isinstance(value, tuple):
        return builtins.tuple(thaw(x) for x in value)
    if isinstance(value, dict):
        return {key: thaw(x) for key, x in value.items()}
    return value
