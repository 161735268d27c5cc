"""Values on labelled axes: what a sweep returns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxsight.errors import InputError, nearest
from fxsight.plot import as_text, draw, sides
from fxsight.tree import LEAF, Tree

Labels = Mapping[str, tuple[Any, ...]]


def cells_of(axes: Labels) -> list[tuple[int, ...]]:
    """All cells, the last axis fastest: for each axis the number of a label."""
    return list(itertools.product(*(range(len(labels)) for labels in axes.values())))


def cell_name(axes: Labels, cell: Sequence[int]) -> str:
    """``layer=3, position=7``."""
    return ", ".join(f"{name}={labels[at]!r}" for (name, labels), at in zip(axes.items(), cell, strict=True))


@dataclass(eq=False)
class Grid:
    """One value for each cell, or a structure of values.

    axes: name → labels.  tree, leaves: what one cell returns; per leaf a tensor [*axes, *shape of a cell's value].
    done: b1[*axes], which cells have been computed; the others hold NaN, or 0 where the dtype has none.
    mode: "exact": each cell bitwise as if it were traced alone; "fast": within ``lower.TOLERANCE`` of that.
    plan: how it was computed.
    """

    axes: Labels
    tree: Tree
    leaves: list[torch.Tensor]
    done: torch.Tensor
    mode: str
    plan: Any = field(default=None, repr=False)

    @property
    def values(self) -> Any:
        """What the cells return, in its structure: each tensor [*axes, *shape of one cell's]."""
        return self.tree.build(self.leaves)

    def __getitem__(self, key: Any) -> Grid:
        """The grid of one member, where the cells return a dict or a tuple.

        Raises: InputError where there is no such member.
        """
        at = 0
        for name, child in zip(self.tree.keys, self.tree.children, strict=True):
            if name == key:
                return Grid(self.axes, child, self.leaves[at : at + child.size], self.done, self.mode, self.plan)
            at += child.size
        known = ", ".join(map(repr, self.tree.keys)) or "one tensor, which is grid.values"
        raise InputError(f"the cells return no {key!r}; they return {known}; labels are for grid.at(name=label)")

    def at(self, **labels: Any) -> Grid:
        """The cells with these labels, without the axes that are named.

        Raises: InputError for an axis or a label that there is not.
        """
        index = tuple(
            self._number(name, labels.pop(name)) if name in labels else slice(None) for name in list(self.axes)
        )
        for name in labels:
            known = nearest(name, self.axes) or f"there are {', '.join(self.axes)}"
            raise InputError(f"no axis {name!r}; {known}")
        axes = {name: x for (name, x), i in zip(self.axes.items(), index, strict=True) if isinstance(i, slice)}
        return Grid(axes, self.tree, [x[index] for x in self.leaves], self.done[index], self.mode, self.plan)

    def map(self, function: Callable[[Any], Any]) -> Grid:
        """Another value for each cell: ``grid.map(lambda value: value.sum(0))`` adds prompts up.

        function: of what a cell returns; it returns a tensor, of one shape for all cells.

        Raises: InputError where the shapes differ.
        """
        count = len(self.axes)
        flat = [leaf.flatten(0, count - 1) if count else leaf[None] for leaf in self.leaves]
        made = [function(self.tree.build([leaf[i] for leaf in flat])) for i in range(self.done.numel())]
        shapes = dict.fromkeys(tuple(x.shape) for x in made)
        if len(shapes) > 1:
            raise InputError(f"the cells would have shapes {', '.join(str(list(s)) for s in shapes)}")
        values = torch.stack(made).reshape(*self.done.shape, *made[0].shape)
        return Grid(self.axes, LEAF, [values], self.done, self.mode, self.plan)

    def _number(self, name: str, label: Any) -> int:
        labels = self.axes[name]
        if label not in labels:
            shown = ", ".join(map(repr, labels[:8])) + (", ..." if len(labels) > 8 else "")
            raise InputError(f"no label {label!r} on the axis {name!r}; it has {shown}")
        return labels.index(label)

    # -- tables ------------------------------------------------------------------------------------------------------

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each number of each cell that is done: its labels, ``dim_0`` … within the cell, and the number.

        The number is called ``value``, or by its key where the cells return a dict.
        Raises: InputError where the members have different shapes: choose one, ``grid["name"]``.
        """
        shapes = {tuple(x.shape[len(self.axes) :]) for x in self.leaves}
        if len(shapes) > 1:
            raise InputError(f"the members have shapes {', '.join(str(list(s)) for s in shapes)}: grid['name'] is one")
        columns = [".".join(map(str, path)) or "value" for path in self.tree.paths()]
        return [row for shape in shapes for row in self._rows(columns, shape)]

    def _rows(self, columns: list[str], shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        numbers = [x.detach().cpu().flatten().tolist() for x in self.leaves]
        each = math.prod(shape)
        inner = [{f"dim_{d}": i for d, i in enumerate(at)} for at in itertools.product(*map(range, shape))]
        for number, (cell, done) in enumerate(zip(cells_of(self.axes), self.done.flatten().tolist(), strict=True)):
            labels = {name: x[i] for (name, x), i in zip(self.axes.items(), cell, strict=True)}
            for at, place in enumerate(inner if done else ()):
                row = {c: found[number * each + at] for c, found in zip(columns, numbers, strict=True)}
                yield {**labels, **place, **row}

    def to_dataframe(self) -> Any:
        """``to_records`` as a pandas ``DataFrame``.

        Raises: ImportError without pandas.
        """
        try:
            import pandas  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            raise ImportError("to_dataframe needs pandas: pip install pandas; to_records() needs nothing") from None
        make: Callable[[Any], Any] = pandas.DataFrame  # pyright: ignore
        return make(self.to_records())

    # -- pictures ----------------------------------------------------------------------------------------------------

    def plot(self, axes: Any = None) -> Any:
        """A heat map with matplotlib, of a grid with two sides of more than one; ``axes``: where to draw it.

        Returns: the ``Axes`` of matplotlib.
        Raises: ImportError without matplotlib; InputError for a grid with more sides.
        """
        return draw(*sides(self.values, list(self.axes.items())), axes)

    def to_text(self) -> str:
        """The same heat map as text: shades, and a minus before those below zero.

        Raises: InputError for a grid with more than two sides of more than one.
        """
        return as_text(*sides(self.values, list(self.axes.items())))

    def __repr__(self) -> str:
        axes = " × ".join(f"{name} {len(labels)}" for name, labels in self.axes.items()) or "one cell"
        done = int(self.done.sum())
        missing = "" if done == self.done.numel() else f", {done} of {self.done.numel()} cells done"
        each = [list(x.shape[len(self.axes) :]) for x in self.leaves]
        shapes = str(each[0]) if self.tree == LEAF else str(each)
        return f"<Grid {axes}: each {shapes}, {self.mode}{missing}>"
