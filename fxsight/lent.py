"""Tensors of the user's that a body uses: unchanged since then, and which of them share memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxsight import _torch
from fxsight.errors import InputError

IN_BODY = "used in this body was changed in place afterwards"
AS_INPUT = "that is an input of this trace was changed in place before the session ran it"


def check_unchanged(tensors: Sequence[torch.Tensor], versions: Sequence[int | None], what: str = IN_BODY) -> None:
    """Tensors of the user's are as they were when a body used them; None for a version that does not count.

    Raises: InputError for one that was changed in place since.
    """
    for tensor, version in zip(tensors, versions, strict=True):
        if version is not None and _torch.version(tensor) != version:
            also = ", and for `t[i] += value` write t[i].add_(value)" if what is IN_BODY else ""
            raise InputError(f"a tensor {list(tensor.shape)} {what}; use a copy: t.clone(){also}")


def sealed(tensors: Sequence[torch.Tensor], versions: Sequence[int | None]) -> list[int | None]:
    """Versions from when the user's code has had its time on: later changes, by other blocks, do not count."""
    pairs = zip(tensors, versions, strict=True)
    return [None if version is None or version == _torch.version(tensor) else version for tensor, version in pairs]


def share_memory(one: Any, other: Any) -> bool:
    """Whether two tensors have a number in common, so that who changes one changes the other."""
    tensors = (one, other)
    if one is other or any(x.layout is not torch.strided or x.device.type == "meta" for x in tensors):
        return one is other
    if one.device != other.device or not (one.numel() and other.numel()):
        return False
    first, second = (_bytes(x) for x in tensors)
    if first.stop <= second.start or second.stop <= first.start:
        return False
    size = one.element_size()
    if size != other.element_size() or (first.start - second.start) % size:
        return True
    start = min(first.start, second.start)
    covered = torch.zeros((max(first.stop, second.stop) - start) // size, dtype=torch.bool)
    covered[_places(one, (first.start - start) // size)] = True
    return bool(covered[_places(other, (second.start - start) // size)].any())


def place_in(whole: torch.Tensor, part: torch.Tensor) -> int | None:
    """Where in the numbers of one tensor another begins that is a part of it; None where it is none.

    Of a tensor whose copies are laid out as it is itself: without holes.
    """
    inside, size = part.data_ptr() - whole.data_ptr(), whole.element_size()
    is_dense = torch.empty_like(whole, device="meta").stride() == whole.stride() and _extent(whole) == whole.numel()
    is_plain = whole.dtype == part.dtype and not any(x.is_conj() or x.is_neg() for x in (whole, part))
    if not is_dense or not is_plain or inside < 0 or inside % size or _bytes(part).stop > _bytes(whole).stop:
        return None
    return inside // size


def _bytes(tensor: torch.Tensor) -> range:
    """The addresses from its first number to behind its last."""
    start = tensor.data_ptr()
    return range(start, start + _extent(tensor) * tensor.element_size())


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _places(tensor: torch.Tensor, start: int) -> torch.Tensor:
    return start + torch.arange(_extent(tensor)).as_strided(tensor.shape, tensor.stride()).flatten()
