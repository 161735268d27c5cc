"""Who minds how rows lie in memory: a sum over several adds up in another order when no gaps are between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxsight.node import is_tensor, tensor_spec
from fxsight.passes.narrow_reads import Move

_BY_ROW = frozenset(
    (
        *("cross_entropy", "log_softmax", "softmax", "layer_norm", "gather"),
        *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "div", "neg", "exp", "log", "pow", "abs"),
        *("relu", "gelu", "silu", "tanh", "sigmoid"),
    )
)


def minds_layout(node: fx.Node, found: Sequence[Move]) -> bool:
    """Whether someone who reads rows of the operator's result may see that they lie elsewhere in memory.

    What has one dimension, and functions of each row or each number, do not mind; a tensor that leaves the program may
    meet any other function.
    """
    moved = {move.node for move in found}
    readings = [user for user in node.users if user.name not in moved]
    if tensor_spec(node).shape[-1] == 1:
        return bool(readings)
    return not all(_is_line(r) or all(map(_is_by_row, r.users)) for r in readings)


def _is_line(node: fx.Node) -> bool:
    return is_tensor(node) and len(tensor_spec(node).shape) < 2


def _is_by_row(node: fx.Node) -> bool:
    """Whether it works row by row or number by number, into a tensor of its own, or reads one number of each row."""
    name = getattr(node.target, "__name__", "").partition(".")[0].strip("_")
    return node.op == "call_function" and (name in _BY_ROW or (name in ("getitem", "select") and _is_line(node)))
