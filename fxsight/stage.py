"""Stages: several operators of a program as one call, so that many programs can have them without their nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

STAGED = "_staged"  # behind the name of an operator: its value, as a stage gives it


@dataclass(frozen=True, eq=False)
class Stage:
    """Consecutive operators of a program, as a function ``stage(table, *values)``.

        relu = aten.relu.default(x)
        linear = aten.linear.default(relu, weight)
    is ``linear = stage(table, x)``: the same kernels in the same order.

    title: the block that they are of.  make: makes ``graph``, when that is asked for.
    run: the graph as a function that returns its results in order; stages that differ in weights alone share its code.
    weights: their names in the module.  literals: tensors of the model's own code.
    """

    title: str
    make: Callable[[], fx.Graph] = field(repr=False)
    run: Callable[..., list[Any]] = field(repr=False)
    weights: tuple[str, ...] = field(repr=False)
    literals: Mapping[str, torch.Tensor] = field(repr=False)

    @cached_property
    def graph(self) -> fx.Graph:
        """The operators; its placeholders are the weights, the literals, then what the stage takes."""
        return self.make()

    @property
    def given(self) -> int:
        """How many of the graph's placeholders are weights and literals."""
        return len(self.weights) + len(self.literals)

    @property
    def results(self) -> Sequence[fx.Node]:
        """What the graph returns."""
        found: Any = next(iter(reversed(self.graph.nodes))).args[0]
        return list(found)

    def __call__(self, table: Mapping[Stage, Sequence[Any]], *values: Any) -> Any:
        """The value where it is one, else a list of them.  table: for each stage its weights and literals."""
        found = self.run(*table[self], *values)
        return found[0] if len(found) == 1 else found


@dataclass(frozen=True, eq=False)
class Table:
    """A function without arguments: for each stage its weights, as they are now, and its literals."""

    find: Callable[[], Mapping[Stage, Sequence[Any]]] = field(repr=False)
    title: str = "table"

    def __call__(self) -> Mapping[Stage, Sequence[Any]]:
        """Looked up in the module."""
        return self.find()


def operators(graph: fx.Graph) -> list[str]:
    """The names of a graph's nodes, those inside of stages included."""
    inner = [operators(n.target.graph) if isinstance(n.target, Stage) else [n.name] for n in graph.nodes]
    return [name for names in inner for name in names]
