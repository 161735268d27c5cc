"""The tensors of a model's edits, by name: to be looked at, replaced, moved and trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fxsight.errors import EditError, nearest
from fxsight.spec import TensorSpec

if TYPE_CHECKING:
    from fxsight.edits import Edits


class EditParameters(MutableMapping[str, torch.Tensor]):
    """Name → tensor. They are bound at each run: another of the same shape and dtype compiles nothing again.

    edited.edit_parameters["steer"] *= 2
    edited.edit_parameters["steer"] = other
    torch.optim.Adam(edited.edit_parameters.requires_grad_().values())
    """

    def __init__(self, edits: Edits) -> None:
        self._edits = edits

    def _table(self) -> Mapping[str, tuple[int, int]]:
        return {name: (i, j) for i, edit in enumerate(self._edits) for j, name in enumerate(edit.names)}

    def _place(self, name: str) -> tuple[int, int]:
        table = self._table()
        if name not in table:
            listed = ", ".join(table) or "no tensors"
            raise KeyError(f"no tensor {name!r} in the edits; {nearest(name, table) or f'they have {listed}'}")
        return table[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        edit, number = self._place(name)
        found: torch.Tensor = self._edits[edit].tensors[number]
        return found

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        """Let the edit use another tensor.

        Raises: KeyError for an unknown name; EditError for another shape or dtype.
        """
        edit, number = self._place(name)
        before = self._edits[edit].tensors[number]
        given: Any = tensor
        if not isinstance(given, torch.Tensor) or (given.shape, given.dtype) != (before.shape, before.dtype):
            given = _shown(given) if isinstance(given, torch.Tensor) else f"a {type(given).__name__}"
            raise EditError(
                f"the tensor {name!r} of an edit is {_shown(before)}, and is given {given}; write another edit for that"
            )
        self._put(edit, number, tensor)

    def __delitem__(self, name: str) -> None:
        raise EditError(
            f"the tensor {name!r} belongs to an edit, which needs it; model.clear_edits() removes the edits"
        )

    def _put(self, edit: int, number: int, tensor: torch.Tensor) -> None:
        now = self._edits[edit]
        self._edits.put(edit, replace(now, tensors=(*now.tensors[:number], tensor, *now.tensors[number + 1 :])))

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())

    def to(self, device: torch.device | str) -> EditParameters:
        """Move all of them; those that are trained become parameters of their own there.  Returns: this mapping."""
        for name, (edit, number) in self._table().items():
            before = self[name]
            moved = before.detach().to(device).requires_grad_(before.requires_grad)
            self._put(edit, number, before if moved.device == before.device else moved)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> EditParameters:
        """Let those of a floating-point dtype have gradients, or not.  Returns: this mapping."""
        for tensor in self.values():
            if tensor.is_floating_point():
                tensor.requires_grad_(requires_grad)
        return self

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {_shown(tensor)}" for name, tensor in self.items()) or "no tensors"


def _shown(tensor: torch.Tensor) -> str:
    return str(TensorSpec(tensor.dtype, tuple(tensor.shape), ()))
