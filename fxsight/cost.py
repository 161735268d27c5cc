"""What a program costs, from its shapes alone: multiply-adds counted twice (FLOPs), and memory that is held.

An estimate before anything runs: matrix products, convolutions and attention are counted exactly, everything else as
one operation for each number it makes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxsight.effects import storages
from fxsight.errors import InputError
from fxsight.node import output_node
from fxsight.spec import TensorSpec
from fxsight.stage import Stage, Table
from fxsight.targets import target_name

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """flops: operations on numbers.  operators: nodes that are run."""

    flops: int = 0
    operators: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.operators + other.operators)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.operators * times)


def cost_of(nodes: Iterable[fx.Node], sizes: Sizes) -> Cost:
    """Of running some nodes once, for inputs of these sizes."""
    total = Cost()
    for node in nodes:
        if isinstance(node.target, Stage):
            total += cost_of(node.target.graph.nodes, sizes)
        elif node.op == "call_function" and not _of_stage(node):
            total += Cost(_flops(node, sizes), 1)
    return total


def _of_stage(node: fx.Node) -> bool:
    """Whether it only gives a stage its weights, or takes one of its results."""
    given = node.args[0] if node.target is operator.getitem else None
    return isinstance(node.target, Table) or (isinstance(given, fx.Node) and isinstance(given.target, Stage))


def _flops(node: fx.Node, sizes: Sizes) -> int:
    made = _count(node.meta.get("spec"), sizes)
    try:
        rule = _RULES.get(_name(node))
        shapes = [_shape(a, sizes) for a in node.args]
        return made if rule is None else rule(made, shapes)
    except (IndexError, InputError):  # a size that only running tells, or an argument given by keyword
        return made


def is_product(node: fx.Node) -> bool:
    """Whether it is a matrix product, a convolution or attention: what a library's kernel computes."""
    return node.op == "call_function" and _name(node) in _RULES


def _name(node: fx.Node) -> str:
    parts = target_name(node.target).split(".")
    return parts[1] if parts[0] == "aten" else parts[-1].strip("_")


def _shape(argument: Any, sizes: Sizes) -> tuple[int, ...]:
    spec = argument.meta.get("spec") if isinstance(argument, fx.Node) else None
    return spec.at(sizes).numbers if isinstance(spec, TensorSpec) else ()


def _sdpa(made: int, shapes: list[tuple[int, ...]]) -> int:
    """Scores and their sum over values: ``[..., queries, d] @ [..., d, keys] @ [..., keys, width]``."""
    query, key, value = shapes[:3]
    rows = math.prod(query[:-1])
    return 2 * rows * key[-2] * (query[-1] + value[-1])


_RULES: Mapping[str, Callable[[int, list[tuple[int, ...]]], int]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm"), lambda made, s: 2 * made * s[0][-1]),
    **dict.fromkeys(("addmm", "baddbmm"), lambda made, s: 2 * made * s[1][-1]),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), lambda made, s: 2 * made * math.prod(s[1][1:])),
    "scaled_dot_product_attention": _sdpa,
}


def _count(spec: Any, sizes: Sizes) -> int:
    """How many numbers a value has; 0 where only running tells."""
    if isinstance(spec, tuple):
        return sum(_count(part, sizes) for part in spec)
    try:
        return math.prod(spec.at(sizes).numbers) if isinstance(spec, TensorSpec) else 0
    except InputError:
        return 0


def bytes_of(spec: Any, sizes: Sizes) -> int:
    """Memory of a value; 0 where only running tells."""
    if isinstance(spec, tuple):
        return sum(bytes_of(part, sizes) for part in spec)
    return _count(spec, sizes) * spec.dtype.itemsize if isinstance(spec, TensorSpec) else 0


def peak_bytes(graph: fx.Graph, sizes: Sizes) -> int:
    """The most memory that the values of a program hold at once; weights and what it is given not counted."""
    last: dict[str, fx.Node] = {}
    made: dict[str, int] = {}
    for node in graph.nodes:
        for source in (node, *node.all_input_nodes):
            for storage in storages(source):
                last[storage] = node
        if node.op == "call_function":
            for storage in storages(node):
                made.setdefault(storage, bytes_of(node.meta["spec"], sizes))
    ends: dict[fx.Node, int] = {}
    for storage, node in last.items():
        ends[node] = ends.get(node, 0) + made.get(storage, 0)
    return _highest(graph, made, ends, sizes)


def _highest(graph: fx.Graph, made: Mapping[str, int], ends: Mapping[fx.Node, int], sizes: Sizes) -> int:
    held = most = 0
    seen: set[str] = set()
    for node in graph.nodes:
        fresh = storages(node) - seen if node.op == "call_function" else frozenset[str]()
        seen |= fresh
        most = max(most, held + (peak_bytes(node.target.graph, sizes) if isinstance(node.target, Stage) else 0))
        held += sum(made.get(storage, 0) for storage in fresh)
        most = max(most, held)
        held -= ends.get(node, 0) if node is not output_node(graph) else 0
    return most
