"""What a model keeps from one call to the next: the caches of ``transformers``, of any kind, as plain members.

A cache is told by the names of its bases, so nothing is imported for it. It is a structure like any other (``tree``):
its tensors are leaves, and so are the numbers that count what it holds, as ``Count``; its classes, dtypes and devices
are part of its shape.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch

_BASES = frozenset(["Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin", "DummyLayer"])
_NO_PAST = frozenset([torch.Tensor, type(None), bool, int, float, str])
_COUNTS = frozenset(["cumulative_length", "cumulative_length_int"])  # what grows from call to call


class Count(int):
    """How many tokens a cache has seen: a number that a program is free in, as it is in sizes."""


class Constant:
    """A dtype, device or class in a cache, as text."""

    def __init__(self, text: str) -> None:
        self.text = text


def is_past(value: Any) -> bool:
    """Whether it is a cache of ``transformers``, or a layer of one."""
    cls: Any = type(value)
    return _is_past(cls)


@lru_cache(maxsize=512)  # asked of every value in every structure
def _is_past(cls: Any) -> bool:
    kinds = cls.__mro__
    if len(kinds) < 2 or issubclass(cls, (torch.Tensor, torch.nn.Module)):
        return False
    known = any(c.__name__ in _BASES and c.__module__.startswith("transformers.") for c in kinds)
    own = kinds[0].__module__.startswith("transformers.models.") and kinds[0].__name__.endswith("Cache")
    return known or own


def members_of(past: Any) -> dict[str, Any]:
    """Its attributes, as they stand in a structure."""
    return {name: _member(name, value) for name, value in vars(past).items()}


def _member(name: str, value: Any) -> Any:
    if name in _COUNTS and type(value) is int:
        return Count(value)
    if isinstance(value, torch.dtype):
        return Constant(str(value))
    if isinstance(value, torch.device):
        return Constant(f"device {value}")
    return Constant(f"class {value.__module__}:{value.__qualname__}") if isinstance(value, type) else value


def constant(text: str) -> Any:
    """The dtype, device or class that a ``Constant`` with this text stands for."""
    kind, _, rest = text.partition(" ")
    if kind == "device":
        return torch.device(rest)
    if kind == "class":
        return find_class(rest)
    return getattr(torch, text.removeprefix("torch."))


@lru_cache(maxsize=512)
def find_class(name: str) -> Any:
    """The class of the name ``module:qualname``."""
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def build(cls: Any, members: Mapping[str, Any]) -> Any:
    """The cache, or the layer, with these attributes."""
    made = object.__new__(cls)
    vars(made).update({name: int(x) if type(x) is Count else x for name, x in members.items()})
    return made


def pasts_in(value: Any) -> Iterator[Any]:
    """The caches in plain containers, in order; each once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        at = waiting.pop(0)
        if type(at) in _NO_PAST:
            continue
        if isinstance(at, dict):
            waiting[:0] = at.values()
        elif isinstance(at, (tuple, list)):
            waiting[:0] = at
        elif is_past(at) and id(at) not in seen:
            seen.add(id(at))
            yield at


def restore(past: Any, now: Any) -> None:
    """Let a cache be as another of its class, in place: the same cache, the same layers, other tensors."""
    if is_past(past) and type(past) is type(now):
        mine, new = vars(past), vars(now)
        for name in [name for name in mine if name not in new]:
            del mine[name]
        for name, value in new.items():
            mine[name] = restored(mine.get(name), value)


def restored(mine: Any, now: Any) -> Any:
    """``now``, or ``mine`` made like it where that can be."""
    if is_past(mine) and type(mine) is type(now):
        restore(mine, now)
        return mine
    if type(mine) is list and type(now) is list:
        mine[:] = [restored(a, b) for a, b in zip(mine, now, strict=False)] + now[len(mine) :]
        return mine
    return now
