"""Results in memory of their own, laid out as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxsight import _torch


def no_arguments(results: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Operators may return their argument itself (``dropout`` in eval): such a result is a copy."""
    taken = set(map(id, arguments))
    own = list(results)
    for place, result in enumerate(own):
        if id(result) in taken and isinstance(result, torch.Tensor):
            own[place] = _copy(result)
        taken.add(id(result))
    return own


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy laid out as the tensor is, expanded dimensions included: kernels choose by strides."""
    sizes = tensor.shape
    if not any(step == 0 and size > 1 for size, step in zip(sizes, tensor.stride(), strict=True)):
        return tensor.clone()
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
    return tensor[once].clone().expand(sizes)


def own_memory(results: Sequence[Any]) -> list[Any]:
    """Copies: those that share memory with each other still do, and with nothing else.

    Strides stay as they are: kernels choose by them.
    """
    found = list(results)
    shared: dict[Any, list[int]] = {}
    for place, result in enumerate(results):
        if isinstance(result, torch.Tensor):
            shared.setdefault(_memory(result), []).append(place)
    for places in shared.values():
        for place, copy in zip(places, _copies([results[place] for place in places]), strict=True):
            found[place] = copy
    return found


def _memory(tensor: torch.Tensor) -> Any:
    key = _torch.storage_key(tensor)
    if key is None or tensor.is_conj() or tensor.is_neg() or not tensor.numel():
        return ("alone", id(tensor))
    return key, tensor.dtype


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    one = tensors[0]
    if _memory(one)[0] == "alone":
        return [tensor.clone() for tensor in tensors]
    first = min(int(t.storage_offset()) for t in tensors)
    last = max(int(t.storage_offset()) + _extent(t) for t in tensors)
    flat = one.detach().as_strided((last - first,), (1,), first).clone()
    made: list[torch.Tensor] = []
    seen: set[int] = set()
    for tensor in tensors:
        base = flat.clone() if id(tensor) in seen else flat  # saved twice: two tensors
        made.append(base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - first))
        seen.add(id(tensor))
    return made


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
