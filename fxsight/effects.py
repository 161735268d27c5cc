"""Order among nodes beyond data: memory that is changed in place, and random numbers.

A program is not functional: the model's own in-place operators stay in it, and so do the user's where others share
the memory. Two rules keep the numbers those of the module: accesses to memory that is ever changed keep their order
around the changes, and operators that draw random numbers keep their order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.node import binding_of, origin_of
from fxsight.program import Program
from fxsight.spec import TensorSpec


def storages(node: fx.Node) -> frozenset[str]:
    """The memory a value may share, by name of its first node."""
    spec = node.meta.get("spec")
    return frozenset((spec.storage,)) if type(spec) is TensorSpec else frozenset(_storages(spec))


def _storages(spec: Any) -> Iterator[str]:
    if isinstance(spec, TensorSpec):
        yield spec.storage
    elif isinstance(spec, tuple):
        for part in spec:
            yield from _storages(part)


_NO_NUMBERS = (torch.ops.aten.detach_.default,)  # in place, and no number changes


def mutated_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments whose memory the operator changes, by its schema."""
    target = node.target
    if not isinstance(target, _torch.OpOverload) or target in _NO_NUMBERS or not _torch.schema(target).is_mutable:
        return ()
    found: list[fx.Node] = []
    for number, argument in enumerate(_torch.schema(target).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
            found += [v for v in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(v, fx.Node)]
    return tuple(found)


def is_random(node: fx.Node) -> bool:
    """Whether the operator draws random numbers (dropout counts only where it drops)."""
    target = node.target
    if isinstance(target, _torch.OpOverload):
        if target is torch.ops.aten.dropout.default:
            return bool(node.args[2]) and bool(node.args[1] != 0)
        return torch.Tag.nondeterministic_seeded in target.tags and not _drops_nothing(target, node)
    return getattr(target, "__name__", "") in _RANDOM


def _drops_nothing(target: _torch.OpOverload, node: fx.Node) -> bool:
    """Whether an operator that would draw for its dropout, as attention does, is called without any."""
    for number, argument in enumerate(_torch.schema(target).arguments):
        if argument.name == "dropout_p":
            given = (
                node.args[number] if number < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            )
            return isinstance(given, (int, float)) and bool(given == 0)
    return False


_RANDOM = frozenset(
    [
        "bernoulli",
        "bernoulli_",
        "dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "multinomial",
        "normal",
        "normal_",
        "poisson",
        "rand_like",
        "randn_like",
        "randint_like",
        "uniform_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "cauchy_",
        "random_",
        "rrelu",
        "gumbel_softmax",
    ]
)


SAME = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)  # the same memory, seen the same way


def first_same(node: fx.Node) -> fx.Node:
    """The first node of a program that is the same memory, seen the same way."""
    while node.op == "call_function" and node.target in SAME:
        node = node.all_input_nodes[0]
    return node


def base_of(node: fx.Node) -> fx.Node | None:
    """The argument whose memory a view is in; None for memory of its own."""
    mine = storages(node)
    return next((a for a in node.all_input_nodes if storages(a) & mine and node.name not in mine), None)


def is_in(node: fx.Node, whole: fx.Node) -> bool:
    """Whether a value is all or a part of another's memory, made of it by views."""
    target = first_same(whole)
    at: fx.Node | None = node
    while at is not None:
        at = first_same(at)
        if at is target:
            return True
        at = base_of(at)
    return False


def mutated_storages(nodes: Iterable[fx.Node]) -> frozenset[str]:
    """All memory that some node changes."""
    return frozenset(s for node in nodes for argument in mutated_arguments(node) for s in storages(argument))


def changes_inputs(program: Program) -> bool:
    """Whether a program changes what it is given in place."""
    changed = mutated_storages(program.graph.nodes)
    inputs = (n for n in program.graph.nodes if n.op == "placeholder" and binding_of(n).kind == "input")
    return any(storages(node) & changed for node in inputs)


def effect_edges(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs (earlier, later) that must keep their order though no data flows between them.

    ``nodes`` in the order of the program (by time).
    """
    nodes = list(nodes)
    changed = mutated_storages(nodes)
    readers: dict[str, list[fx.Node]] = {}
    writer: dict[str, fx.Node] = {}
    last_random: fx.Node | None = None
    for node in nodes:
        written = {s for a in mutated_arguments(node) for s in storages(a)}
        touched = {s for a in node.all_input_nodes for s in storages(a) if s in changed} | written
        for storage in touched:
            if storage in writer:
                yield writer[storage], node
            if storage in written:
                yield from ((reader, node) for reader in readers.pop(storage, []))
                writer[storage] = node
            else:
                readers.setdefault(storage, []).append(node)
        if is_random(node):
            if last_random is not None:
                yield last_random, node
            last_random = node


class Cycle(Exception):
    """The nodes cannot be ordered; ``nodes`` are those in the way."""

    def __init__(self, nodes: list[fx.Node]) -> None:
        super().__init__("cycle")
        self.nodes = nodes


def order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes in an order that respects data and effects, and otherwise their times.

    Raises: Cycle.
    """
    nodes = list(nodes)
    times = _times(nodes)
    by_time = sorted(nodes, key=times.__getitem__)
    known = set(nodes)
    after: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    waits: dict[fx.Node, int] = dict.fromkeys(nodes, 0)
    edges = [(a, n) for n in nodes for a in n.all_input_nodes if a in known]
    for first, second in [*edges, *effect_edges(by_time)]:
        after[first].append(second)
        waits[second] += 1
    ready = [(times[n], i, n) for i, n in enumerate(nodes) if not waits[n]]
    heapq.heapify(ready)
    rank = {n: i for i, n in enumerate(nodes)}
    done: list[fx.Node] = []
    while ready:
        node = heapq.heappop(ready)[2]
        done.append(node)
        for later in after[node]:
            waits[later] -= 1
            if not waits[later]:
                heapq.heappush(ready, (times[later], rank[later], later))
    if len(done) < len(nodes):
        raise Cycle([n for n in nodes if waits[n]])
    return done


def _times(nodes: list[fx.Node]) -> Mapping[fx.Node, float]:
    """When each node wants to run: the model's at their own time, others as soon as their inputs are there."""
    times: dict[fx.Node, float] = {}

    def time(node: fx.Node) -> float:
        if node not in times:
            own = origin_of(node).time
            times[node] = -1.0  # on the way: a cycle is found by ``order``
            inputs = node.all_input_nodes
            times[node] = float(own) if own >= 0 else max((time(a) for a in inputs), default=-1.0) + 1e-6 * bool(inputs)
        return times[node]

    for node in nodes:
        if node.op == "output":
            times[node] = float("inf")
        elif node.op == "placeholder":
            times[node] = -2.0
        else:
            time(node)
    return times


def schedule(graph: fx.Graph) -> None:
    """Put the nodes of a graph into that order.

    Raises: Cycle.
    """
    nodes = list(graph.nodes)
    ordered = order(nodes)
    if ordered == nodes:
        return
    for node in ordered[:-1]:
        ordered[-1].prepend(node)
