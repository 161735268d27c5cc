"""A graph of Dynamo's as a program: the operators it stands for, and the modules that they were called in.

Dynamo's graph calls torch functions. ``read_graph`` runs it on its own fake values and writes down the operators that
are reached, in their order, before autograd: the form that every program has. Sizes keep Dynamo's symbols, so what is
assumed of them becomes a guard of Dynamo's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxsight import _torch
from fxsight.book import Book, Ref, Structure
from fxsight.effects import mutated_arguments, storages
from fxsight.errors import EditError, TextError
from fxsight.frame import Frame, frame_of, paths_of
from fxsight.node import Binding, Origin
from fxsight.program import Program
from fxsight.sides import ModuleCall, does_nothing
from fxsight.spec import TensorSpec, spec_of
from fxsight.targets import argument_text, check_call, target_name
from fxsight.tree import flatten


@dataclass(frozen=True)
class Graph:
    """What is known of one graph.

    program: its operators; it returns nothing, but its book's ``after`` has what the graph returns, and what it changes
    of its inputs.  chains: per node, the calls it is in, outermost first; own modules of the model alone.
    hidden: operators under ``no_grad``, by what others see of them.  whole: calls that cannot go on in another graph.
    sizes: examples of its symbols.  symbols: the ``SymInt`` of each.
    inputs, values: Dynamo's placeholders and their fake values.  returned: what the graph returns, one leaf each.
    """

    frame: Frame
    program: Program
    chains: Mapping[fx.Node, tuple[ModuleCall, ...]]
    hidden: Mapping[fx.Node, fx.Node]
    whole: frozenset[ModuleCall]
    sizes: Mapping[str, int]
    symbols: Mapping[str, Any]
    inputs: tuple[fx.Node, ...]
    values: list[Any]
    returned: tuple[Any, ...]

    def calls(self) -> frozenset[ModuleCall]:
        """All calls that have an operator here."""
        return frozenset(call for chain in self.chains.values() for call in chain)


def read_graph(gm: fx.GraphModule, module: nn.Module) -> Graph:
    """The graph that Dynamo hands to a backend, read; ``module``: the model whose parts are looked for in it.

    Raises: EditError for a graph that no program can hold.
    """
    return _Reader(gm, module).graph()


class _Reader:
    def __init__(self, gm: fx.GraphModule, module: nn.Module) -> None:
        self.gm, self.paths = gm, paths_of(module)
        self.frame = frame_of(gm, module)
        self.own = self.frame.own
        self.places = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.values = [n.meta["example_value"] for n in self.places]
        self.made = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.storages: dict[int, str] = {}
        self.literals: dict[str, torch.Tensor] = {}
        self.chains: dict[fx.Node, tuple[ModuleCall, ...]] = {}
        self.hidden: dict[fx.Node, fx.Node] = {}
        self.keys: dict[str, ModuleCall] = {}
        self.counts: dict[str, int] = {}
        self.changed: dict[fx.Node, None] = {}
        self.ambient = self.grad = torch.is_grad_enabled()

    def graph(self) -> Graph:
        try:
            traced = _torch.trace_dynamo(self.gm, self.values)
        except Exception as error:  # whatever an operator without a fake raises
            raise EditError(f"this graph of Dynamo's cannot be read: {error}") from error
        self._placeholders(traced)
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                self._literal(traced, node)
        for node in traced.graph.nodes:
            if node.op == "call_function":
                self._call(node)
        returned, _ = flatten(fx.map_arg(traced.graph.output_node().args[0], lambda n: self.env[n]))
        kept = [x for x in returned if isinstance(x, fx.Node)] + list(self.changed)
        self.made.output(())
        after = Structure(flatten(tuple(kept))[1], tuple(Ref(n.name) for n in kept))
        symbols = self._symbols()
        empty = flatten(())[1]
        leaves = tuple(self.env[n].meta["spec"] for n in self._given(traced))
        program = Program(
            "Dynamo", self.made, flatten((tuple(range(len(leaves))), {}))[1], leaves, empty, (),
            book=Book(after=after), literals=self.literals, history=("dynamo",),
        )  # fmt: skip
        names = {s: int(symint.node.hint) for s, symint in symbols.items()}
        own = None if self.own is None else ModuleCall(self.own, 0)
        whole = frozenset(call for call in self.keys.values() if not _torch.breaks_in_calls())
        whole = whole if own is None else whole - {own}
        return Graph(
            self.frame,
            program,
            self.chains,
            self.hidden,
            whole,
            names,
            symbols,
            tuple(self.places),
            self.values,
            tuple(returned),
        )

    def _given(self, traced: fx.GraphModule) -> list[fx.Node]:
        return [n for n in traced.graph.nodes if n.op == "placeholder"]

    def _placeholders(self, traced: fx.GraphModule) -> None:
        for number, (node, place) in enumerate(zip(self._given(traced), self.places, strict=True)):
            weight = self.frame.weights.get(number)
            new = self.made.placeholder(place.name)
            new.target = new.name
            spec = spec_of(self.values[number], {}, self.storages, new.name)
            binding = Binding("input", number) if weight is None else Binding("weight", weight)
            new.meta = {"spec": spec, "binding": binding, "origin": Origin()}
            self.env[node] = new

    def _literal(self, traced: fx.GraphModule, node: fx.Node) -> None:
        tensor = getattr(traced, str(node.target))
        if not isinstance(tensor, torch.Tensor) or type(tensor) is not torch.Tensor:
            raise EditError(f"this graph of Dynamo's cannot be read: it holds a {type(tensor).__name__}")
        new = self.made.placeholder(str(node.target))
        new.target = new.name
        self.literals[new.name] = tensor
        spec = spec_of(tensor, {}, self.storages, new.name)
        new.meta = {"spec": spec, "binding": Binding("literal", new.name), "origin": Origin()}
        self.env[node] = new

    def _call(self, node: fx.Node) -> None:
        if _torch.is_grad_switch(node.target):
            self.grad = bool(node.args[0])
            return
        value = node.meta.get("val")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        self._check(node, args)
        new = self.made.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        new.meta = {"spec": spec_of(value, {}, self.storages, new.name), "origin": Origin(0, 0, "")}
        if does_nothing(new):
            self.env[node] = args[0]
            self.made.erase_node(new)
            return
        self.chains[new] = self._chain(node)
        for argument in mutated_arguments(new):
            self._note_change(argument)
        hides = self.ambient and not self.grad and isinstance(new.meta["spec"], TensorSpec)
        self.env[node] = self._detached(new) if hides else new

    def _check(self, node: fx.Node, args: Any) -> None:
        try:
            target_name(node.target)
            check_call(node.target, args)
            for argument in flatten(tuple(args))[0]:
                argument_text(argument)
        except TextError as error:
            raise EditError(f"this graph of Dynamo's cannot be read: {error}") from error

    def _note_change(self, argument: fx.Node) -> None:
        """Inputs that the graph changes in place are part of what it does."""
        for place in self.made.nodes:
            if place.op == "placeholder" and storages(place) & storages(argument):
                self.changed[place] = None

    def _detached(self, node: fx.Node) -> fx.Node:
        new = self.made.call_function(torch.ops.aten.detach.default, (node,))
        new.meta = dict(node.meta)
        self.chains[new] = self.chains[node]
        self.hidden[new] = node
        return new

    def _chain(self, node: fx.Node) -> tuple[ModuleCall, ...]:
        chain: list[ModuleCall] = [] if self.own is None else [ModuleCall(self.own, 0)]
        for key in node.meta.get("nn_module_stack") or {}:
            path = self.paths.get(int(key.partition("@")[0]))
            if path is None:
                continue
            if key not in self.keys:
                number = self.counts.get(path, 0)
                self.keys[key], self.counts[path] = ModuleCall(path, number), number + 1
            chain.append(self.keys[key])
        return tuple(chain)

    def _symbols(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for value in self.values:
            sizes = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
            for size in sizes:
                expr = _torch.size_expr(size) if isinstance(size, torch.SymInt) else None
                if expr is not None and expr.is_Symbol and _torch.has_example(size):
                    found.setdefault(str(expr), size)
        return found


def located(graph: Graph, book: Book, origins: Mapping[fx.Node, Origin]) -> Program:
    """The program with a book, and with an origin for each node."""
    for node in graph.program.graph.nodes:
        if node in origins:
            node.meta["origin"] = origins[node]
    return replace(graph.program, book=replace(book, after=graph.program.book.after))
