"""A program that leaves out what is not read, where that gives the same bits; the whole one for all other sizes.

Whether fewer rows give the same bits depends on sizes, so it is tried once for each (``bits``). The first sizes for
which they do not end the trying: from then on all that have not been tried run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxsight.bits import Known, Sizes, is_exact, of_one_size
from fxsight.passes.narrow_reads import NarrowReads, moves
from fxsight.program import Program
from fxsight.sizes import holds, layouts, lie_as_captured


class Narrowed:
    """What is known of one such program.

    woven: the program before the pass.  asked: the pass, for inputs of these ``sizes``.  sizes_of: of the leaves of a
    call.  weight: a parameter or buffer by name.  whole: makes what runs, for such sizes at least, where the bits are
    others.  known: what has been tried; filled.
    """

    def __init__(
        self,
        woven: Program,
        asked: NarrowReads,
        sizes: Sizes,
        sizes_of: Callable[[Sequence[Any]], Sizes],
        weight: Callable[[str], Any],
        whole: Callable[[Sizes], Any],
        known: Known,
    ) -> None:
        self._sizes = dict(sizes)
        self._woven, self._asked, self._sizes_of, self._weight, self._known = woven, asked, sizes_of, weight, known
        self._make, self._wholes = whole, list[Any]()
        self._tried: dict[Any, bool] = {}

    def instead(self, leaves: Sequence[Any]) -> Any:
        """What runs on these inputs instead; None where the bits are the same."""
        key = (torch.get_num_threads(), *layouts(leaves))
        if self._tried.get(key):
            return None
        sizes = self._sizes_of(leaves)
        if key not in self._tried:
            tries = not self._wholes and lie_as_captured(self._woven, leaves, sizes)
            self._tried[key] = tries and self._is_exact(sizes)
        return None if self._tried[key] else self._whole(sizes)

    def _is_exact(self, sizes: Sizes) -> bool:
        """Of what the body makes, shapes are known at its own sizes alone."""
        unknown = () if sizes == self._sizes else of_one_size(self._woven)
        if any(move.node in unknown for move in moves(self._woven.graph, self._asked)):
            return False
        return is_exact(self._woven, self._asked, sizes, self._weight, self._known)

    def _whole(self, sizes: Sizes) -> Any:
        found = next((whole for whole in self._wholes if holds(whole.program, sizes)), None)
        if found is None:
            found = self._make(sizes)
            self._wholes.append(found)
        return found
