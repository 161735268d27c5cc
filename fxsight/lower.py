"""Program → callable, in two tiers behind one interface.

eager: the graph as Python, ready at once; the same kernels in the same order as the module, so the same bits.
inductor: compiled with free sizes; the same numbers within ``TOLERANCE``. It is compiled region by region
(``regions``), so that blocks that are alike are compiled once; in one piece where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxsight.artifacts import Artifacts
from fxsight.auto import Auto, Exact, Tier
from fxsight.compiled import Lowered, graph_module
from fxsight.errors import TraceError
from fxsight.program import Program
from fxsight.straight import straight
from fxsight.tolerance import TOLERANCE as TOLERANCE
from fxsight.tolerance import Difference
from fxsight.varying import compile_for


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

    tier: how it runs; with ``auto`` how it has run the last time.  fixed: sizes that the program holds for alone.
    artifacts: compiled regions.  auto: what runs it in the first tier, and in the second when that has been compiled.
    is_whole: whether it is compiled in one piece.
    """

    def __init__(
        self, program: Program, tier: Tier, fixed: Mapping[str, int], artifacts: Artifacts, auto: Auto | None = None
    ) -> None:
        self.auto = auto
        self.is_whole = False
        self._tier: Tier = tier
        self._program, self._fixed, self._artifacts = program, dict(fixed), artifacts
        self._lowered: Lowered | None = eager(program) if tier == "eager" and auto is None else None

    @property
    def tier(self) -> Tier:
        """How it runs, or has run the last time."""
        return self._tier if self.auto is None else self.auto.tier

    @property
    def difference(self) -> Difference | None:
        """How far compiled results were from the exact ones, where both were computed."""
        return None if self.auto is None else self.auto.difference

    def explain(self) -> str:
        """How it runs, in words."""
        if self.auto is not None:
            return self.auto.explain()
        how = "in one piece" if self.is_whole else "by regions"
        return "eager: op by op" if self._tier == "eager" else f"inductor: compiled {how}, within lower.TOLERANCE"

    def __call__(self, arguments: Sequence[Any], exact: Exact | None = None) -> Sequence[Any]:
        """The results for one run's placeholders.

        exact: for ``auto``: the same results op by op, sooner; None where nothing does that.

        Raises: InputError where a size depends on numbers and the tier is inductor.
        """
        if self.auto is not None:
            return self.auto(arguments, exact)
        if self._lowered is None:
            self._lowered = compile_for(self._program, arguments, self._fixed, self._artifacts, self.is_whole)
        return self._lowered(*arguments)

    def compile_whole(self) -> None:
        """From the next run on, compiled in one piece: minutes for a large program, and the fastest runs after it.

        Raises: TraceError when the program runs op by op.
        """
        if self._tier != "inductor":
            raise TraceError("this program runs op by op, bit for bit: trace it with backend='inductor' to compile it")
        if not self.is_whole:
            self.is_whole, self._lowered = True, None
