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
from fxsight.spec import TensorSpec
from fxsight.tree import flatten


def resize(
    graph: fx.Graph,
    reads: Mapping[str, TensorSpec],
    rules: Table,
    fake: Callable[[TensorSpec], torch.Tensor],
    mode: Any,
) -> None:
    """Give every node the spec it has for reads of these specs.

    An operation that is none for them keeps what it had: it fails when it runs, in torch's words.
    reads: by placeholder.  fake: a tensor without data.  mode: in which tensors are shapes.
    """
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "placeholder" and changed.isdisjoint(node.all_input_nodes):
            continue
        spec = reads.get(node.name, node.meta["spec"]) if node.op == "placeholder" else _made(node, rules, fake, mode)
        if spec != node.meta["spec"]:
            node.meta["spec"] = spec
            changed.add(node)


def _made(node: fx.Node, rules: Table, fake: Callable[[TensorSpec], torch.Tensor], mode: Any) -> Any:
    """The spec of what an operation makes."""
    args: Any = node.args
    if node.target is operator.getitem:
        whole = _spec(args[0])
        return whole[args[1]] if isinstance(whole, tuple) else node.meta["spec"]
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

    def fakes() -> list[Any]:
        return [fake(spec) if isinstance(spec, TensorSpec) else spec for spec in specs]

    try:
        return rule_for(rules, node.target, specs, tree, fakes, mode).spec
    except (RuntimeError, ValueError, IndexError, TypeError):
        return node.meta["spec"]


def _narrowed(whole: Any, dim: Any, start: Any, count: Any) -> TensorSpec | None:
    """What ``narrow`` makes of rows that are there; None where it may be an error."""
    spec = _spec(whole)
    if not (isinstance(spec, TensorSpec) and type(dim) is type(start) is type(count) is int):
        return None
    is_inside = 0 <= dim < len(spec.shape) and 0 <= start <= start + count <= spec.numbers[dim]
    shape = (*spec.shape[:dim], count, *spec.shape[dim + 1 :])
    return TensorSpec(spec.dtype, shape, spec.stride, spec.device) if is_inside else None


def _spec(leaf: Any) -> Any:
    return leaf.meta["spec"] if isinstance(leaf, fx.Node) else leaf
