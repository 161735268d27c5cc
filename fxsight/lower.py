"""Program → callable, in two tiers behind one interface.

eager: the graph as Python, ready at once; the same kernels in the same order as the module, so the same bits.
inductor: compiled with free sizes; the same numbers within ``TOLERANCE``. It is compiled region by region
(``regions``), so that blocks that are alike are compiled once; in one piece where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx

from fxsight.artifacts import Artifacts
from fxsight.compiled import Lowered, by_regions, graph_module
from fxsight.errors import TraceError
from fxsight.program import Program
from fxsight.regions import Region, cut, whole
from fxsight.straight import straight
from fxsight.varying import Varying, number_places

Tier = Literal["eager", "inductor"]

# Largest difference of the inductor tier from the eager one, relative and absolute, by dtype: the reassociation that
# fused kernels do, as in torch.testing.assert_close.
TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (2e-2, 2e-2),
}


def eager(program: Program) -> Lowered:
    """The program as one Python function of its placeholders; returns its results in order."""
    return straight(program.graph, program.name)


def keeping(program: Program) -> Callable[..., dict[str, Any]]:
    """The program as a function that returns every value it computes, by name of the node."""
    interpreter = fx.Interpreter(graph_module(program), garbage_collect_values=False)

    def run(*arguments: Any) -> dict[str, Any]:
        interpreter.run(*arguments)
        return {node.name: value for node, value in interpreter.env.items()}

    return run


class Lowering:
    """How one program runs: compiled at its first run, and kept from then on.

    fixed: sizes that the program holds for alone.  artifacts: compiled regions.
    calls: runs until now.  is_whole: whether it is compiled in one piece.
    """

    def __init__(self, program: Program, tier: Tier, fixed: Mapping[str, int], artifacts: Artifacts) -> None:
        self.tier: Tier = tier
        self.calls = 0
        self.is_whole = False
        self._program, self._fixed, self._artifacts = program, dict(fixed), artifacts
        self._lowered: Lowered | None = eager(program) if tier == "eager" else None

    def __call__(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The results for one run's placeholders.

        Raises: InputError where a size depends on numbers and the tier is inductor.
        """
        if self._lowered is None:
            self._lowered = self._compiled(arguments)
        self.calls += 1
        return self._lowered(*arguments)

    def _compiled(self, arguments: Sequence[Any]) -> Lowered:
        pieces = _one if self.is_whole else cut

        def compile_it(program: Program, given: Sequence[Any]) -> Lowered:
            return by_regions(program, given, self._fixed, self._artifacts, pieces)

        has_numbers = bool(number_places(self._program))
        return Varying(self._program, compile_it) if has_numbers else compile_it(self._program, arguments)

    def compile_whole(self) -> None:
        """From the next run on, compiled in one piece: minutes for a large program, and the fastest runs after it.

        Raises: TraceError when the program runs op by op.
        """
        if self.tier != "inductor":
            raise TraceError("this program runs op by op, bit for bit: trace it with backend='inductor' to compile it")
        if not self.is_whole:
            self.is_whole, self._lowered = True, None


def _one(program: Program) -> Sequence[Region]:
    return [whole(program)]
