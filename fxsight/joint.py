"""A program with its backward passes, run once on shapes and written down: forward, losses and gradients as one graph.

The operators run as they would in PyTorch: with gradients enabled, the tensors of the user's hooks where a gradient is
edited, and ``torch.autograd.grad`` from each loss. So the kernels, and the order in which gradients are added up, are
autograd's own. What is written down is what reaches ATen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from functorch import make_fx  # type: ignore[import-untyped]
from torch import fx
from torch.autograd.graph import get_gradient_edge

from fxsight import _torch
from fxsight.book import Book
from fxsight.custom import custom_nodes, refuse_backward
from fxsight.decompose import with_values
from fxsight.effects import mutated_storages, storages
from fxsight.errors import CausalityError, TraceError
from fxsight.gradient import backward, custom_function
from fxsight.joint_passes import NUMBERED, Pass, levels_of, no_path, passes_of
from fxsight.marks import Marks
from fxsight.node import binding_of, origin_of
from fxsight.shapes import Shapes
from fxsight.targets import check_call

_alias = torch.ops.aten.alias.default


@dataclass(frozen=True)
class Joint:
    """What has been written down.

    graph: of placeholders, one for each of the program, and operators.  results: of the program, its backward passes
    left out.  leaves: per pass, placeholders and their gradients.  origins: the node of the program that each operator
    comes from, and whether it belongs to a backward pass.  names: the program's sizes by those in the graph.
    conditions: what has been assumed of sizes.
    """

    graph: fx.Graph
    results: tuple[Any, ...]
    leaves: tuple[tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]], ...]
    origins: Mapping[fx.Node, tuple[fx.Node, bool]]
    names: Mapping[Any, sympy.Symbol]
    conditions: tuple[Any, ...]
    constants: Mapping[str, torch.Tensor]


def trace_joint(
    graph: fx.Graph, sizes: Mapping[str, int], fixed: Sequence[str], shared: Mapping[str, str], book: Book
) -> Joint:
    """Run a woven program with its backward passes on shapes.

    sizes: an example of each free size.  fixed: those that it holds for alone.  shared: of bindings (``str``) to one
    tensor, the first of them.  book: of the program.

    Raises: CausalityError, TraceError for gradients that cannot be; RuntimeError as autograd does.
    """
    shapes = Shapes(sizes, fixed)
    run = _Run(graph, shared, book)
    values = [shapes.value(n.meta["spec"]) for n in run.places]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_torch.honest_sizes())
        traced = make_fx(run, tracing_mode="symbolic")(*values)
    return run.joint(traced, shapes)


class _Run:
    """One run: called with the placeholders' values while it is traced."""

    def __init__(self, graph: fx.Graph, shared: Mapping[str, str], book: Book) -> None:
        self.nodes = list(graph.nodes)
        self.custom = custom_nodes(self.nodes, book)
        self.places = [n for n in self.nodes if n.op == "placeholder"]
        bound = {str(binding_of(n)): n for n in self.places}
        pairs = ((bound.get(name), bound.get(first)) for name, first in shared.items())
        self.shared = {one: first for one, first in pairs if one is not None and first is not None}
        self.passes = passes_of(self.nodes, self._tensor)
        told: list[Any] = [one.node.args for one in self.passes]
        self.learned = {self._tensor(n) for args in told for n in args[6]}
        self.marked = {self._tensor(n) for args in told for n in args[7]}
        self.wanted = {v for one in self.passes for v in one.arrivals} | self.marked
        returned: Any = self.nodes[-1].args[0]
        self.results: list[fx.Node] = [n for n in returned if n.target is not backward]
        self.changed = mutated_storages(self.nodes)
        self.env: dict[fx.Node, Any] = {}
        self.edges: dict[fx.Node, Any] = {}
        self.leaves: list[tuple[fx.Node, ...]] = []  # per pass, those that get a gradient
        self.now = -1
        self._marks = Marks()

    def __call__(self, *values: Any) -> list[Any]:
        given = sorted(zip(self.places, values, strict=True), key=lambda pair: pair[0] in self.shared)
        for place, value in given:
            self.env[place] = self._given(place, value)
        levels = levels_of(self.nodes, self.changed)
        found: list[Any] = []
        for level in range(len(self.passes) + 1):
            for node in self.nodes:
                if levels.get(node) == level:
                    self.value(node)
            if level < len(self.passes):
                found.append(self._backward(self.passes[level]))
        self._marks.switch(None)
        return [[self.env[n] for n in self.results], found]

    def _tensor(self, node: fx.Node) -> fx.Node:
        """The node that first is the tensor that a node is: module borders are no tensors of their own."""
        while node.target is _alias:
            node = node.all_input_nodes[0]
        found: fx.Node = self.shared.get(node, node)
        return found

    def _given(self, place: fx.Node, value: Any) -> Any:
        first = self.shared.get(place, place)
        if first is not place:
            return self.env[first]
        if place in self.learned or place in self.wanted:
            value = value.detach().requires_grad_()
            self._keep(place, value)
        return value

    # -- operators ---------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        """The value of a node; computed once."""
        if node in self.env:
            return self.env[node]
        if node.target in NUMBERED:
            raise CausalityError(
                f"{origin_of(node).user}: this gradient arrives later than one that is edited with it: the backward "
                "pass goes from the loss to the input"
            )
        given = {a: self.value(a) for a in node.all_input_nodes}
        if node.target is _alias:
            result = self.env[node] = given[node.all_input_nodes[0]]
            return result
        before = self._marks.switch((node, False))
        args, kwargs = with_values((node.args, node.kwargs), given)
        check_call(node.target, node.args)
        target: Any = node.target
        if target is custom_function:
            result = _Custom.apply(self, node, len(args[0]), *args[0], *args[1])  # type: ignore[no-untyped-call]
        else:
            result = target(*args, **kwargs)
        if node in self.custom:
            refuse_backward(result, self.custom[node], self._line)
        if node in self.wanted:
            result = self._wanted(node, result)
        self.env[node] = result
        self._marks.own(node, result)
        self._marks.switch(before)
        return result

    def _line(self) -> str:
        return origin_of(self.passes[self.now].node).user

    def _wanted(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """A value whose gradient is asked for: it requires one."""
        if not value.requires_grad:
            is_changed = bool(storages(node) & self.changed)
            value = value.detach().requires_grad_()
            if is_changed:  # nothing may change a leaf in place
                value = value.clone()
        self._keep(node, value)
        return value

    def _keep(self, node: fx.Node, value: torch.Tensor) -> None:
        self.edges[node] = value if value.is_leaf else get_gradient_edge(value)
        if node in self.wanted:
            value.register_hook(partial(self._arrive, node))  # type: ignore[no-untyped-call]

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _arrive(self, node: fx.Node, arrived: torch.Tensor) -> torch.Tensor | None:
        """A gradient arrives at a value: note it, and let another go on where the body says so."""
        one, new = self.passes[self.now], arrived
        for place in one.arrivals.get(node, ()):
            self.env[place] = new
            if place in one.edits:
                new = self.value(one.edits[place])
        return None if new is arrived else new

    def go_on(self, function: fx.Node, arrived_there: Sequence[torch.Tensor]) -> list[Any]:
        """The gradients of the inputs of a ``custom_function``, for those of its results."""
        known = self.passes[self.now].functions.get(function)
        if known is None:
            raise TraceError(
                f"{self._line()}: a gradient would flow through a torch.autograd.Function of an edit "
                f"({origin_of(function).user}), whose backward is not kept; write the function with plain operators "
                "(x + (y - x).detach() has the value of y and the gradient of x)"
            )
        self.env.update(zip(known[0], arrived_there, strict=True))
        return [None if node is None else self.value(node) for node in known[1]]

    def _backward(self, one: Pass) -> list[Any]:
        self.now = one.number
        if one.is_wanted and not (one.arrivals or one.leaves):
            self.leaves.append(())
            return []
        losses = [self.value(n) for n in one.losses]
        seeds = [None if n is None else self.value(n) for n in one.seeds]
        wanted = list(dict.fromkeys([*one.arrivals, *one.leaves])) or list(self.edges)
        self._check(one, losses)
        self._marks.switch((one.node, True))
        found: Any = torch.autograd.grad(
            losses,
            [self.edges[n] for n in wanted],
            seeds,
            retain_graph=one.retain,
            create_graph=one.create,
            allow_unused=True,
        )
        self._marks.switch((one.node, True))
        self._answer(one)
        reached = [(n, g) for n, g in zip(wanted, found, strict=True) if n in one.leaves and g is not None]
        self.leaves.append(tuple(n for n, _ in reached))
        return [g for _, g in reached]

    def _check(self, one: Pass, losses: Sequence[Any]) -> None:
        line = origin_of(one.node).user
        if not any(loss.requires_grad for loss in losses):
            for places in one.arrivals.values():
                raise no_path(places[0])
            raise RuntimeError(
                f"{line}: element 0 of tensors does not require grad and does not have a grad_fn: nothing that the "
                "loss depends on requires a gradient, and none is asked for"
            )

    def _answer(self, one: Pass) -> None:
        for function, (arrivals, _) in one.functions.items():
            for place, result in zip(arrivals, self.env[function], strict=True):
                self.env.setdefault(place, torch.zeros_like(result))
        for node, places in one.arrivals.items():
            for place in places:
                if place not in self.env:
                    if not one.zeros:
                        raise no_path(place)
                    self.env[place] = torch.zeros_like(self.env[node])

    def joint(self, traced: fx.GraphModule, shapes: Shapes) -> Joint:
        """What was written down while it ran."""
        returned: Any = traced.graph.output_node().args[0]
        results, gradients = returned
        pairs = zip(self.leaves, map(tuple, gradients), strict=True)
        constants = {str(n.target): getattr(traced, str(n.target)) for n in traced.graph.nodes if n.op == "get_attr"}
        return Joint(
            traced.graph,
            tuple(results),
            tuple(pairs),
            self._marks.origins,
            shapes.names,
            shapes.conditions(),
            constants,
        )


class _Custom(torch.autograd.Function):
    """A function of the body's, in a run."""

    @staticmethod
    def forward(ctx: Any, run: _Run, node: fx.Node, count: int, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results, computed already."""
        ctx.run, ctx.node, ctx.count = run, node, count
        return tuple(tensor.detach() for tensor in given[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """What the body has written down."""
        return (None, None, None, *(None,) * ctx.count, *ctx.run.go_on(ctx.node, gradients))
