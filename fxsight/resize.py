"""The shapes of a body's graph anew, when its inputs have got other sizes: rows that another invoke has brought."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
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
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["spec"] = reads.get(node.name, node.meta["spec"])
        elif node.target is operator.getitem:
            whole = node.args[0].meta["spec"]
            node.meta["spec"] = whole[node.args[1]] if isinstance(whole, tuple) else node.meta["spec"]
        elif node.target in (mutate, gradient):
            node.meta["spec"] = node.args[0].meta["spec"]
        elif node.target is arrived:
            node.meta["spec"] = node.args[0].meta["spec"][node.args[1]]
        else:
            leaves, tree = flatten((node.args, node.kwargs))
            specs = [_spec(leaf) for leaf in leaves]
            given = [fake(spec) if isinstance(spec, TensorSpec) else spec for spec in specs]
            try:
                node.meta["spec"] = rule_for(rules, node.target, specs, tree, partial(list, given), mode).spec
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue


def _spec(leaf: Any) -> Any:
    return leaf.meta["spec"] if isinstance(leaf, fx.Node) else leaf
