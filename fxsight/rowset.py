"""Which rows of which cells are computed together, and which rows an edit can reach."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

Places = torch.Tensor  # i64[n], rising: some rows of one cell


class RowSet:
    """Rows of some cells, one cell after the other.  places: for each cell which of its rows."""

    def __init__(self, places: Sequence[Places]) -> None:
        self.places = list(places)

    @cached_property
    def rows(self) -> torch.Tensor:
        """i64[all]: for each row which row of its cell it is."""
        return torch.cat(self.places)

    @cached_property
    def cells(self) -> torch.Tensor:
        """i64[all]: for each row the number of its cell among these."""
        return torch.cat([torch.full_like(p, c) for c, p in enumerate(self.places)])

    @cached_property
    def starts(self) -> list[int]:
        """Where each cell begins."""
        found = [0]
        for places in self.places:
            found.append(found[-1] + len(places))
        return found

    @cached_property
    def alike(self) -> bool:
        """Whether all cells have the same rows."""
        return all(torch.equal(places, self.places[0]) for places in self.places[1:])

    def within(self, other: RowSet) -> torch.Tensor:
        """i64[all]: where these rows are among those of a larger set."""
        pairs = zip(self.places, other.places, other.starts, strict=False)
        return torch.cat([torch.searchsorted(theirs, own) + start for own, theirs, start in pairs])


def reach(allowed: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """b1[count, count]: row i can see row j through the attentions of a program, however many.

    allowed: of each, b1[count, count]: query i sees key j.
    """
    seen = torch.eye(count, dtype=torch.bool)
    for one in allowed:
        seen = seen | one
    while True:
        further = (seen.float() @ seen.float()) > 0
        if torch.equal(further, seen):
            return seen
        seen = further


def changed_rows(value: torch.Tensor, clean: torch.Tensor, dim: int) -> torch.Tensor:
    """b1[rows]: where two values of one shape are not the same, bit for bit; NaN is never the same."""
    others = [d for d in range(value.ndim) if d != dim]
    return (value != clean).any(dim=others) if others else value != clean
