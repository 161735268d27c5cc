"""One shape of a structure, filled again and again: a model output around other leaves, in microseconds.

``Tree.build`` goes through the shape and asks each class anew; a mould has gone through it once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from operator import is_
from typing import Any

import torch

from fxsight.past import build, constant, find_class
from fxsight.tree import Tree, is_model_output

Make = Callable[[list[Any]], Any]
Look = Callable[[Any], list[Any]]


class Mould:
    """The shape ``tree``, a container of any kind."""

    def __init__(self, tree: Tree) -> None:
        self._constants = [constant(name) for name in _constants(tree)]
        self._steps: list[tuple[Make, Look, list[int]]] = []
        leaf, fixed = count(), count(tree.size)
        made = count(tree.size + len(self._constants))

        def slot(at: Tree) -> int:
            if at.kind in ("leaf", "constant"):
                return next(leaf if at.kind == "leaf" else fixed)
            slots = [slot(child) for child in at.children]
            self._steps.append((_maker(at), _looker(at), slots))
            return next(made)

        slot(tree)

    def fill(self, leaves: Sequence[Any]) -> tuple[Any, Filled]:
        """The structure with these leaves, and what tells whether its members are still these."""
        slots, parts = [*leaves, *self._constants], Filled()
        for make, look, members in self._steps:
            made = make([slots[n] for n in members])
            slots.append(made)
            parts.append((look, made, look(made)))
        return slots[-1], parts


class Filled(list[tuple[Look, Any, list[Any]]]):
    """The containers of one structure, with their members as they were."""

    def is_whole(self) -> bool:
        """Whether no member has been put in, taken out or replaced."""
        for look, made, before in self:
            now = look(made)
            if len(now) != len(before) or not all(map(is_, now, before)):
                return False
        return True


def _constants(tree: Tree) -> Iterator[str]:
    if tree.kind == "constant":
        yield tree.name
    for child in tree.children:
        yield from _constants(child)


def _maker(at: Tree) -> Make:
    if at.kind == "tuple":
        return tuple
    if at.kind == "list":
        return list
    if at.kind == "dict":
        return lambda members: dict(zip(at.keys, members, strict=True))
    cls = find_class(at.name)
    if at.kind == "object":
        return lambda members: build(cls, dict(zip(at.keys, members, strict=True)))
    if at.kind == "namedtuple":
        return lambda members: cls(*members)
    if at.kind == "structseq":
        return lambda members: cls(members)
    return _output(cls, at) or (lambda members: cls(**dict(zip(at.keys, members, strict=True))))


def _output(cls: Any, at: Tree) -> Make | None:
    """How a model output is made without its ``__init__``, where that only puts members and None in their places.

    Seen by trying it: its attributes are then the members and None, and its items the members.
    """
    tried = {key: torch.empty(0) for key in at.keys}
    if not issubclass(cls, OrderedDict) or (len(tried) == 1 and at.children[0].kind != "leaf"):
        return None
    made = cls(**tried)
    empty = dict.fromkeys(vars(made))
    items: dict[str, Any] = dict(made.items())
    if not is_model_output(made) or not _are(items, tried) or not _are(vars(made), {**empty, **tried}):
        return None
    return partial(_fill_output, cls, empty, at.keys)


def _are(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return list(found) == list(wanted) and all(map(is_, found.values(), wanted.values()))


def _fill_output(cls: Any, empty: dict[str, Any], keys: Sequence[str], members: list[Any]) -> Any:
    made = cls.__new__(cls)
    own = vars(made)
    own.update(empty)
    for key, member in zip(keys, members, strict=True):
        own[key] = member
        OrderedDict.__setitem__(made, key, member)
    return made


def _looker(at: Tree) -> Look:
    """How the members of a container are looked up."""
    if at.kind == "object":
        return lambda made: list(vars(made).values())
    if at.kind != "fields":
        return (lambda made: list(made.values())) if at.kind == "dict" else list
    if issubclass(find_class(at.name), OrderedDict):
        return lambda made: list(made.values())
    return lambda made: [getattr(made, key) for key in at.keys]
