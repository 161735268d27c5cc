"""In-place calls of a body: each is a new value of the base of what it changes (``mutate``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxsight.arguments import Arguments
from fxsight.cell import Cell, Recording
from fxsight.mutate import SELF, ViewStep, mutate
from fxsight.rules import Rule
from fxsight.tree import Tree


class InPlace(Arguments):
    """What a body changes, and what is to be told of it.

    edited: told of every value that an in-place call has changed.
    """

    def __init__(
        self,
        owner: Recording,
        weights: Callable[[], Mapping[int, str]],
        sizes: Mapping[str, int],
        edited: Callable[[Cell], None],
    ) -> None:
        super().__init__(owner, weights, sizes)
        self.mutated: list[Cell] = []
        self.journal: list[tuple[Cell, dict[str, Any]]] | None = None  # of a branch not taken: how cells were
        self._edited = edited
        self._clock = itertools.count(1)

    def _mutation(self, func: Any, leaves: list[Any], tree: Tree, rule: Rule) -> Any:
        """Write an in-place call down as a new value of the base of what it changes."""
        assert rule.changed is not None
        changed = leaves[rule.changed]
        if func is torch.Tensor.__setitem__ and self._is_itself(changed, leaves, tree):
            return None
        cell = changed.cell if self.is_own(changed) else self._update_cell(changed)
        args, kwargs = tree.build([SELF if x is changed else self._argument(x) for x in leaves])
        root = cell.root
        views: list[ViewStep] = []
        while cell.base is not None and cell.step is not None:
            views.insert(0, cell.step)
            cell = cell.base
        before = self.current(root)
        asked = (before, tuple(views), self._name(func), tuple(args), dict(kwargs))
        node = self._add(mutate, asked, {}, before.meta["spec"])
        if self.gradients.is_off and root.is_still:
            node = self._add(torch.Tensor.detach, (node,), {}, before.meta["spec"])
        elif self.gradients.is_off:
            self.gradients.unseen = self._owner.line()
        self.remember(root)
        root.version = root.seen = next(self._clock)
        root.node = node
        self.mutated.append(root)
        self._edited(root)
        return changed if rule.returns_changed else rule.tree.build(rule.leaves)

    def _is_itself(self, changed: Any, leaves: list[Any], tree: Tree) -> bool:
        """Whether a part is given what it is already: the end of ``h[:, 0] += 1``, in Python's reading of it."""
        value = leaves[-1]
        if len(list(filter(_is_tensor, leaves))) != 2 or not (self.is_own(changed) and self.is_own(value)):
            return False
        key = tree.build([SELF if x is changed else x for x in leaves])[0][1]
        is_taken_so = value.cell.step == ("torch.Tensor.__getitem__", (SELF, key), {}, ())
        return value.cell.base is changed.cell and is_taken_so

    def remember(self, cell: Cell) -> None:
        """In a branch not taken: keep what the cell was."""
        if self.journal is not None:
            self.journal.append((cell, {**vars(cell), "handles": list(cell.handles)}))


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
