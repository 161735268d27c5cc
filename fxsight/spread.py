"""``spread``, ``spread_columns``: rows or columns at the places that they have in the whole.

So what reads them sees the strides of the whole. What stands at other places is not said, and nobody reads it: memory
is reserved for it and, on a CPU, not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def spread(rows: torch.Tensor, like: torch.Tensor, dim: int, start: int, end: int) -> torch.Tensor:
    """A tensor with as many rows as ``like``, of which only ``start`` to ``end`` have been computed.

    rows: these; of any dtype.  like: any tensor with all the rows.  dim: of the rows, counted from the end, in both.
    Returns: row-major.
    """
    shape = list(rows.shape)
    shape[dim] = like.shape[dim]
    whole = rows.new_empty(shape)
    part: torch.Tensor = torch.ops.aten.slice.Tensor(whole, dim, start, end)
    part.copy_(rows)
    return whole


def spread_columns(columns: torch.Tensor, width: int, places: Sequence[int | slice | torch.Tensor]) -> torch.Tensor:
    """A tensor with ``width`` columns, of which only these have been computed.

    columns: of any dtype; those at the end that have no place are left out.
    places: of the columns, in order: numbers, slices, or tensors of numbers, i64[...].
    Returns: row-major.
    Raises: IndexError for a column that is not there.
    """
    whole = columns.new_empty((*columns.shape[:-1], width))
    first = 0
    for place in places:
        wanted = place.flatten() if isinstance(place, torch.Tensor) else place
        count = 1 if isinstance(wanted, int) else len(range(width)[wanted] if isinstance(wanted, slice) else wanted)
        given = columns[..., first : first + count]
        whole[..., wanted] = given.squeeze(-1) if isinstance(wanted, int) else given
        first += count
    return whole
