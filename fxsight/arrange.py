"""The order in which a joint graph runs: what a body computes, where its values can go soon.

The model's operators and their gradients stay in the order in which they were traced. What the body computes is put
between them, depth first from what needs it: no earlier than it must be, and as soon as it can be where it makes
little out of much, as sums of values times gradients do, and nothing larger on the way. Nothing but the order changes,
so no bit does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.effects import is_random, mutated_arguments
from fxsight.joint import Joint
from fxsight.node import origin_of
from fxsight.spec import number
from fxsight.tree import flatten

LITTLE = 4  # times smaller than the largest value of the model that it is made of


def arranged(joint: Joint, sizes: Mapping[str, int]) -> list[fx.Node]:
    """All operators of a joint graph in that order.  sizes: an example of each free size."""
    return list(_Arranger(joint, sizes).nodes())


class _Arranger:
    """One graph: what stays, when each of the others can run, and which of them run as soon as they can."""

    def __init__(self, joint: Joint, sizes: Mapping[str, int]) -> None:
        self._joint, self._sizes, self._known = joint, sizes, dict[Any, int]()
        self._all = [n for n in joint.graph.nodes if n.op in ("call_function", "get_attr")]
        self._free = {n for n in self._all if self._is_free(n)} - self._with_effects()
        self._place = {n: place for place, n in enumerate(n for n in self._all if n not in self._free)}
        self._first = min((self._place[n] for n in self._place if self._is_backward(n)), default=len(self._place))
        self._done: set[fx.Node] = set()

    def nodes(self) -> Iterator[fx.Node]:
        """In order."""
        soon = self._soon()
        yield from self._run(soon.get(-1, ()))
        for node, place in self._place.items():
            yield from self._run((node,))
            yield from self._run(soon.get(place, ()))
        yield from self._run(self._all)

    def _run(self, wanted: Sequence[fx.Node]) -> Iterator[fx.Node]:
        """These, and before each of them what it needs and is not there yet."""
        waiting = list(reversed(wanted))
        while waiting:
            node = waiting[-1]
            needed = [a for a in node.all_input_nodes if a.op != "placeholder" and a not in self._done]
            if node in self._done or not needed:
                waiting.pop()
                if node not in self._done:
                    self._done.add(node)
                    yield node
            else:
                waiting += reversed(needed)

    def _soon(self) -> dict[int, list[fx.Node]]:
        """What runs as soon as it can: results, and what makes little of gradients; by the place that it waits for."""
        ready, given_to, made_for = dict[fx.Node, int](), dict[fx.Node, int](), dict[fx.Node, int]()
        found: dict[int, list[fx.Node]] = {}
        results = set(self._joint.results)
        for node in self._all:
            if node in self._free:
                given = [a for a in node.all_input_nodes if a.op != "placeholder"]
                ready[node] = max((ready.get(a, self._place.get(a, -1)) for a in given), default=-1)
                size = self._size(node)
                of = given_to[node] = max((given_to.get(a) or self._size(a) for a in given), default=0)
                made_for[node] = max([size, *(made_for.get(a, 0) for a in given)])
                is_little = size * LITTLE <= of and made_for[node] <= of
                if node in results or (ready[node] >= self._first and is_little):
                    found.setdefault(ready[node], []).append(node)
        return found

    def _is_free(self, node: fx.Node) -> bool:
        source, is_backward = self._joint.origins.get(node, (None, True))
        return source is not None and not is_backward and origin_of(source).call < 0

    def _is_backward(self, node: fx.Node) -> bool:
        return self._joint.origins.get(node, (None, False))[1]

    def _with_effects(self) -> set[fx.Node]:
        """What draws random numbers, and what touches memory that something changes."""
        changed = {key for n in self._all for a in mutated_arguments(n) for key in _memory(a)}
        touched = (n for n in self._all if any(not changed.isdisjoint(_memory(a)) for a in (n, *n.all_input_nodes)))
        return {*touched, *filter(is_random, self._all)}

    def _size(self, node: fx.Node) -> int:
        """Numbers in a value."""
        shape = getattr(node.meta.get("val"), "shape", ())
        return math.prod(d if isinstance(d, int) else self._number(_torch.size_expr(d)) for d in shape)

    def _number(self, expr: Any) -> int:
        if expr not in self._known:
            self._known[expr] = number(expr.xreplace(self._joint.names), self._sizes)
        return self._known[expr]


def _memory(node: fx.Node) -> set[int]:
    keys = (_torch.storage_key(v) for v in flatten(node.meta.get("val"))[0] if isinstance(v, torch.Tensor))
    return {key for key in keys if key is not None}
