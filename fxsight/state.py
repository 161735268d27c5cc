"""The state of a module beside tensors and code: what its forward may branch on, and what it may leave behind."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

_PLAIN = frozenset((bool, int, float, str, type(None)))
_TABLES = (dict, OrderedDict, defaultdict, Counter)
_ROWS = (list, deque)


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
        below = {name: child for name, child in part._modules.items() if id(child) not in skipped}
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


@contextmanager
def restored(module: nn.Module) -> Generator[None]:
    """What is done inside to the attributes of a module and of its submodules is undone on the way out.

    Lists, dicts, sets and deques in attributes get their members back; tensors and other objects are left alone.
    """
    found: dict[int, tuple[Any, list[Any]]] = {}
    for part in module.modules():
        _collect(vars(part), found)
    try:
        yield
    finally:
        for container, members in found.values():
            now = _members(container)
            if len(now) != len(members) or any(a is not b for a, b in zip(now, members, strict=True)):
                _refill(container, members)


def _collect(value: Any, found: dict[int, tuple[Any, list[Any]]]) -> None:
    """Every container in a value, by ``id``, with its members."""
    kind = type(value)
    if id(value) in found or kind not in (*_TABLES, *_ROWS, set, tuple):
        return
    members = found[id(value)] = (value, _members(value))
    for member in members[1]:
        _collect(member, found)


def _members(container: Any) -> list[Any]:
    """Keys and values of a dict, one after the other; the members of anything else."""
    return [x for pair in container.items() for x in pair] if isinstance(container, dict) else list(container)


def _refill(container: Any, members: Sequence[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        for key, value in zip(members[::2], members[1::2], strict=True):
            container[key] = value
    elif isinstance(container, set):
        container.update(members)
    else:
        container.extend(members)
