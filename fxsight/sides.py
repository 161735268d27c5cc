"""The operators of a graph by the module call they are in: a captured program and a graph of Dynamo's, each a side."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxsight.spec import SizeSpec, TensorSpec
from fxsight.targets import target_name


@dataclass(frozen=True)
class ModuleCall:
    """A call of a module in a graph: its path in the model, and how many calls of it come before in this graph."""

    path: str
    number: int


@dataclass(eq=False)
class Side:
    """One of the two: per module call its operators and calls in order, and all nodes of it.

    at: per module call and operator in it, which of its own operators and calls that is, or is part of.
    """

    tokens: dict[ModuleCall, list[tuple[Any, ...]]]
    at: dict[tuple[ModuleCall, fx.Node], int]
    own: dict[ModuleCall, list[fx.Node]]
    inside: dict[ModuleCall, list[fx.Node]]


def side_of(chains: Iterable[tuple[fx.Node, tuple[ModuleCall, ...]]]) -> Side:
    """The side of a graph, from its nodes in order and the calls that each is in, outermost first."""
    side = Side({}, {}, {}, {})
    last: dict[ModuleCall, ModuleCall | None] = {}
    for node, chain in chains:
        for depth, call in enumerate(chain):
            side.inside.setdefault(call, []).append(node)
            if not is_operator(node):
                continue
            said = side.tokens.setdefault(call, [])
            child = chain[depth + 1] if depth + 1 < len(chain) else None
            if child is None:
                said.append(token(node))
                side.own.setdefault(call, []).append(node)
            elif last.get(call) != child:
                said.append(("call", child.path))
            last[call] = child
            side.at[call, node] = len(said)
    return side


def is_operator(node: fx.Node) -> bool:
    """Whether a node computes values, and no size."""
    if node.op != "call_function" or node.target is torch.ops.aten.detach.default:
        return False
    return isinstance(node.meta.get("spec"), (TensorSpec, tuple))


def does_nothing(node: fx.Node) -> bool:
    """Whether an operator returns what it is given: ``to`` the dtype that is there."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in (torch.ops.aten.to, torch.ops.aten.contiguous) or not isinstance(node.args[0], fx.Node):
        return False
    given = node.args[0].meta.get("spec")
    return isinstance(given, TensorSpec) and given == node.meta.get("spec")


def values_of(node: fx.Node) -> list[fx.Node]:
    """The arguments of a node that are tensors, or several, in order."""
    return tensors_in((node.args, node.kwargs))


def tensors_in(given: Any) -> list[fx.Node]:
    """The nodes in a structure that are tensors, or several, in order."""
    found: list[fx.Node] = []
    fx.map_arg(given, lambda n: found.append(n))
    return [n for n in found if not isinstance(n.meta.get("spec"), SizeSpec)]


def token(node: fx.Node) -> tuple[Any, ...]:
    """What an operator is, beside its arguments."""
    return ("op", target_name(node.target), *(node.args[1:] if node.target is operator.getitem else ()))
