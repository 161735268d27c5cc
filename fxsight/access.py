"""The leaves of a call that is shaped as another was: found without asking what each value is.

The shape is written out as a function, once, and from then on reading a call of it takes a few microseconds:

    def read(v0):
        if type(v0) is not tuple or len(v0) != 2: return None
        v1, v2 = v0
        ...
        return [v5, v6, *v7]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxsight.past import constant, find_class
from fxsight.tree import Tree, flatten
from fxsight.written import written

_PLAIN = frozenset([torch.Tensor, type(None), bool, int, float, str])


class Access:
    """Reads the leaves of values of one shape."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._read: Callable[[Any], list[Any] | None] = _Writer().function(tree)

    def __call__(self, value: Any) -> list[Any] | None:
        """The leaves, as ``flatten`` gives them; None where the value has another shape."""
        return self._read(value)


class _Writer:
    """Writes the function for one shape."""

    def __init__(self) -> None:
        self._lines = ["def read(v0):"]
        self._globals: dict[str, Any] = {"PLAIN": _PLAIN, "is_leaf": _is_leaf, "other": _other}
        self._leaves: list[str] = []
        self._made = 0

    def function(self, tree: Tree) -> Any:
        """The function."""
        self._visit(tree, "v0")
        self._lines.append(f"    return [{', '.join(self._leaves)}]")
        return written(self._lines, "access", self._globals)

    def _visit(self, tree: Tree, name: str) -> None:
        if tree.kind == "leaf":
            self._unless(f"type({name}) in PLAIN or is_leaf({name})")
            self._leaves.append(name)
        elif tree.kind in ("tuple", "list"):
            self._unless(f"type({name}) is {tree.kind} and len({name}) == {len(tree.children)}")
            self._open(tree.children, name)
        elif tree.kind == "dict":
            self._unless(f"type({name}) is dict and tuple({name}) == {self._global(tree.keys)}")
            self._open(tree.children, f"{name}.values()")
        elif tree.kind == "object":
            self._unless(f"type({name}) is {self._global(find_class(tree.name))}")
            self._unless(f"tuple({name}.__dict__) == {self._global(tree.keys)}")
            self._open(tree.children, f"{name}.__dict__.values()")
        elif tree.kind == "constant":
            self._unless(f"{name} == {self._global(constant(tree.name))}")
        else:
            found = self._new()
            self._lines.append(f"    {found} = other({name}, {self._global(tree)})")
            self._unless(f"{found} is not None")
            self._leaves.append(f"*{found}")

    def _unless(self, condition: str) -> None:
        self._lines.append(f"    if not ({condition}): return None")

    def _open(self, children: Sequence[Tree], members: str) -> None:
        names = [self._new() for _ in children]
        if names:
            self._lines.append(f"    {', '.join(names)}, = {members}")
        for name, child in zip(names, children, strict=True):
            self._visit(child, name)

    def _new(self) -> str:
        self._made += 1
        return f"v{self._made}"

    def _global(self, value: Any) -> str:
        name = f"c{len(self._globals)}"
        self._globals[name] = value
        return name


def _is_leaf(value: Any) -> bool:
    return flatten(value)[1].kind == "leaf"


def _other(value: Any, tree: Tree) -> list[Any] | None:
    leaves, shape = flatten(value)
    return leaves if shape == tree else None
