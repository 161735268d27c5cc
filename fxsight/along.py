"""Where the rows of a value lie: the positions, or the prompts, that one dimension of it counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Along:
    """Dimension ``dim`` has the size outer · rows · inner: after ``view(batch * length, 8)``, outer is the batch."""

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        """Whether the dimension counts nothing but rows."""
        return self.outer == self.inner == 1

    def moved(self, by: int) -> Along:
        """The same, so many dimensions further on."""
        return replace(self, dim=self.dim + by)


def reshaped(along: Along, old: Sequence[int], new: Sequence[int], rows: int) -> Along | None:
    """Where the rows are after a ``reshape``; None where they are torn apart.

    In both shapes so many numbers lie before a row and after it: that is all a reshape keeps.
    """
    before = math.prod(old[: along.dim]) * along.outer
    after = math.prod(old[along.dim + 1 :]) * along.inner
    found = [_at(dim, new, before, after, rows) for dim in range(len(new))]
    fitting = [x for x in found if x is not None]
    return next((x for x in fitting if x.plain), fitting[0] if fitting else None)


def _at(dim: int, shape: Sequence[int], before: int, after: int, rows: int) -> Along | None:
    first, last = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    if not first or not last or before % first or after % last:
        return None
    found = Along(dim, before // first, after // last)
    return found if found.outer * rows * found.inner == shape[dim] else None


def parted(value: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    """One dimension as several; one of the sizes may be -1."""
    return value.reshape(*value.shape[:dim], *sizes, *value.shape[dim + 1 :])


def _parted(value: torch.Tensor, along: Along) -> torch.Tensor:
    return parted(value, along.dim, (along.outer, -1, along.inner))


def take(value: torch.Tensor, along: Along, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a value.  rows: i64[n], their numbers."""
    if along.plain:
        return value.index_select(along.dim, rows)
    return _parted(value, along).index_select(along.dim + 1, rows).flatten(along.dim, along.dim + 2)


def join(values: Sequence[torch.Tensor], along: Along) -> torch.Tensor:
    """The rows of several values as those of one."""
    if along.plain:
        return torch.cat(list(values), along.dim)
    together = torch.cat([_parted(value, along) for value in values], along.dim + 1)
    return together.flatten(along.dim, along.dim + 2)


def put(base: torch.Tensor, along: Along, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of a value with other rows at some places."""
    if along.plain:
        return base.index_copy(along.dim, rows, values)
    changed = _parted(base, along).index_copy(along.dim + 1, rows, _parted(values, along))
    return changed.flatten(along.dim, along.dim + 2)
