"""An index as torch takes it, ``h[:, -1]``, read as one item for each dimension."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx

from fxsight.node import is_tensor, tensor_spec
from fxsight.spec import SizeSpec

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def items_of(index: Any, rank: int, tensors: bool = False) -> list[Any] | None:
    """One item for each dimension; None where that cannot be said.  tensors: of integers may be items."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(_is_plain(x) or (tensors and is_integers(x)) for x in items) or sum(x is Ellipsis for x in items) > 1:
        return None
    at = next((i for i, x in enumerate(items) if x is Ellipsis), len(items))
    items[at : at + 1] = [slice(None)] * (rank - len(items) + (at < len(items)))
    return items if len(items) == rank else None


def _is_plain(item: Any) -> bool:
    """Whether it takes exactly one dimension."""
    if isinstance(item, list):
        return all(type(x) is int for x in item)
    if isinstance(item, fx.Node):
        return isinstance(item.meta.get("spec"), SizeSpec)
    return item is Ellipsis or type(item) is int or isinstance(item, slice)


def is_integers(item: Any) -> TypeGuard[fx.Node]:
    """Whether it is a tensor of integers: as an index, it takes exactly one dimension."""
    return isinstance(item, fx.Node) and is_tensor(item) and tensor_spec(item).dtype in _INTEGERS
