"""Value numbers: equal numbers mean equal values, in one program or in many that run on the same inputs.

And what a value depends on: of the constants that vary from cell to cell, those that can change it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from fxsight.effects import is_random, mutated_storages, storages
from fxsight.node import Binding, binding_of
from fxsight.stage import Stage
from fxsight.targets import argument_text

Depends = frozenset[int]


class Numbering:
    """A number for each thing, the same for equal things."""

    def __init__(self) -> None:
        self._table: dict[Hashable, int] = {}
        self._inside: dict[Hashable, tuple[int, ...]] = {}

    def of(self, thing: Hashable) -> int:
        """The number of a thing."""
        return self._table.setdefault(thing, len(self._table))

    def inside(self, stage: Stage, values: Sequence[int], given: Callable[[Binding], Hashable]) -> tuple[int, ...]:
        """The numbers of what a stage gives: those that its operators would have in its place."""
        key = (stage, *values)
        if key not in self._inside:
            nodes = list(stage.graph.nodes)
            found = dict(zip(nodes[stage.given :], values, strict=False))
            for node in nodes[: stage.given]:
                found[node] = self.of(given(binding_of(node)))
            for node in nodes[len(found) : -1]:
                found[node] = self.of(formula(node, found.__getitem__))
            self._inside[key] = tuple(found[node] for node in stage.results)
        return self._inside[key]


def dependence(graph: fx.Graph, varies: Depends) -> Mapping[fx.Node, Depends]:
    """For each node, on which of the varying constants it depends.

    All that touches one memory which something changes depends on the same constants, so it is never torn apart.
    """
    nodes = list(graph.nodes)
    changed = mutated_storages(nodes)
    memory: dict[str, Depends] = dict.fromkeys(changed, frozenset())
    while True:
        before, found = dict(memory), dict[fx.Node, Depends]()
        for node in nodes:
            touched = touches(node) & changed if changed else ()
            found[node] = frozenset[int]().union(
                _given(node, varies), *(found[a] for a in node.all_input_nodes), *(memory[s] for s in touched)
            )
            memory.update(dict.fromkeys(touched, found[node]))
        if memory == before:
            return found


def _given(node: fx.Node, varies: Depends) -> Depends:
    if node.op != "placeholder" or binding_of(node).kind != "constant":
        return frozenset()
    return varies & {int(binding_of(node).key)}


def touches(node: fx.Node) -> frozenset[str]:
    """The memory that a node makes, reads or changes."""
    return storages(node).union(*(storages(source) for source in node.all_input_nodes))


def value_numbers(
    graph: fx.Graph,
    numbering: Numbering,
    given: Callable[[Binding], Hashable],
    own: Hashable,
    opened: bool = False,
) -> Mapping[fx.Node, int]:
    """The number of each node's value.

    given: what a placeholder's value is, so that equal things are equal values.  own: makes the numbers of values
    whose memory is changed those of this program alone.  opened: whether what stages give is to have the numbers that
    it has in programs in which their operators stand in their place.
    """
    changed = mutated_storages(graph.nodes)
    found: dict[fx.Node, int] = {}
    stages: dict[fx.Node, tuple[int, ...]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = numbering.of(given(binding_of(node)))
        elif node.op == "call_function":
            alone = bool(changed and touches(node) & changed) or is_random(node)
            if opened and isinstance(node.target, Stage):
                values: Any = node.args[1:]
                stages[node] = numbering.inside(node.target, [found[a] for a in values], given)
            found[node] = numbering.of((own, node.name)) if alone else _number(node, numbering, found, stages)
    return found


def _number(
    node: fx.Node,
    numbering: Numbering,
    found: Mapping[fx.Node, int],
    stages: Mapping[fx.Node, tuple[int, ...]],
) -> int:
    """stages: what those that have been opened give."""
    given: Any = node.args[0] if node.target is operator.getitem else None
    if given in stages:
        return stages[given][int(node.args[1])]  # type: ignore[arg-type]
    if len(stages.get(node, ())) == 1:
        return stages[node][0]
    return numbering.of(formula(node, found.__getitem__))


def formula(node: fx.Node, number: Callable[[fx.Node], int]) -> Hashable:
    """The function and its arguments, with value numbers for nodes."""

    def named(source: fx.Node) -> str:
        return f"%{number(source)}"

    return node.target, argument_text(node.args, named), argument_text(node.kwargs, named)


def has_effects(nodes: Iterable[fx.Node]) -> bool:
    """Whether running twice is not running once: random numbers are drawn, or what was given is changed."""
    nodes = list(nodes)
    changed = mutated_storages(nodes)
    given = (s for node in nodes if node.op == "placeholder" for s in storages(node))
    return any(is_random(n) for n in nodes) or bool(changed.intersection(given) if changed else False)
