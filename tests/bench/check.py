"""Is it the same? Asked of every contender before it is timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

RELATIVE, ABSOLUTE = 1e-4, 1e-4  # for contenders with kernels or shapes of their own, float32


class Different(AssertionError):
    """A contender does not compute what the hooks compute."""


def largest_difference(what: str, results: Sequence[Tensor], expected: Sequence[Tensor], close: bool) -> float:
    """The largest absolute difference; 0.0 means the same bits.

    Raises: Different when number, shapes or dtypes differ, or values do: beyond the tolerance if ``close``,
    by a bit if not.
    """
    if [(t.shape, t.dtype) for t in results] != [(t.shape, t.dtype) for t in expected]:
        raise Different(f"{what} returns {list(map(_kind, results))}, hooks {list(map(_kind, expected))}")
    found = max((_difference(a, b) for a, b in zip(results, expected, strict=True)), default=0.0)
    same = all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    if close:
        same = all(torch.allclose(a, b, RELATIVE, ABSOLUTE) for a, b in zip(results, expected, strict=True))
    if not same:
        raise Different(f"{what} differs from hooks by {found:.1e}")
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
