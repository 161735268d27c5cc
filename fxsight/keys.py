"""What of the arguments of a statement decides what it gives, as keys that can be compared.

    h * mask    ->    ("call", torch.Tensor.mul, (tuple, (Value, 7), ("tensor", 0, torch.float32, (2, 8), ...)), ())

A value is its number in the body, a tensor of the user's its dtype, shape and strides: two bodies that differ in the
numbers of such tensors say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fxsight import _torch
from fxsight.known import Unknown
from fxsight.value import Value

_PLAIN = frozenset(
    [
        int,
        bool,
        type(None),
        complex,
        type(...),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        bytes,
    ]
)
_ALL = ("all",)  # the key of ``[:]``


class Keys:
    """The keys of one body.  names: of the model's weights by ``id``."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._ids: dict[int, int] = {}
        self._structures: dict[int, int] = {}

    def _key(self, leaf: Any) -> Any:
        """What of an argument decides what the statement gives.

        Raises: Unknown for an object that is not known here.
        """
        kind = type(leaf)
        if kind in _PLAIN:
            return (kind, leaf)
        if kind is Value:
            if leaf.walk is not self:
                raise Unknown
            return (Value, leaf.number)
        if kind is str:
            return leaf
        if kind is float:
            return (kind, leaf if leaf else str(leaf))  # -0.0 equals 0.0
        if kind is tuple or kind is list or kind is torch.Size:
            return (kind, *map(self._key, leaf))
        if kind is slice:
            if leaf.start is leaf.stop is leaf.step is None:
                return _ALL
            return (kind, self._key(leaf.start), self._key(leaf.stop), self._key(leaf.step))
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return self._tensor_key(leaf)
        if id(leaf) in self._structures:
            return ("structure", self._structures[id(leaf)])
        if kind is dict:
            return (kind, *((name, self._key(value)) for name, value in leaf.items()))
        raise Unknown

    def _tensor_key(self, tensor: torch.Tensor) -> Any:
        number = self._ids.get(id(tensor))
        if number is not None:
            return ("known", number)
        number = self._ids[id(tensor)] = len(self._tensors)
        self._tensors.append(tensor)
        self._versions.append(_torch.version(tensor))
        name = self._names.get(id(tensor))
        if name is not None:
            return ("weight", name)
        return ("tensor", number, tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.requires_grad)

    def learning(self, weights: Iterable[torch.Tensor], inputs: Sequence[Any]) -> Any:
        """What requires gradients now, and which tensors of the body are inputs."""
        places = {id(x): i for i, x in enumerate(inputs)}
        given = tuple(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        same = tuple(places.get(id(tensor), -1) for tensor in self._tensors)
        return (tuple(weight.requires_grad for weight in weights), given, same)
