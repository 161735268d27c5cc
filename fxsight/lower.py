"""Program → callable, in two tiers behind one interface.

eager: the graph as Python, ready at once; the same kernels in the same order as the module, so the same bits.
inductor: compiled with free sizes; the same numbers within ``TOLERANCE``. It is compiled region by region
(``regions``), so that blocks that are alike are compiled once; in one piece where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import fx

from fxsight import _torch
from fxsight.artifacts import Artifacts
from fxsight.driver import can_drive, drive
from fxsight.editor import copy_graph
from fxsight.effects import is_random
from fxsight.errors import TraceError
from fxsight.fakes import Untraceable, propagate
from fxsight.node import binding_of
from fxsight.program import Program
from fxsight.regions import cut
from fxsight.spec import TensorSpec, number
from fxsight.straight import straight

Tier = Literal["eager", "inductor"]
Lowered = Callable[..., Sequence[Any]]

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
    interpreter = fx.Interpreter(_graph_module(program), garbage_collect_values=False)

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
            compile_it = inductor if self.is_whole else by_regions
            self._lowered = compile_it(self._program, arguments, self._fixed, self._artifacts)
        self.calls += 1
        return self._lowered(*arguments)

    def compile_whole(self) -> None:
        """From the next run on, compiled in one piece: minutes for a large program, and the fastest runs after it.

        Raises: TraceError when the program runs op by op.
        """
        if self.tier != "inductor":
            raise TraceError("this program runs op by op, bit for bit: trace it with backend='inductor' to compile it")
        if not self.is_whole:
            self.is_whole, self._lowered = True, None


def by_regions(program: Program, arguments: Sequence[Any], fixed: Mapping[str, int], artifacts: Artifacts) -> Lowered:
    """The program compiled by Inductor region by region, for all sizes it is free in.

    A body that looked at sizes holds for ``fixed`` ones alone, but seldom depends on them: it is compiled for all
    sizes, too, so that it shares its artifacts with others, and for these alone only where torch refuses that.
    arguments: as for ``inductor``, which does what regions cannot (``driver.can_drive``).

    Raises: InputError where a size depends on numbers.
    """
    if not can_drive(program, arguments):
        return inductor(program, arguments, fixed, artifacts)
    regions = cut(program)
    for known in ({}, fixed) if fixed else ({},):
        with suppress(Untraceable):
            return drive(program, regions, arguments, known, _examples(program, known), artifacts)
    return inductor(program, arguments, fixed, artifacts)  # which says what torch refuses


def inductor(program: Program, arguments: Sequence[Any], fixed: Mapping[str, int], _: Artifacts) -> Lowered:
    """The program compiled by Inductor in one piece for all sizes it is free in, except ``fixed`` ones.

    One that draws random numbers runs op by op: Inductor keeps no order among draws, so they would be others.
    arguments: one run's placeholders, for devices and dtypes; their numbers do not matter.

    Raises: InputError where a size depends on numbers.
    """
    if any(map(is_random, program.graph.nodes)):
        return eager(program)
    module = _graph_module(program)
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    mode = _torch.symbolic_mode()
    example = [
        _example(mode, n, a, _examples(program, fixed), set(fixed)) for n, a in zip(places, arguments, strict=True)
    ]
    try:
        propagate(module, mode, example)
    except Untraceable as error:
        raise error.__cause__ or error from None
    compiled = _torch.compile_graph(module, example)
    inputs = [binding_of(place).kind == "input" for place in places]
    return lambda *args: compiled(*(a.contiguous() if i else a for a, i in zip(args, inputs, strict=True)))


def _graph_module(program: Program) -> fx.GraphModule:
    graph = copy_graph(program.graph)
    for node in graph.nodes:
        node.meta = {"spec": node.meta.get("spec"), "binding": node.meta.get("binding")}
    return fx.GraphModule(torch.nn.Module(), graph)


def _examples(program: Program, fixed: Mapping[str, int]) -> Mapping[str, int]:
    """A number for each free size: all different, so that equal numbers mean equal sizes."""
    numbers = dict(fixed)
    for size in program.sizes:
        low = max(size.low, 2)
        if size.name not in numbers:
            numbers[size.name] = next(
                n
                for n in range(low + 3, low + 10**4)
                if n not in numbers.values() and _allowed(program, {**numbers, size.name: n})
            )
    return numbers


def _allowed(program: Program, numbers: Mapping[str, int]) -> bool:
    """Whether the numbers break no guard among those whose sizes are all known."""
    return not any(
        all(s.name in numbers for s in guard.free_symbols)
        and guard.xreplace({s: numbers[s.name] for s in guard.free_symbols}) == False  # noqa: E712
        for guard in program.guards
    )


def _example(mode: Any, node: fx.Node, argument: Any, sizes: Mapping[str, int], fixed: set[str]) -> Any:
    spec = node.meta["spec"]
    if not isinstance(argument, torch.Tensor):
        return argument
    if binding_of(node).kind != "input" or not isinstance(spec, TensorSpec):
        return _torch.symbolic(mode, argument.detach(), [False] * argument.ndim)
    shape = [number(d, sizes) for d in spec.shape]
    free = [not isinstance(d, int) and not {str(s) for s in d.free_symbols} <= fixed for d in spec.shape]
    return _torch.symbolic(mode, torch.empty(shape, dtype=spec.dtype, device=spec.device), free)
