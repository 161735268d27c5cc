"""Whether an operator gives the same bits on fewer rows: tried, on random numbers of the very shapes.

A kernel's order of additions depends on shapes, strides and devices, not on the numbers; so a comparison of some
hundred thousand results on random ones decides it for this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxsight.node import binding_of, tensor_spec
from fxsight.passes.narrow_reads import Move, NarrowReads, moves, needs_layout, row_arguments
from fxsight.program import Program
from fxsight.spec import SizeSpec

Sizes = Mapping[str, int]
Known = dict[Any, bool]
ROWS = (1, 2, 4, 8, 16)


def narrow_exactly(program: Program, sizes: Sizes, weight: Callable[[str], Any], known: Known) -> Program:
    """The program with ``NarrowReads`` as far as, for inputs of these sizes, each operator gives the same bits.

    With the fewest rows for which all do (matrix products of few rows have kernels of their own); where there are none,
    without the operators that do not.
    weight: a parameter or buffer by name.  known: what has been tried; filled.
    """
    found = moves(program.graph, NarrowReads())
    if not found:
        return program
    wrong: tuple[str, ...] = ()
    for rows in ROWS:
        wrong = _wrong(program, found, rows, sizes, weight, known)
        if not wrong:
            return NarrowReads(rows)(program)
    but: tuple[str, ...] = ()
    while wrong:
        but += wrong
        found = moves(program.graph, NarrowReads(but=but))
        wrong = _wrong(program, found, ROWS[-1], sizes, weight, known)
    return NarrowReads(ROWS[-1], but)(program)


def _wrong(
    program: Program, found: Sequence[Move], rows: int, sizes: Sizes, weight: Callable[[str], Any], known: Known
) -> tuple[str, ...]:
    """The operators that give other bits when so many rows are kept."""
    kept = (replace(move, rows=max(rows, move.rows)) for move in found)
    return tuple(m.node for m in kept if not same_bits(program.nodes[m.node], m, sizes, weight, known))


def same_bits(node: fx.Node, move: Move, sizes: Sizes, weight: Callable[[str], Any], known: Known) -> bool:
    """Whether the operator on the rows that are kept gives the bits that they have in the whole."""
    if any(isinstance(a.meta.get("spec"), SizeSpec) for a in node.all_input_nodes):
        return False
    key = (node.target, _about(node, sizes), move.dim, move.start, move.end, torch.get_num_threads())
    if key not in known:
        known[key] = _try(node, move, sizes, weight)
    return known[key]


def _about(node: fx.Node, sizes: Sizes) -> str:
    """The arguments as far as a kernel can see them."""
    given = fx.map_arg((node.args, node.kwargs), lambda a: repr(_kind(a, sizes)))
    return repr(given)


def _kind(node: fx.Node, sizes: Sizes) -> Any:
    spec = tensor_spec(node).at(sizes)
    return spec.dtype, spec.shape, spec.stride, spec.device


def _try(node: fx.Node, move: Move, sizes: Sizes, weight: Callable[[str], Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    values = {a: _value(a, sizes, weight, generator) for a in node.all_input_nodes}
    rank = len(tensor_spec(node).shape)
    rows = set(row_arguments(node, move.dim))
    parts = {a: _rows_of(v, move.dim - rank + v.ndim, move) if a in rows else v for a, v in values.items()}
    if needs_layout(node):
        parts = {a: v.contiguous() if a in rows else v for a, v in parts.items()}
    with torch.no_grad():
        whole, part = (_call(node, given) for given in (values, parts))
    return torch.equal(_rows_of(whole, move.dim, move), part)


def _rows_of(value: torch.Tensor, dim: int, move: Move) -> torch.Tensor:
    rows: torch.Tensor = torch.ops.aten.slice.Tensor(value, dim, move.start, move.end)
    return rows


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> torch.Tensor:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    result: torch.Tensor = target(*args, **kwargs)
    return result


def _value(node: fx.Node, sizes: Sizes, weight: Callable[[str], Any], generator: torch.Generator) -> torch.Tensor:
    if node.op == "placeholder" and binding_of(node).kind == "weight":
        found: torch.Tensor = weight(str(binding_of(node).key))
        return found
    spec = tensor_spec(node).at(sizes)
    length = 1 + sum((n - 1) * s for n, s in zip(spec.numbers, spec.steps, strict=True))
    numbers = torch.randn(max(length, 1), generator=generator)
    return numbers.to(spec.device, spec.dtype).as_strided(spec.numbers, spec.steps)
