"""How far results of another tier may be from the exact ones, and how far they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Largest difference of the inductor tier from the eager one, relative and absolute, by dtype: the reassociation that
# fused kernels do, as in torch.testing.assert_close.
TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (2e-2, 2e-2),
}
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class Difference:
    """How far some results are from the exact ones.

    absolute: the largest difference of two numbers.  relative: the same beside the largest exact number of its tensor,
    the largest of all tensors.  is_within: whether each tensor is within ``TOLERANCE`` of its largest number; whole
    numbers, truth values and places of NaN and infinity must be the same.
    """

    absolute: float = 0.0
    relative: float = 0.0
    is_within: bool = True

    def __or__(self, other: Difference) -> Difference:
        """The larger of two, field by field."""
        absolute, relative = max(self.absolute, other.absolute), max(self.relative, other.relative)
        return Difference(absolute, relative, self.is_within and other.is_within)

    def __str__(self) -> str:
        return f"{self.absolute:.2g}, {self.relative:.2g} of the largest number"


def difference(exact: Sequence[Any], found: Sequence[Any]) -> Difference:
    """How far ``found`` is from ``exact``, result by result; all that are no tensors must be equal."""
    total = Difference()
    for one, other in zip(exact, found, strict=True):
        total |= (
            _of(one.detach(), other.detach()) if isinstance(one, torch.Tensor) else Difference(is_within=one == other)
        )
    return total


def _of(exact: torch.Tensor, found: torch.Tensor) -> Difference:
    if exact.shape != found.shape or exact.dtype != found.dtype:
        return Difference(float("inf"), float("inf"), False)
    kept = exact.isfinite() & found.isfinite()
    alike = bool(((exact == found) | (exact.isnan() & found.isnan()) | kept).all())
    tolerance = TOLERANCE.get(_REAL.get(exact.dtype, exact.dtype), (0.0, 0.0))
    wide = torch.complex128 if exact.is_complex() else torch.float64
    numbers = exact[kept].to(wide)
    if not numbers.numel():
        return Difference(is_within=alike)
    largest = float(numbers.abs().max())
    absolute = float((numbers - found[kept].to(wide)).abs().max())
    relative = absolute / largest if largest else float(absolute > 0)
    return Difference(absolute, relative, alike and absolute <= tolerance[0] * largest + tolerance[1])
