"""``spread``: rows at the places that they have in the whole, so that what reads them sees the strides of the whole."""

from __future__ import annotations

import torch


def spread(rows: torch.Tensor, like: torch.Tensor, dim: int, start: int, end: int) -> torch.Tensor:
    """A tensor with as many rows as ``like``, of which only ``start`` to ``end`` have been computed.

    rows: these; of any dtype.  like: any tensor with all the rows.  dim: of the rows, counted from the end, in both.
    Returns: row-major; what stands in its other rows is not said, and nobody reads it: memory is reserved for them and,
    on a CPU, not touched.
    """
    shape = list(rows.shape)
    shape[dim] = like.shape[dim]
    whole = rows.new_empty(shape)
    part: torch.Tensor = torch.ops.aten.slice.Tensor(whole, dim, start, end)
    part.copy_(rows)
    return whole
