"""What one operator is made of: a small graph of plain operators, traced on shapes, no matter where it stands.

An operator is called by our own formula (``reference``), or by torch's decomposition where we have written none. The
sizes that are free in the program are symbols in the trace. What the trace has assumed of them on its way is kept as
conditions: for other sizes the parts are not the operator.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import sympy
import torch
from functorch import make_fx  # type: ignore[import-untyped]
from torch import fx, nn

from fxsight import _torch, reference
from fxsight.effects import mutated_arguments
from fxsight.errors import UnknownAddress
from fxsight.example_sizes import Known, Numbers, example_sizes, size_number, symbols_of
from fxsight.node import Size, spec_of_node
from fxsight.open_call import OpenCall
from fxsight.provenance import Scribe
from fxsight.source import SourceReader
from fxsight.spec import SizeSpec, Spec, TensorSpec
from fxsight.targets import target_name

_aten = torch.ops.aten
PLAIN = (operator.getitem, _aten.alias.default, _aten.detach.default, _aten.sym_size.int)


@dataclass(frozen=True)
class Recipe:
    """One operator without its place: places with equal recipes are made of the same parts.

    target, arguments: what is called and, as text, with what.  specs: of its inputs.  known: of the sizes in them.
    node: the call, in a graph of its own whose placeholders are the inputs.
    """

    target: Any
    arguments: str
    specs: tuple[Spec, ...]
    known: Known
    node: fx.Node = field(compare=False)

    @staticmethod
    def of(node: fx.Node, sizes: Sequence[Size] = (), guards: Sequence[Any] = ()) -> Recipe:
        """The recipe of a node of a program with these sizes and guards."""
        graph, inputs = fx.Graph(), node.all_input_nodes
        places = {n: graph.placeholder(f"input_{i}") for i, n in enumerate(inputs)}
        copy = graph.node_copy(node, places.__getitem__)
        specs = tuple(_nameless(spec_of_node(n)) for n in inputs)
        known = Known.of(symbols_of(specs), sizes, guards)
        return Recipe(node.target, repr((copy.args, copy.kwargs)), specs, known, copy)

    def call(self, function: Callable[..., Any], values: Sequence[Any]) -> Any:
        """Call a function as the node calls its target, with values for its inputs."""
        given = dict(zip(self.node.all_input_nodes, values, strict=True))
        args, kwargs = with_values((self.node.args, self.node.kwargs), given)
        return function(*args, **kwargs)

    def works(self, function: Callable[..., Any], numbers: Numbers) -> bool:
        """Whether the function can be called with inputs of these sizes."""
        try:
            values = [_value(s, lambda d: size_number(d, numbers), nullcontext(), "meta") for s in self.specs]
            with torch.no_grad():
                self.call(function, values)
        except reference.NoFormula:
            raise
        except Exception:  # whatever torch raises for sizes that do not fit
            return False
        return True


@dataclass(frozen=True)
class Parts:
    """What an operator is made of.

    graph: of placeholders, one for each input, and operators.  calls: of the formula, itself first; none for torch's
    decompositions.  names: the program's sizes by those in the graph.  numbers: an example of each size, equal where
    the operator needs equal ones.  conditions: on the program's sizes, where the parts are the operator.  storages:
    the inputs', as ``spec_of`` has them.
    """

    graph: fx.Graph
    calls: tuple[OpenCall, ...]
    names: Mapping[Any, sympy.Symbol]
    numbers: Numbers
    conditions: tuple[Any, ...]
    storages: tuple[int | None, ...]


@functools.lru_cache(maxsize=32)
def decompose(recipe: Recipe) -> Parts:
    """Trace an operator on shapes: a second or so, once for all layers that are alike.

    Raises: UnknownAddress when it is not made of others, or is for some sizes only.
    """
    try:
        return _decompose(recipe)
    except Exception as error:  # whatever torch raises while it decomposes becomes one error
        raise UnknownAddress(f"{target_name(recipe.target)} cannot be opened: {error}") from error


def _decompose(recipe: Recipe) -> Parts:
    formula = reference.REFERENCES.get(recipe.target)
    if mutated_arguments(recipe.node):
        raise UnknownAddress("it changes memory in place")
    function = formula or recipe.target
    numbers = example_sizes(symbols_of(recipe.specs), recipe.known, lambda n: recipe.works(function, n))
    shapes = _Shapes(recipe.specs, numbers)
    scribe = None if formula is None else _Watcher(_module(formula), SourceReader())
    graph = _trace(recipe, shapes, scribe)
    if shapes.fixed:
        raise UnknownAddress(f"it is made in another way for each {', '.join(shapes.fixed)}")
    made = [n.target for n in graph.nodes if n.op not in ("placeholder", "output") and n.target not in PLAIN]
    if len(made) < 2 or any(n.op == "get_attr" for n in graph.nodes):
        raise UnknownAddress("it is not made of other operators")
    calls = tuple(scribe.calls) if scribe else ()
    return Parts(graph, calls, shapes.names, numbers, shapes.conditions(recipe.known), shapes.storages)


class _Watcher(Scribe):
    """Writes down the calls of a formula of ours."""

    def _is_own(self, code: CodeType) -> bool:
        return code.co_filename == reference.__file__


def _module(formula: Callable[..., Any]) -> nn.Module:
    module = nn.Module()
    module.forward = formula
    return module


def _trace(recipe: Recipe, shapes: _Shapes, scribe: Scribe | None) -> fx.Graph:
    def call(*values: Any) -> Any:
        with nullcontext() if scribe is None else scribe.watching():
            return recipe.call(recipe.target if scribe is None else scribe.root, values)

    known: Mapping[Any, Any] = torch.export.default_decompositions() if scribe is None else {}
    table = {recipe.target: known[recipe.target]} if recipe.target in known else {}
    with torch.no_grad(), _torch.honest_sizes():
        traced = make_fx(call, table, tracing_mode="symbolic", pre_dispatch=scribe is not None)(*shapes.values)
    graph: fx.Graph = traced.graph
    graph.eliminate_dead_code()
    return graph


def with_values(value: Any, given: Mapping[fx.Node, Any]) -> Any:
    """Arguments as Python's own lists and dicts, with values for nodes."""
    if isinstance(value, fx.Node):
        return given[value]
    if isinstance(value, (tuple, list)):
        members = [with_values(v, given) for v in value]
        return tuple(members) if isinstance(value, tuple) else members
    return {k: with_values(v, given) for k, v in value.items()} if isinstance(value, dict) else value


class _Shapes:
    """Values without numbers for some specs; the program's named sizes are symbols in them."""

    def __init__(self, specs: Sequence[Spec], numbers: Numbers) -> None:
        self.numbers, self._mode = numbers, _torch.symbolic_mode()
        self._steps = set(numbers) - set(symbols_of(specs, strides=False))
        shape = tuple(numbers.values())  # equal numbers become one symbol
        sized = _torch.symbolic(self._mode, torch.empty(shape, device="meta"), [True] * len(shape))
        self._sizes = dict(zip(numbers, sized.shape, strict=True))
        self._inner = {s: _torch.size_expr(size) for s, size in self._sizes.items()}
        self.names = {inner: s for s, inner in reversed(self._inner.items())}
        self.values = [_value(spec, self._size, self._mode) for spec in specs]
        self.storages = tuple(_torch.storage_key(v) if isinstance(v, torch.Tensor) else None for v in self.values)

    @property
    def fixed(self) -> list[str]:
        """Sizes that tracing has taken as plain numbers."""
        return [str(s) for s, size in self._sizes.items() if not _torch.size_expr(size).free_symbols]

    def conditions(self, known: Known) -> tuple[Any, ...]:
        """What has been assumed of the sizes, beyond what is known.

        What it has assumed of steps in memory that no size tells is left out: a value does not depend on them.

        Raises: UnknownAddress when that cannot be said in sizes of the program's inputs.
        """
        equal = [sympy.Eq(self.names[inner], s) for s, inner in self._inner.items() if self.names[inner] != s]
        assumed = [guard.expr.xreplace(self.names) for guard in self._env.guards]
        found = list(dict.fromkeys(e for e in (*equal, *assumed) if e not in (*known.guards, sympy.true)))
        found = [e for e in found if not e.free_symbols & self._steps]
        checked = {size.name for size in known.sizes}
        for condition in found:
            if not set(map(str, condition.free_symbols)) <= checked:
                raise UnknownAddress(f"it is made in this way for {condition} alone, which is only known when it runs")
        return tuple(found)

    @property
    def _env(self) -> Any:
        assert self._mode.shape_env is not None, "a symbolic mode has one"
        return self._mode.shape_env

    def _size(self, dim: Any) -> Any:
        number = size_number(dim, self.numbers)
        if isinstance(dim, int) or not dim.free_symbols:
            return number
        return self._env.create_symintnode(dim.xreplace(self._inner), hint=number)


def _nameless(spec: Spec) -> Spec:
    return replace(spec, storage="") if isinstance(spec, TensorSpec) else spec


def _value(spec: Spec, size: Callable[[Any], Any], mode: AbstractContextManager[Any], device: str = "") -> Any:
    """A tensor or number of some spec, with sizes made of its dimensions by ``size``."""
    if isinstance(spec, SizeSpec):
        return size(spec.expr)
    assert isinstance(spec, TensorSpec), f"an operator's input is a tensor or a size, not {spec}"
    shape, stride = [size(d) for d in spec.shape], [size(d) for d in spec.stride]
    with mode:
        return torch.empty_strided(shape, stride, dtype=spec.dtype, device=device or spec.device)
