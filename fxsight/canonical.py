"""A region up to renaming: regions with the same text do the same, and one compiled artifact serves them all.

    s0: size like 5
    p0: f32[s0, 768]
    p1: f32[768]
    n0 = aten.mul.Tensor(p0, p1)
    return (n0,)

Names of nodes and sizes are numbers in order of appearance; weights, inputs and constants are inputs alike. Whatever a
compiler may look at is in the text: operators, plain arguments, dtypes, shapes, strides and devices of the inputs, the
example numbers of the sizes, and the conditions between them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx

from fxsight.regions import Region
from fxsight.spec import (
    SizeSpec,
    Spec,
    TensorSpec,
    contiguous_stride,
    parse_dims,
    parse_expr,
    parse_tensor,
    symbol,
)
from fxsight.targets import argument_text
from fxsight.text import node_line


@dataclass(frozen=True, eq=False)
class Canonical:
    """A region with the names of all its like.

    text: equal for regions that do the same in the same way.
    graph: sizes, then inputs, as placeholders with their ``spec``.  sizes: example number of each size.
    inputs: the values the placeholders after the sizes stand for.
    names: the program's name of each size, in order.  is_compiled: whether a compiler is given it.
    """

    text: str
    graph: fx.Graph
    sizes: Mapping[str, int]
    inputs: tuple[fx.Node, ...]
    names: tuple[str, ...]
    is_compiled: bool

    def renamed(self, spec: Spec) -> Spec:
        """The spec of a result, in the program's names of sizes."""
        return _renamed(spec, self._back())

    def holding(self, guard: Any) -> Any:
        """A condition on sizes, in the program's names of them."""
        return guard.xreplace(self._back())

    def _back(self) -> Mapping[Any, Any]:
        return {symbol(f"s{i}"): symbol(name) for i, name in enumerate(self.names)}


def canonical(
    region: Region, specs: Mapping[fx.Node, Spec], sizes: Mapping[str, int], guards: Iterable[Any]
) -> Canonical:
    """The region with canonical names.

    specs: of its inputs.  sizes: an example number for each size.  guards: conditions on sizes that always hold.
    """
    names = _names([specs[n] for n in region.inputs], sizes)
    new = {symbol(name): symbol(f"s{i}") for i, name in enumerate(names)}
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    for size in new.values():
        _placeholder(graph, str(size), SizeSpec(size))
    by_size = dict(zip(names, graph.nodes, strict=True))
    passed: list[fx.Node] = []
    for node in region.inputs:
        spec = specs[node]
        known = _known_size(spec, by_size)
        made[node] = known if known is not None else _placeholder(graph, f"p{len(passed)}", _renamed(spec, new))
        if known is None:
            passed.append(node)
    for i, node in enumerate(region.nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = graph.create_node("call_function", node.target, args, kwargs, f"n{i}")
        made[node].meta["is_tensor"] = isinstance(node.meta.get("spec"), TensorSpec)
    graph.output(tuple(made[node] for node in region.outputs))
    examples = {f"s{i}": sizes[name] for i, name in enumerate(names)}
    held = [str(g.xreplace(new)) for g in guards if {s.name for s in g.free_symbols} <= set(names)]
    text = _text(graph, examples, held) + ("" if region.is_compiled else "op by op\n")
    return Canonical(text, graph, examples, tuple(passed), names, region.is_compiled)


def _placeholder(graph: fx.Graph, name: str, spec: Spec) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["spec"] = spec
    return node


def _known_size(spec: Spec, sizes: Mapping[str, fx.Node]) -> Any:
    """What stands for a size: a number, or the placeholder of its name; None for anything else."""
    if not isinstance(spec, SizeSpec):
        return None
    if spec.expr.is_Integer:
        return int(spec.expr)
    return sizes[spec.expr.name] if spec.expr.is_Symbol else None


def _names(specs: Sequence[Spec], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The sizes in some specs, in order of appearance."""
    found: dict[str, None] = {}
    for spec in specs:
        dims = (*spec.shape, *spec.stride) if isinstance(spec, TensorSpec) else ()
        for dim in (spec.expr,) if isinstance(spec, SizeSpec) else dims:
            found.update(dict.fromkeys(name for name in sizes if symbol(name) in getattr(dim, "free_symbols", ())))
    return tuple(found)


def _renamed(spec: Spec, names: Mapping[Any, Any]) -> Spec:
    def dim(value: Any) -> Any:
        return value.xreplace(names) if isinstance(value, sympy.Basic) else value

    if isinstance(spec, TensorSpec):
        return replace(spec, shape=tuple(map(dim, spec.shape)), stride=tuple(map(dim, spec.stride)), storage="")
    return SizeSpec(dim(spec.expr)) if isinstance(spec, SizeSpec) else spec


def _text(graph: fx.Graph, sizes: Mapping[str, int], guards: Sequence[str]) -> str:
    given = [n for n in graph.nodes if n.op == "placeholder"]
    lines = [f"{name}: size like {value}" for name, value in sizes.items()]
    lines += [f"{n.name}: {write_spec(n.meta['spec'])}" for n in given[len(sizes) :]]
    lines += [node_line(n).strip() for n in graph.nodes if n.op == "call_function"]
    (returned,) = [n.args[0] for n in graph.nodes if n.op == "output"]
    where = [f"where {'; '.join(sorted(guards))}"] if guards else []
    return "\n".join([*lines, f"return {argument_text(returned)}", *where, ""])


def write_spec(spec: Spec) -> str:
    """A spec on one line: ``f32[s0, 8]``, with strides and device where they are not the usual ones; ``size s0``."""
    if not isinstance(spec, TensorSpec):
        return str(spec)
    stride = "" if spec.contiguous else f" strides {', '.join(map(str, spec.stride))}"
    return f"{spec}{stride}{'' if spec.device == 'cpu' else f' on {spec.device}'}"


def read_spec(text: str) -> Spec:
    """The inverse of ``write_spec``.

    Raises: TextError, SyntaxError for other text.
    """
    if text.startswith("size "):
        return SizeSpec(parse_expr(ast.parse(text.removeprefix("size "), mode="eval").body))
    head, _, device = text.partition(" on ")
    tensor, _, stride = head.partition(" strides ")
    dtype, shape = parse_tensor(tensor)
    steps = parse_dims(stride) if " strides " in head else contiguous_stride(shape)
    return TensorSpec(dtype, shape, steps, device or "cpu")
