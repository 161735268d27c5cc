"""The sizes that are free in what torch.export returns: their names, their bounds, and what is assumed of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch

from fxsight import _torch
from fxsight.node import Size
from fxsight.spec import symbol

_SIZES = ("batch", "length", "height", "width")


class FreeSizes:
    """The sizes of one exported program.  names: by its symbols; of a symbol that is pinned, its number."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self.exported = exported
        self.names: dict[Any, sympy.Symbol] = {}
        self._name()

    def _name(self) -> None:
        """``batch`` and ``length`` for the first two dimensions, then the input's name and the dimension."""
        self.names.update(self._settled())
        inputs = {s.arg.name for s in self.exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
        for node in self.exported.graph_module.graph.nodes:
            value = node.meta.get("val") if node.name in inputs else None
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,) if value is not None else ()
            names = _SIZES if isinstance(value, torch.Tensor) else ("seen",)
            for dim, size in enumerate(sizes):
                expr = _torch.size_expr(size)
                if expr.is_Symbol and expr not in self.names:
                    self.names[expr] = symbol(self._size_name(names[dim] if dim < len(names) else f"size_{dim}"))

    def _settled(self) -> Mapping[Any, Any]:
        """Symbols that the model's code has pinned to a number."""
        env = self._shape_env()
        if env is None:
            return {}
        pinned = {s: e for s, e in env.replacements.items() if e.is_Integer}
        equal = [g.expr for g in env.guards if isinstance(g.expr, sympy.Eq)]
        pinned.update({e.lhs: e.rhs for e in equal if e.lhs.is_Symbol and e.rhs.is_Integer})
        return pinned

    def _shape_env(self) -> Any:
        tensors = (n.meta.get("val") for n in self.exported.graph.nodes)
        return _torch.shape_env(next((t for t in tensors if isinstance(t, torch.Tensor)), None))

    def _size_name(self, name: str) -> str:
        taken = {str(s) for s in self.names.values()}
        return name if name not in taken else next(f"{name}_{i}" for i in range(2, 1000) if f"{name}_{i}" not in taken)

    def sizes(self) -> Iterator[Size]:
        """The free sizes, with their bounds."""
        for old, new in [(old, new) for old, new in self.names.items() if new.is_Symbol]:
            bounds = self.exported.range_constraints.get(old)
            low = int(bounds.lower) if bounds is not None and bounds.lower.is_finite else 0
            finite = bounds is not None and bounds.upper.is_Integer and bounds.upper < 2**62
            yield Size(new.name, max(low, 0), int(bounds.upper) if finite and bounds is not None else None)

    def guards(self) -> Iterator[Any]:
        """What the model's code has assumed of free sizes, each once."""
        env = self._shape_env()
        seen: set[Any] = set()
        for guard in () if env is None else env.guards:
            expr = guard.expr.xreplace(self.names)
            known = all(s in self.names.values() for s in expr.free_symbols)
            if known and expr.free_symbols and expr not in seen:
                seen.add(expr)
                yield expr
