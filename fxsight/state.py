"""The settings of a module: everything in it, beside tensors and code, that its forward may branch on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

_PLAIN = frozenset((bool, int, float, str, type(None)))


def settings(module: nn.Module, without: Collection[nn.Module] = ()) -> tuple[Any, ...]:
    """Of every submodule: its class and the names of its children, plain attributes (``training`` among them), those
    of its config, which hooks it has, and dtypes, devices and shapes of its weights.

    without: submodules that the forward does not know, left out with all below them.

    Cheap enough to be asked at every trace; equal settings mean that a captured program still holds.
    """
    skipped = {id(part) for part in without}
    seen: set[int] = set()
    found: list[tuple[Any, ...]] = []
    waiting: list[Any] = [module]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            found.append((len(seen),))
            continue
        seen.add(id(part))
        below = part._modules
        if skipped:
            below = {name: child for name, child in below.items() if id(child) not in skipped}
        found.append(_of(part, tuple(below)))
        waiting.extend([child for child in below.values() if child is not None])
    return tuple(found)


def _of(module: nn.Module, children: tuple[str, ...]) -> tuple[Any, ...]:
    own = module.__dict__
    plain = tuple(value for value in own.values() if type(value) in _PLAIN)
    hooks = (*own.get("_forward_hooks", ()), *own.get("_forward_pre_hooks", ()))
    config = getattr(own.get("config"), "__dict__", None)
    more = () if config is None else tuple(value for value in config.values() if type(value) in _PLAIN)
    tensors = (*own["_parameters"].values(), *own["_buffers"].values())
    weights = tuple(None if t is None else (t.dtype, t.device, t.shape) for t in tensors)
    return (type(module), children, own.get("forward"), plain, hooks, more, weights)
