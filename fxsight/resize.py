"""The shapes of a body's graph anew, when its inputs have got other sizes: rows that another invoke has brought."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxsight.gradient import arrived, gradient
from fxsight.mutate import mutate
from fxsight.rules import Table, rule_for
from fxsight.spec import SizeSpec, TensorSpec
from fxsight.tree import flatten


def resize(
    graph: fx.Graph,
    reads: Mapping[str, Any],
    rules: Table,
    fake: Callable[[TensorSpec], torch.Tensor],
    mode: Callable[[], Any],
) -> set[fx.Node]:
    """Give every node the spec it has for reads of these specs.

    An operation that is none for them keeps what it had: it fails when it runs, in torch's words.
    reads: specs by placeholder, or numbers.  fake: a tensor without data.  mode: in which tensors are shapes.
    Returns: such operations, and what depends on them.
    """
    changed, unsure = set[fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        if node.op != "placeholder" and changed.isdisjoint(node.all_input_nodes):
            continue
        if node.op == "placeholder":
            spec = reads.get(node.name, node.meta["spec"])
        else:
            spec = _made(node, rules, fake, mode)
            if spec is None or not unsure.isdisjoint(node.all_input_nodes):
                unsure.add(node)
                changed.add(node)
                continue
        if spec != node.meta["spec"]:
            node.meta["spec"] = spec
            changed.add(node)
    return unsure


def _made(node: fx.Node, rules: Table, fake: Callable[[TensorSpec], torch.Tensor], mode: Callable[[], Any]) -> Any:
    """The spec of what an operation makes; None where it makes nothing of such arguments."""
    args: Any = node.args
    if node.target is operator.getitem:
        whole = _spec(args[0])
        return whole[args[1]] if isinstance(whole, tuple) else None
    if node.target in (mutate, gradient):
        return _spec(args[0])
    if node.target is arrived:
        return _spec(args[0])[args[1]]
    if node.target is torch.Tensor.narrow and len(args) == 4:
        taken = _narrowed(*args)
        if taken is not None:
            return taken
    leaves, tree = flatten((node.args, node.kwargs))
    specs = [_spec(leaf) for leaf in leaves]

    if any(isinstance(spec, SizeSpec) for spec in specs):  # a number that is given when it runs
        return None

    def fakes() -> list[Any]:
        return [fake(spec) if isinstance(spec, TensorSpec) else spec for spec in specs]

    try:
        return rule_for(rules, node.target, specs, tree, fakes, mode).spec
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _narrowed(whole: Any, dim: Any, start: Any, count: Any) -> TensorSpec | None:
    """What ``narrow`` makes of rows that are there; None where it may be an error."""
    spec = _spec(whole)
    if not (isinstance(spec, TensorSpec) and type(dim) is type(start) is type(count) is int):
        return None
    is_inside = 0 <= dim < len(spec.shape) and 0 <= start <= start + count <= spec.numbers[dim]
    shape = (*spec.shape[:dim], count, *spec.shape[dim + 1 :])
    return TensorSpec(spec.dtype, shape, spec.stride, spec.device) if is_inside else None


def _spec(leaf: Any) -> Any:
    if isinstance(leaf, slice):
        return slice(_spec(leaf.start), _spec(leaf.stop), _spec(leaf.step))
    return leaf.meta["spec"] if isinstance(leaf, fx.Node) else leaf
