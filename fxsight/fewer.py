"""A program that leaves out rows and columns that nobody reads, from its second run on the same sizes on.

Every bit is the same: whether it is has to be tried (``bits``), which costs about as much as the operators that are
tried. So a first run never tries, nor does a program of which little would be left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxsight.bits import Known, Passes, Sizes, narrowed_by, of_one_size
from fxsight.columns import count, narrowable
from fxsight.node import is_tensor, tensor_spec
from fxsight.passes.narrow_reads import Move, NarrowReads, moves
from fxsight.program import Program
from fxsight.sizes import layouts, lie_as_captured

REMEMBERED = 256  # sizes
LEAST = 50_000_000  # multiply-adds that are left out at least: a millisecond or two


class Fewer:
    """What is known of one such program.

    program: finished, without gradients.  sizes: at which it was made.  sizes_of: of the leaves of a call.
    weight: a parameter or buffer by name.  make: what runs, of a program.  known: what has been tried; filled.
    """

    def __init__(
        self,
        program: Program,
        sizes: Sizes,
        sizes_of: Callable[[Sequence[Any]], Sizes],
        weight: Callable[[str], Any],
        make: Callable[[Program], Any],
        known: Known,
    ) -> None:
        self._sizes = dict(sizes)
        self._program, self._sizes_of, self._weight, self._make, self._known = program, sizes_of, weight, make, known
        self._runs: dict[Any, Any] = {}  # by sizes; None where all rows are computed
        self._seen: set[Any] = set()  # sizes
        self._made: dict[Passes, Any] = {}
        self._moves: list[Move] | None = None
        self._columns: list[tuple[fx.Node, int]] = []  # linear layers of which few columns are read, and how many

    def instead(self, leaves: Sequence[Any]) -> Any:
        """What runs on these inputs instead; None where the program itself does."""
        if self._moves == [] and not self._columns:
            return None
        key = (torch.get_num_threads(), *layouts(leaves))
        if key in self._runs:
            return self._runs[key]
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
            self._runs.clear()
        if key in self._seen:
            self._runs[key] = self._find(leaves)
        self._seen.add(key)
        return self._runs.get(key)

    def _find(self, leaves: Sequence[Any]) -> Any:
        graph, sizes = self._program.graph, self._sizes_of(leaves)
        if self._moves is None:
            self._moves = moves(graph, NarrowReads(layout=True))
            self._columns = [(node, count([p for r in found for p in r.pieces])) for node, found in narrowable(graph)]
        if not lie_as_captured(self._program, leaves, sizes):
            return None
        rows = sum(self._rows_left_out(move, sizes) for move in self._moves)
        if rows + sum(self._columns_left_out(*layer, sizes) for layer in self._columns) < LEAST:
            return None
        but = () if sizes == self._sizes else of_one_size(self._program)
        passes, narrowed = narrowed_by(self._program, sizes, self._weight, self._known, but)
        if narrowed is self._program:
            return None
        if passes not in self._made:
            self._made[passes] = self._make(narrowed)
        return self._made[passes]

    def _rows_left_out(self, move: Move, sizes: Mapping[str, int]) -> int:
        """Multiply-adds of a linear layer on the rows that are not read."""
        node = self._program.nodes[move.node]
        if node.target is not torch.ops.aten.linear.default:
            return 0
        shape, width = _work(node, sizes)
        rows = shape[move.dim]
        return math.prod(shape) // max(rows, 1) * max(rows - move.rows, 0) * width

    def _columns_left_out(self, node: fx.Node, read: int, sizes: Mapping[str, int]) -> int:
        """Multiply-adds of a linear layer for the columns that are not read."""
        shape, width = _work(node, sizes)
        return math.prod(shape[:-1]) * max(shape[-1] - read, 0) * width


def _work(node: fx.Node, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], int]:
    """The shape of what a linear layer gives, and how many multiply-adds each of its numbers takes."""
    weight = node.all_input_nodes[1]
    width = tensor_spec(weight).at(sizes).numbers[-1] if is_tensor(weight) else 0
    return tensor_spec(node).at(sizes).numbers, width
