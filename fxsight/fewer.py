"""A program that leaves out rows that nobody reads, from its second run on the same sizes on: exactly the same bits.

Whether fewer rows give the same bits has to be tried (``bits``), which costs about as much as the operators that are
tried. So a first run never tries, nor does a program of which little would be left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxsight.bits import Known, Sizes, narrowing
from fxsight.node import is_tensor, tensor_spec
from fxsight.passes.narrow_reads import Move, NarrowReads, moves
from fxsight.program import Program

REMEMBERED = 256  # sizes
LEAST = 50_000_000  # multiply-adds that are left out at least: a millisecond or two


class Fewer:
    """What is known of one such program.

    program: finished, without gradients.  sizes_of: of the leaves of a call.  weight: a parameter or buffer by name.
    make: what runs, of a program.  known: what has been tried; filled.
    """

    def __init__(
        self,
        program: Program,
        sizes_of: Callable[[Sequence[Any]], Sizes],
        weight: Callable[[str], Any],
        make: Callable[[Program], Any],
        known: Known,
    ) -> None:
        self._program, self._sizes_of, self._weight, self._make, self._known = program, sizes_of, weight, make, known
        self._runs: dict[Any, Any] = {}  # by sizes; None where all rows are computed
        self._seen: set[Any] = set()  # sizes
        self._made: dict[NarrowReads, Any] = {}
        self._moves: list[Move] | None = None

    def instead(self, leaves: Sequence[Any]) -> Any:
        """What runs on these inputs instead; None where the program itself does."""
        if self._moves == []:
            return None
        key = (torch.get_num_threads(), *(leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)))
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
        if self._moves is None:
            self._moves = moves(self._program.graph, NarrowReads(layout=True))
        sizes = self._sizes_of(leaves)
        if sum(self._left_out(move, sizes) for move in self._moves) < LEAST:
            return None
        asked = narrowing(self._program, sizes, self._weight, self._known)
        if asked is not None and asked not in self._made:
            self._made[asked] = self._make(asked(self._program))
        return None if asked is None else self._made[asked]

    def _left_out(self, move: Move, sizes: Mapping[str, int]) -> int:
        """Multiply-adds of a linear layer on the rows that are not read."""
        node = self._program.nodes[move.node]
        if node.target is not torch.ops.aten.linear.default:
            return 0
        weight = node.all_input_nodes[1]
        shape = tensor_spec(node).at(sizes).numbers
        width = tensor_spec(weight).at(sizes).numbers[-1] if is_tensor(weight) else 0
        rows = shape[move.dim]
        return math.prod(shape) // max(rows, 1) * max(rows - move.rows, 0) * width
