"""Values without numbers, with symbols for sizes, to trace a program with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from fxsight import _torch
from fxsight.example_sizes import size_number
from fxsight.spec import TensorSpec, symbol


class Shapes:
    """Values without numbers for a program's placeholders; sizes are symbols, but those that are 0, 1 or fixed."""

    def __init__(self, sizes: Mapping[str, int], fixed: Sequence[str]) -> None:
        self.mode = _torch.symbolic_mode()
        free = {name: n for name, n in sizes.items() if n > 1 and name not in fixed}
        made = _torch.symbolic_sizes(self.mode, free)
        self._inner: dict[Any, Any] = {symbol(name): _torch.size_expr(size) for name, size in made.items()}
        self.names: dict[Any, sympy.Symbol] = {inner: name for name, inner in self._inner.items()}
        self._static = {name: n for name, n in sizes.items() if name not in free}
        self._fixed, self._free = fixed, free
        self._numbers = {symbol(name): n for name, n in sizes.items()}

    def value(self, spec: Any) -> Any:
        """A tensor or number of some spec."""
        if not isinstance(spec, TensorSpec):
            return self._size(spec.expr)
        shape = [self._size(d) for d in spec.shape]
        stride = [self._size(d) for d in spec.stride] if all(map(self._is_known, spec.stride)) else _apart(shape)
        with self.mode:
            return torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device)

    def _is_known(self, step: Any) -> bool:
        """Whether sizes tell a step in memory; those of a slice of something larger do not."""
        return isinstance(step, int) or step.free_symbols <= set(self._numbers)

    def conditions(self) -> tuple[Any, ...]:
        """What has been assumed of the sizes."""
        env: Any = self.mode.shape_env
        assumed = [guard.expr.xreplace(self.names) for guard in env.guards]
        static = [sympy.Eq(symbol(s), n) for s, n in self._static.items() if s not in self._fixed]
        found = [*(sympy.Ge(symbol(s), 2) for s in self._free), *static, *assumed]
        return tuple(e for e in dict.fromkeys(found) if e not in (sympy.true, True))

    def _size(self, dim: Any) -> Any:
        if isinstance(dim, int):
            return dim
        expr = dim.xreplace({symbol(s): sympy.Integer(n) for s, n in self._static.items()}).xreplace(self._inner)
        if not expr.free_symbols:
            return int(expr)
        return _torch.symbolic_number(self.mode, expr, size_number(dim, self._numbers))


def _apart(shape: Sequence[Any]) -> list[Any]:
    """Steps in memory with something between the rows, as in a slice of something larger."""
    steps: list[Any] = [1] if shape else []
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size + 1)
    return steps[::-1]
