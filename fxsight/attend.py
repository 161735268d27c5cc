"""Attention of many cells at once: each query sees the keys of its own cell, and those that all cells share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fxsight.along import parted
from fxsight.rowset import RowSet

sdpa: Callable[..., torch.Tensor] = torch.ops.aten.scaled_dot_product_attention.default
LOW = torch.finfo(torch.float16).min  # masks of numbers write at most this where nothing is to be seen
LONG = 64  # cells of more rows are done one by one: one mask for all would be mostly closed


@dataclass(frozen=True)
class Asked:
    """An attention.  query: [..., queries' rows, d].  key, value: [..., rows, d], of the rows that cells have of their
    own; clean_key, clean_value: [..., count, d], what all cells share for the others.  mask: as of a whole cell.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    clean_key: torch.Tensor | None
    clean_value: torch.Tensor | None
    mask: torch.Tensor | None
    is_causal: bool
    options: dict[str, Any]


def allowed(mask: torch.Tensor | None, is_causal: bool, count: int) -> torch.Tensor:
    """b1[count, count]: whether query i sees key j, in any example and head.

    A query that sees nothing sees everything: softmax of equal numbers.
    """
    if is_causal:
        return torch.ones(count, count, dtype=torch.bool).tril()
    if mask is None:
        return torch.ones(count, count, dtype=torch.bool)
    seen = (mask if mask.dtype == torch.bool else mask > LOW).expand(*mask.shape[:-2], count, count)
    seen = seen | ~seen.any(-1, keepdim=True)
    return seen.reshape(-1, count, count).any(0).cpu()


@dataclass(eq=False)
class Attend:
    """Attentions of one chunk of cells.  full: the rows that the cells have of their own; count: of a whole cell."""

    full: RowSet
    count: int
    _masks: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def __call__(self, asked: Asked, queries: RowSet) -> torch.Tensor:
        """[..., rows of the queries, d]."""
        if queries.alike and self.full.alike:
            return self._alike(asked, queries)
        if self.count >= LONG:
            return self._one_by_one(asked, queries)
        return self._blocks(asked, queries)

    # -- all cells have the same rows: they are examples of one batch ------------------------------------------------

    def _alike(self, asked: Asked, queries: RowSet) -> torch.Tensor:
        cells, own, rows = len(queries.places), self.full.places[0], queries.places[0]
        rest = self._rest(own)
        given = [_folded(x, cells) for x in (asked.query, asked.key, asked.value)]
        key, value = (self._with(x, clean, rest, cells) for x, clean in zip(given[1:], _clean(asked), strict=True))
        mask = self._mask(asked, rows, torch.cat([rest, own]))
        if mask is not None and mask.ndim == given[0].ndim and mask.shape[0] not in (1, given[0].shape[0]):
            mask = mask.repeat(cells, *[1] * (mask.ndim - 1))
        found = sdpa(given[0], key, value, mask, 0.0, False, **asked.options)
        return parted(found, 0, (cells, -1)).movedim(0, -3).flatten(-3, -2)

    def _with(self, own: torch.Tensor, clean: Any, rest: torch.Tensor, cells: int) -> torch.Tensor:
        if not len(rest):
            return own
        shared = clean.index_select(-2, rest)
        return torch.cat([shared.repeat(cells, *[1] * (shared.ndim - 1)), own], -2)

    # -- few rows a cell: one mask for all ---------------------------------------------------------------------------

    def _blocks(self, asked: Asked, queries: RowSet) -> torch.Tensor:
        shared = self._shared
        keys = [torch.cat([c.index_select(-2, shared), x], -2) if len(shared) else x for x, c in _pairs(asked)]
        return sdpa(asked.query, *keys, self._block_mask(asked, queries), 0.0, False, **asked.options)

    @property
    def _shared(self) -> torch.Tensor:
        """The rows that some cell does not have of its own."""
        missing = torch.cat([self._rest(places) for places in self.full.places])
        found: torch.Tensor = torch.unique(missing)
        return found

    def _block_mask(self, asked: Asked, queries: RowSet) -> torch.Tensor:
        key = (id(queries), id(asked.mask), asked.is_causal)
        if key not in self._masks:
            self._masks[key] = (self._made(asked, queries), asked.mask)
        made: torch.Tensor = self._masks[key][0]
        return made

    def _made(self, asked: Asked, queries: RowSet) -> torch.Tensor:
        shared = self._shared
        has = torch.zeros(len(self.full.places), self.count, dtype=torch.bool, device=shared.device)
        has[self.full.cells, self.full.rows] = True
        block = torch.cat([~has[queries.cells][:, shared], queries.cells[:, None] == self.full.cells[None, :]], 1)
        mask = self._mask(asked, queries.rows, torch.cat([shared, self.full.rows]))
        if mask is None or mask.dtype == torch.bool:
            return block if mask is None else mask & block
        return mask.masked_fill(~block, float("-inf"))

    # -- many rows a cell --------------------------------------------------------------------------------------------

    def _one_by_one(self, asked: Asked, queries: RowSet) -> torch.Tensor:
        found: list[torch.Tensor] = []
        for cell, (own, rows) in enumerate(zip(self.full.places, queries.places, strict=True)):
            rest = self._rest(own)
            query = asked.query.narrow(-2, queries.starts[cell], len(rows))
            mine = [(x.narrow(-2, self.full.starts[cell], len(own)), clean) for x, clean in _pairs(asked)]
            keys = [torch.cat([c.index_select(-2, rest), x], -2) if len(rest) else x for x, c in mine]
            mask = self._mask(asked, rows, torch.cat([rest, own]))
            found.append(sdpa(query, *keys, mask, 0.0, False, **asked.options))
        return torch.cat(found, -2)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _rest(self, own: torch.Tensor) -> torch.Tensor:
        """The rows that are not among some."""
        missing = torch.ones(self.count, dtype=torch.bool, device=own.device)
        missing[own] = False
        return missing.nonzero().flatten()

    def _mask(self, asked: Asked, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """The mask for some queries and keys, by their rows; None where each sees each."""
        if asked.is_causal:
            return keys[None, :] <= rows[:, None]
        if asked.mask is None:
            return None
        whole = asked.mask.expand(*asked.mask.shape[:-2], self.count, self.count)
        return whole.index_select(-2, rows).index_select(-1, keys)


def _pairs(asked: Asked) -> list[tuple[torch.Tensor, Any]]:
    return [(asked.key, asked.clean_key), (asked.value, asked.clean_value)]


def _clean(asked: Asked) -> list[Any]:
    return [asked.clean_key, asked.clean_value]


def _folded(value: torch.Tensor, cells: int) -> torch.Tensor:
    """[batch, ..., cells · rows, d] as [cells · batch, ..., rows, d]."""
    return parted(value, value.ndim - 2, (cells, -1)).movedim(-3, 0).flatten(0, 1)
