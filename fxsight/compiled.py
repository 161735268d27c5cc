"""A program compiled by Inductor, for all sizes it is called with.

Compiling takes things for granted of sizes: that ``h[:, 7:]`` is not empty, when it was not for the example. These are
the guards of what is compiled. They are checked for all sizes that come; where one does not hold, what it belongs to is
compiled again, with the sizes that came as the example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.artifacts import Artifacts
from fxsight.driver import Driver, can_drive, drive, met, size_places
from fxsight.editor import copy_graph
from fxsight.effects import is_random
from fxsight.fakes import Untraceable, propagate
from fxsight.node import binding_of
from fxsight.program import Program
from fxsight.regions import Region, cut
from fxsight.spec import TensorSpec, number, symbol
from fxsight.straight import straight
from fxsight.worth import worthwhile

Lowered = Callable[..., Sequence[Any]]
REMEMBERED = 4096  # sizes for which it is known what is called


def by_regions(
    program: Program,
    arguments: Sequence[Any],
    fixed: Mapping[str, int],
    artifacts: Artifacts,
    pieces: Callable[[Program], Sequence[Region]] = cut,
) -> Lowered:
    """The program compiled region by region, for all sizes it is free in.

    A body that looked at sizes holds for ``fixed`` ones alone, but seldom depends on them: it is compiled for all
    sizes, too, so that it shares its artifacts with others, and for those of the arguments where torch refuses that.
    arguments: as for ``inductor``, which does what regions cannot (``driver.can_drive``).  pieces: how it is cut.

    Raises: InputError where a size depends on numbers.
    """
    if not can_drive(program, arguments):
        return inductor(program, arguments, fixed, artifacts)
    lowered = _BySizes(program, artifacts, worthwhile(program, pieces(program)))
    lowered.find(arguments)
    return lowered


def inductor(program: Program, arguments: Sequence[Any], fixed: Mapping[str, int], artifacts: Artifacts) -> Lowered:
    """The program compiled in one piece for all sizes it is free in, except ``fixed`` ones; for any program.

    One that draws random numbers runs op by op: Inductor keeps no order among draws, so they would be others.
    arguments: one run's placeholders, for devices and dtypes; their numbers do not matter.

    Raises: InputError where a size depends on numbers; NotReady where the artifacts are those that are there.
    """
    if any(map(is_random, program.graph.nodes)):
        return straight(program.graph, program.name)
    artifacts.check_may_compile()
    lowered = _InOnePiece(program, fixed)
    lowered.find(arguments)
    return lowered


class _BySizes:
    """Drivers of one program, and which of them holds for which sizes."""

    def __init__(self, program: Program, artifacts: Artifacts, regions: Sequence[Region]) -> None:
        self._program, self._artifacts, self._regions = program, artifacts, regions
        self._places = size_places(program)
        self._at = tuple(self._places.values())
        self._drivers: list[Driver] = []
        self._known: dict[tuple[int, ...], Lowered] = {}
        self._is_short = any(map(_is_long_slice, program.graph.nodes))

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        found = self._known.get(tuple([arguments[i].shape[dim] for i, dim in self._at]))
        return (self.find(arguments) if found is None else found)(*arguments)

    def find(self, arguments: Sequence[Any]) -> Lowered:
        """What holds for these arguments: compiled now, if nothing does.

        Raises: InputError where a size depends on numbers.
        """
        key = tuple(arguments[i].shape[dim] for i, dim in self._at)
        sizes = dict(zip(self._places, key, strict=True))
        short = {name: size for name, size in sizes.items() if size == 0 or (size == 1 and self._is_short)}
        holding = (d for d in self._drivers if d.fixed.keys() >= short.keys() and d.holds(sizes))
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        found = self._known[key] = next(holding, None) or self._made(arguments, sizes, short)
        return found

    def _made(self, arguments: Sequence[Any], sizes: Mapping[str, int], short: Mapping[str, int]) -> Lowered:
        for known in (short, sizes):
            with suppress(Untraceable):
                examples = _examples(self._program, known)
                driver = drive(self._program, self._regions, arguments, known, examples, self._artifacts)
                self._drivers.append(driver)
                return driver
        return inductor(self._program, arguments, sizes, self._artifacts)  # which says what torch refuses


def _is_long_slice(node: fx.Node) -> bool:
    """Whether a slice has a number that one row is too few for: two rows may be taken for granted of free sizes."""
    found: list[int] = []

    def look(value: Any) -> None:
        for part in (value.start, value.stop, value.step) if isinstance(value, slice) else (value,):
            if isinstance(part, (tuple, list)):
                list(map(look, part))
            elif type(part) is int and 1 < abs(part) < 2**62:
                found.append(part)

    name = getattr(node.target, "__name__", "")
    if node.op == "call_function" and any(word in name for word in ("slice", "getitem", "setitem", "narrow")):
        list(map(look, node.args[1:]))
    return bool(found)


class _InOnePiece:
    """One program compiled for free sizes where that holds, else for the very sizes."""

    def __init__(self, program: Program, fixed: Mapping[str, int]) -> None:
        self._program, self._fixed = program, fixed
        self._free: tuple[Lowered, Callable[[Sequence[Any]], bool]] | None = None
        self._known: dict[Any, Lowered] = {}

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        return self.find(arguments)(*arguments)

    def find(self, arguments: Sequence[Any]) -> Lowered:
        """What holds for these arguments: compiled now, if nothing does.

        Raises: InputError where a size depends on numbers.
        """
        key = tuple(a.shape if isinstance(a, torch.Tensor) else None for a in arguments)
        if key not in self._known:
            self._known[key] = self._made(arguments)
        return self._known[key]

    def _made(self, arguments: Sequence[Any]) -> Lowered:
        if self._free is None:
            with suppress(Untraceable):
                self._free = _compiled(self._program, arguments, self._fixed, is_free=True)
        if self._free is not None and self._free[1](arguments):
            return self._free[0]
        try:
            return _compiled(self._program, arguments, self._fixed, is_free=False)[0]
        except Untraceable as error:
            raise error.__cause__ or error from None


def _compiled(
    program: Program, arguments: Sequence[Any], fixed: Mapping[str, int], is_free: bool
) -> tuple[Lowered, Callable[[Sequence[Any]], bool]]:
    """The program in one piece, and whether it holds for some arguments.

    Raises: InputError where a size depends on numbers; Untraceable where torch refuses an operator.
    """
    module = graph_module(program)
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    mode, sizes = _torch.symbolic_mode(), _examples(program, fixed) if is_free else None
    example = [_example(mode, n, a, sizes, set(fixed)) for n, a in zip(places, arguments, strict=True)]
    propagate(module, mode, example)
    compiled = _torch.compile_graph(module, example)
    inputs = [binding_of(place).kind == "input" for place in places]
    env: Any = mode.shape_env
    symbols = list(_symbols(example))

    def holds(given: Sequence[Any]) -> bool:
        return met([g.expr for g in env.guards], {size: given[i].shape[dim] for i, dim, size in symbols})

    return lambda *args: compiled(*(a.contiguous() if i else a for a, i in zip(args, inputs, strict=True))), holds


def _symbols(example: Sequence[Any]) -> Iterator[tuple[int, int, Any]]:
    """Each dimension of an example that is a size by itself: argument, dimension, size."""
    for i, value in enumerate(example):
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            expr = _torch.size_expr(size)
            if expr.is_Symbol:
                yield i, dim, expr


def graph_module(program: Program) -> fx.GraphModule:
    """A copy of the program's graph, as a module."""
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
        and guard.xreplace({symbol(s.name): numbers[s.name] for s in guard.free_symbols}) == False  # noqa: E712
        for guard in program.guards
    )


def _example(mode: Any, node: fx.Node, argument: Any, sizes: Mapping[str, int] | None, fixed: set[str]) -> Any:
    """The fake twin of an argument; sizes: None for the argument's very sizes."""
    spec = node.meta["spec"]
    if not isinstance(argument, torch.Tensor):
        return argument
    if sizes is None or binding_of(node).kind != "input" or not isinstance(spec, TensorSpec):
        return _torch.symbolic(mode, argument.detach(), [False] * argument.ndim)
    shape = [number(d, sizes) for d in spec.shape]
    free = [not isinstance(d, int) and not {str(s) for s in d.free_symbols} <= fixed for d in spec.shape]
    return _torch.symbolic(mode, torch.empty(shape, dtype=spec.dtype, device=spec.device), free)
