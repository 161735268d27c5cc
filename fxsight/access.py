"""The leaves of a call that is shaped as another was: found without asking what each value is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxsight.past import constant, find_class
from fxsight.tree import Tree, flatten

Reader = Callable[[Any, list[Any]], bool]

_PLAIN = frozenset([torch.Tensor, type(None), bool, int, float, str])


class Access:
    """Reads the leaves of values of one shape."""

    def __init__(self, tree: Tree) -> None:
        self._read = _reader(tree)

    def __call__(self, value: Any) -> list[Any] | None:
        """The leaves, as ``flatten`` gives them; None where the value has another shape."""
        leaves: list[Any] = []
        return leaves if self._read(value, leaves) else None


def _reader(tree: Tree) -> Reader:
    if tree.kind == "leaf":
        return _leaf
    if tree.kind in ("tuple", "list"):
        return _sequence(tuple if tree.kind == "tuple" else list, [_reader(child) for child in tree.children])
    if tree.kind == "dict":
        return _members(dict, lambda value: value, tree)
    if tree.kind == "object":
        return _members(find_class(tree.name), vars, tree)
    if tree.kind == "constant":
        known = constant(tree.name)
        return lambda value, leaves: bool(value == known)
    return _other(tree)


def _leaf(value: Any, leaves: list[Any]) -> bool:
    leaves.append(value)
    return type(value) in _PLAIN or flatten(value)[1].kind == "leaf"


def _sequence(kind: type, readers: list[Reader]) -> Reader:
    def read(value: Any, leaves: list[Any]) -> bool:
        if type(value) is not kind:
            return False
        members: Any = value
        if len(members) != len(readers):
            return False
        return all(reader(member, leaves) for reader, member in zip(readers, members, strict=True))

    return read


def _members(kind: type, opened: Callable[[Any], dict[Any, Any]], tree: Tree) -> Reader:
    readers, keys = [_reader(child) for child in tree.children], list(tree.keys)

    def read(value: Any, leaves: list[Any]) -> bool:
        if type(value) is not kind:
            return False
        members = opened(value)
        if list(members) != keys:
            return False
        return all(reader(member, leaves) for reader, member in zip(readers, members.values(), strict=True))

    return read


def _other(tree: Tree) -> Reader:
    def read(value: Any, leaves: list[Any]) -> bool:
        found, shape = flatten(value)
        leaves += found
        return shape == tree

    return read
