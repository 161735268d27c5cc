"""The program: one forward as an immutable graph, small enough to print, cache and send.

A ``Program`` is an ``fx.Graph`` of ``placeholder`` and ``call_function`` nodes with a few rules (``verify`` checks
them): weights are named, never copied; each node knows its ``spec`` (dtype, symbolic shape, storage) and its
``origin`` (which call of the model, which line, which pass, which line of the user's). Only ``editor`` mutates a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxsight.book import Book
from fxsight.node import Binding, InputLeaf, OutputLeaf, Size, binding_of, output_node
from fxsight.text import Header, program_text
from fxsight.tree import Tree


@dataclass(frozen=True, eq=False)
class Program:
    """One forward of a model, immutable.

    name: class of the model.  graph: the nodes; treat as read-only.  inputs, input_leaves: structure of
    ``(args, kwargs)`` and, per leaf, the spec of a tensor or a fixed value.  outputs, output_leaves: structure of
    what it returns; per leaf None for a value of the graph (in order of the output node) or a fixed value.
    sizes, guards: the free sizes and the conditions on them (sympy).  book: the addresses.
    literals: tensors of the model's own code.  history: the passes that made it, oldest first.
    """

    name: str
    graph: fx.Graph
    inputs: Tree
    input_leaves: tuple[InputLeaf, ...]
    outputs: Tree
    output_leaves: tuple[OutputLeaf, ...]
    sizes: tuple[Size, ...] = ()
    guards: tuple[Any, ...] = ()
    book: Book = field(default_factory=Book)
    literals: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    history: tuple[str, ...] = ("capture",)

    @cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        """Nodes by name, in order."""
        return {node.name: node for node in self.graph.nodes}

    @cached_property
    def bindings(self) -> Mapping[str, Binding]:
        """What each placeholder stands for, in order."""
        return {n.name: binding_of(n) for n in self.graph.nodes if n.op == "placeholder"}

    @cached_property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes that are returned, in order."""
        return tuple(output_node(self.graph).args[0])  # type: ignore[arg-type]

    def with_graph(self, graph: fx.Graph, made_by: str, **changes: Any) -> Program:
        """The next program: another graph and a longer history."""
        return replace(self, graph=graph, history=(*self.history, made_by), **changes)

    @cached_property
    def text(self) -> str:
        """The whole program as Python text; ``parse.parse_program`` reads it back."""
        header = Header(
            self.name,
            self.inputs,
            self.input_leaves,
            self.outputs,
            self.output_leaves,
            self.sizes,
            self.guards,
            self.history,
        )
        return program_text(header, self.graph, self._address)

    def _address(self, call: int) -> str:
        return str(self.book.address(self.book.calls[call])) if 0 <= call < len(self.book.calls) else ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.text == other.text

    def __hash__(self) -> int:
        return hash((self.name, len(self.nodes), self.history))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Program {self.name}: {len(self.nodes)} nodes, {self.history[-1]}>"
