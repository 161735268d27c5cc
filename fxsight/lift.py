"""Bodies that differ in numbers alone, as one intervention: the numbers that vary become constants of it.

    h[:, 3] = 0    and    h[:, 7] = 0    are one program with the positions 3 and 7 given to it

So a grid of cells is woven once for each place it edits, not once for each cell. Numbers that are the same in all
bodies stay where they are: a pass sees them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import fx

from fxsight.intervention import Intervention
from fxsight.mutate import mutate
from fxsight.node import Origin
from fxsight.spec import SizeSpec, symbol
from fxsight.tree import map_leaves

Number = int | float


@dataclass(frozen=True)
class Outline:
    """What one body asked for without its numbers: ``text``, shapes included, is equal for bodies that may be one."""

    text: str
    numbers: tuple[Number, ...]


def outline(asked: Intervention) -> Outline:
    """The numbers of a body, in order, and what is left without them."""
    numbers: list[Number] = []

    def show(node: fx.Node) -> tuple[Any, Any]:
        return _mapped(node, lambda number: _noted(number, numbers))

    text = asked.text(show)
    return Outline(f"{text}\n{[str(spec) for _, spec in asked.constants]}", tuple(numbers))


def _noted(number: Number, numbers: list[Number]) -> str:
    numbers.append(number)
    return f"#{type(number).__name__}"


def varying(bodies: Sequence[Outline]) -> tuple[int, ...]:
    """Which of their numbers are not the same in all bodies of one outline."""
    columns = zip(*(body.numbers for body in bodies), strict=True)
    return tuple(i for i, column in enumerate(columns) if any(_differ(x, column[0]) for x in column))


def _differ(a: Number, b: Number) -> bool:
    return a != b or str(a) != str(b)  # 0.0 and -0.0 are two numbers


def lifted(asked: Intervention, which: Sequence[int]) -> Intervention:
    """The same with some of its numbers as constants, behind those it has.

    which: numbers of ``outline(asked).numbers``, in order; the new constants are in that order.
    """
    if not which:
        return asked
    graph, made, new = fx.Graph(), dict[fx.Node, fx.Node](), list[tuple[str, SizeSpec]]()
    places = [_number_place(graph, f"number_{i}", new) for i in range(len(which))]
    slots = dict(zip(which, places, strict=True))
    seen = iter(range(10**9))

    def put(number: Number) -> Any:
        return slots.get(next(seen), number)

    for node in asked.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].args, made[node].kwargs = _mapped(made[node], put)
    return replace(asked, graph=graph, constants=(*asked.constants, *new))


def _number_place(graph: fx.Graph, name: str, new: list[tuple[str, SizeSpec]]) -> fx.Node:
    node = graph.placeholder(name)
    spec = SizeSpec(symbol(node.name))
    node.meta.update(spec=spec, origin=Origin(made_by="body"))
    new.append((node.name, spec))
    return node


def _mapped(node: fx.Node, fn: Callable[[Number], Any]) -> tuple[Any, Any]:
    """The arguments of a node with ``fn`` of each number that may vary; members of results are taken by fixed ones."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.args, node.kwargs
    if node.target is not mutate:
        args, kwargs = _inside((tuple(node.args), dict(node.kwargs)), fn)
        return args, kwargs
    base, views, name, args, kwargs = cast(tuple[Any, ...], node.args)
    steps = tuple(
        (view, *_inside((tuple(view_args), dict(view_kwargs)), fn), path)
        for view, view_args, view_kwargs, path in views
    )
    return (base, steps, name, *_inside((tuple(args), dict(kwargs)), fn)), {}


def _inside(value: Any, fn: Callable[[Number], Any]) -> Any:
    def leaf(x: Any) -> Any:
        if type(x) is int or type(x) is float:
            return fn(x)
        if isinstance(x, slice):
            return slice(*(leaf(part) for part in (x.start, x.stop, x.step)))
        return x

    return map_leaves(leaf, value)
