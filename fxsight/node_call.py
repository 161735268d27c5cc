"""One node of a program as a call: what it calls, its arguments and its result, as the address book has them."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxsight.book import Const, Leaf, Opaque, Ref, SizeRef, Structure, Weight
from fxsight.node import binding_of, origin_of
from fxsight.spec import SizeSpec, TensorSpec
from fxsight.targets import target_name
from fxsight.tree import LEAF, Tree


def operator_name(node: fx.Node) -> str:
    """The name of what a node calls; of an opened operator, what it called before."""
    return origin_of(node).was.partition("(")[0] or target_name(node.target)


def structure_of(value: Any) -> Structure:
    """Arguments of a node, as the book has those of a call."""
    leaves: list[Leaf] = []
    return Structure(_walk(value, leaves), tuple(leaves))


def _walk(value: Any, leaves: list[Leaf]) -> Tree:
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return Tree(kind, "", tuple(range(len(value))), tuple(_walk(v, leaves) for v in value))
    if isinstance(value, dict):
        return Tree("dict", "", tuple(value), tuple(_walk(v, leaves) for v in value.values()))
    leaves.append(_leaf(value))
    return LEAF


def _leaf(value: Any) -> Leaf:
    if isinstance(value, fx.Node):
        if value.op == "placeholder" and binding_of(value).kind == "weight":
            return Weight(str(binding_of(value).key))
        return Ref(value.name)
    return Const(value) if value is None or isinstance(value, (bool, int, float, str)) else Opaque(type(value).__name__)


def output_of(node: fx.Node) -> Leaf:
    """The result of a node, as the book has that of a call."""
    match node.meta.get("spec"):
        case TensorSpec():
            return Ref(node.name)
        case SizeSpec(expr=expr):
            return SizeRef(str(expr))
        case tuple():
            return Opaque("several values: its members are nodes, too")
        case _:
            return Const(None)
