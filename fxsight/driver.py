"""A program run region by region: compiled regions called in order, each value dropped after its last use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from fxsight.artifacts import Artifact, Artifacts
from fxsight.canonical import Canonical, canonical
from fxsight.effects import mutated_arguments, storages
from fxsight.fakes import Untraceable
from fxsight.node import binding_of
from fxsight.program import Program
from fxsight.regions import Region
from fxsight.spec import SizeSpec, Spec, TensorSpec, contiguous_stride, symbol


@dataclass(frozen=True, eq=False)
class Step:
    """One call: the positions of its arguments, of its results, and of the values that nobody needs after it."""

    call: Callable[..., Sequence[Any]]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    frees: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Driver:
    """A program as steps over a list of values: its placeholders, then its sizes, then what the steps compute.

    plain: positions of the arguments that are to be contiguous.  sizes: argument and dimension of each size.
    fixed, guards: the sizes and the conditions on sizes for which it holds.
    """

    steps: tuple[Step, ...]
    plain: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    values: int
    returns: tuple[int, ...]
    fixed: Mapping[str, int]
    guards: tuple[Any, ...]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it may be called on inputs of these sizes."""
        fits = all(sizes[name] == size for name, size in self.fixed.items())
        return fits and met(self.guards, _numbers(sizes))

    def __call__(self, *arguments: Any) -> list[Any]:
        """Run; returns the results in order."""
        values = [*arguments, *(arguments[i].shape[dim] for i, dim in self.sizes)]
        for i in self.plain:
            values[i] = values[i].contiguous()
        values += [None] * (self.values - len(values))
        for step in self.steps:
            results = step.call(*[values[i] for i in step.takes])
            for i, result in zip(step.gives, results, strict=True):
                values[i] = result
            for i in step.frees:
                values[i] = None
        return [values[i] for i in self.returns]


def drive(
    program: Program,
    regions: Sequence[Region],
    arguments: Sequence[Any],
    fixed: Mapping[str, int],
    examples: Mapping[str, int],
    artifacts: Artifacts,
) -> Driver:
    """Compile the regions that are not compiled yet, and put them one after the other.

    arguments: one run's placeholders, for layouts, dtypes and sizes.  fixed: sizes that are numbers.
    examples: a number for each size, ``fixed`` ones included. A region that does not hold for the sizes of the
    arguments when it is compiled with these, is compiled with those.

    Raises: InputError where a size depends on numbers; Untraceable where torch refuses an operator.
    """
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    plain = tuple(i for i, n in enumerate(places) if _is_plain(n, arguments[i]))
    sizes = {name: place for name, place in size_places(program).items() if name not in fixed}
    free = {name: number for name, number in examples.items() if name not in fixed}
    given = {name: int(arguments[i].shape[dim]) for name, (i, dim) in sizes.items()}
    specs = {n: _given(n, a, fixed) for n, a in zip(places, arguments, strict=True)}
    specs |= {n: _fixed(n.meta["spec"], fixed) for n in program.graph.nodes if isinstance(n.meta.get("spec"), SizeSpec)}
    guards = [g.xreplace({symbol(name): value for name, value in fixed.items()}) for g in program.guards]
    at: dict[Any, int] = {key: i for i, key in enumerate([*places, *sizes])}
    taken: list[tuple[Callable[..., Sequence[Any]], tuple[int, ...], tuple[int, ...]]] = []
    needed: dict[Any, None] = {}
    for region in regions:
        forms = (canonical(region, specs, numbers, guards) for numbers in (free, given))
        form, artifact, held = _holding(forms, given, artifacts)
        needed |= dict.fromkeys(held)
        for node, spec in zip(region.outputs, artifact.results, strict=True):
            specs[node] = form.renamed(spec)
            at[node] = len(at)
        takes = tuple(at[key] for key in (*form.names, *form.inputs))
        taken.append((artifact.call, takes, tuple(at[n] for n in region.outputs)))
    returns = tuple(at[n] for n in program.results)
    steps = tuple(_steps(taken, returns, len(places)))
    return Driver(steps, plain, tuple(sizes.values()), len(at), returns, dict(fixed), tuple(needed))


def _holding(
    forms: Iterable[Canonical], sizes: Mapping[str, int], artifacts: Artifacts
) -> tuple[Canonical, Artifact, list[Any]]:
    """The first form whose artifact holds for some sizes, the artifact, and its conditions.

    Raises: InputError where a size depends on numbers; Untraceable where torch refuses an operator in all forms.
    """
    refused = Untraceable()
    for form in forms:
        try:
            artifact = artifacts.of(form)
        except Untraceable as error:
            refused = error
            continue
        held = [form.holding(guard) for guard in artifact.guards]
        if met(held, _numbers(sizes)):
            return form, artifact, held
    raise refused


def met(guards: Iterable[Any], numbers: Mapping[Any, Any]) -> bool:
    """Whether all conditions hold for sizes that are these numbers; a size without a number: not."""
    try:
        return all(guard.xreplace(numbers) == True for guard in guards)  # noqa: E712
    except ZeroDivisionError:  # a multiple of nothing
        return False


def _numbers(sizes: Mapping[str, int]) -> Mapping[Any, Any]:
    return {symbol(name): sympy.Integer(size) for name, size in sizes.items()}


def _steps(taken: Iterable[tuple[Any, Any, Any]], returns: Sequence[int], arguments: int) -> list[Step]:
    """The steps with what each may drop: what was computed and neither a later step nor the caller takes."""
    needed, steps = set(returns), list[Step]()
    for call, takes, gives in reversed(list(taken)):
        last = {i for i in (*takes, *gives) if i >= arguments and i not in needed}
        needed |= {*takes}
        steps.append(Step(call, takes, gives, tuple(sorted(last))))
    return steps[::-1]


def size_places(program: Program) -> dict[str, tuple[int, int]]:
    """For each named size the first placeholder and dimension that tells it."""
    found: dict[str, tuple[int, int]] = {}
    for i, node in enumerate(n for n in program.graph.nodes if n.op == "placeholder"):
        spec = node.meta["spec"]
        if binding_of(node).kind == "input" and isinstance(spec, TensorSpec):
            for dim, size in enumerate(spec.shape):
                if isinstance(size, sympy.Symbol):
                    found.setdefault(size.name, (i, dim))
    return found


def can_drive(program: Program, arguments: Sequence[Any]) -> bool:
    """Whether regions can do it: plain tensors, sizes that inputs tell, and no memory changed under two names."""
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    changed = {s for n in program.graph.nodes for a in mutated_arguments(n) for s in storages(a)}
    shared = [s for n in places for s in storages(n) if s in changed]
    told = size_places(program)
    return (
        all(not isinstance(a, torch.Tensor) or _is_strided(a) for a in arguments)
        and all(size.name in told for size in program.sizes)
        and len(shared) == len(set(shared))
    )


def _is_strided(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and tensor.layout is torch.strided


def _is_plain(node: fx.Node, argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and binding_of(node).kind in ("input", "constant")


def _given(node: fx.Node, argument: Any, fixed: Mapping[str, int]) -> Spec:
    """The spec of an argument: of an input with its free sizes, of anything else as it is."""
    spec = node.meta["spec"]
    if not isinstance(argument, torch.Tensor):
        return None
    if binding_of(node).kind == "input" and isinstance(spec, TensorSpec):
        known = _fixed(spec, fixed)
        assert isinstance(known, TensorSpec)
        return replace(known, stride=contiguous_stride(known.shape))
    shape = tuple(argument.shape)
    stride = contiguous_stride(shape) if _is_plain(node, argument) else argument.stride()
    return TensorSpec(argument.dtype, shape, tuple(stride), str(argument.device))


def _fixed(spec: Spec, fixed: Mapping[str, int]) -> Spec:
    numbers = {symbol(name): sympy.Integer(value) for name, value in fixed.items()}

    def known(dim: Any) -> Any:
        found = dim.xreplace(numbers) if isinstance(dim, sympy.Basic) else dim
        return int(found) if isinstance(found, sympy.Integer) else found

    if isinstance(spec, TensorSpec):
        return replace(spec, shape=tuple(map(known, spec.shape)), stride=tuple(map(known, spec.stride)))
    return SizeSpec(sympy.sympify(known(spec.expr))) if isinstance(spec, SizeSpec) else spec
