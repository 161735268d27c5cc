"""Which operators make each row of their result from the same row of their arguments, and how they are called then.

A row is one position (or one prompt) of one cell. An operator that is here does the rows of many cells in one call;
one that is not runs cell by cell. Each rule is by the operator's meaning, never by names of modules or sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.along import Along, reshaped
from fxsight.effects import is_random
from fxsight.node import is_tensor, tensor_spec
from fxsight.spec import number

aten = torch.ops.aten
Lie = Along | tuple[Along, ...]  # of a tensor, or of each member of a tuple
END = 2**63 - 1


@dataclass(frozen=True)
class Way:
    """How one operator does many rows at once.

    result: where they lie in what it makes.  takes: what all cells share, and where the same rows are taken of it.
    target, args, kwargs: the call.  attends: an attention, whose rows see others.
    """

    result: Lie
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    takes: Mapping[fx.Node, Along] = field(default_factory=dict[fx.Node, Along])
    attends: bool = False


class Rows:
    """What is known while the operators of one program are gone through.

    lies: where rows lie in the values made so far.  sizes: of the inputs, by name.  count: how many rows one cell has.
    """

    def __init__(self, sizes: Mapping[str, int], count: int) -> None:
        self.lies: dict[fx.Node, Lie] = {}
        self.sizes, self.count = sizes, count
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}

    def shape(self, node: Any) -> tuple[int, ...]:
        """In numbers."""
        found = self._shapes.get(node)
        if found is None:
            found = self._shapes[node] = tuple(number(d, self.sizes) for d in tensor_spec(node).shape)
        return found

    def is_known(self, node: fx.Node) -> bool:
        """Whether the sizes of the inputs tell its shape."""
        spec = node.meta.get("spec")
        return node in self._shapes or all(_is_known(d, self.sizes) for d in getattr(spec, "shape", ()))

    def of(self, node: Any) -> Along | None:
        """Where rows lie in a tensor; None for what all cells share, and for what is no tensor."""
        found = self.lies.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Along) else None

    def own(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that have rows."""
        return [a for a in node.all_input_nodes if a in self.lies]


def way(node: fx.Node, rows: Rows) -> Way | None:
    """How a node does many rows at once; None where no rule says that it can."""
    if is_random(node):
        return None
    if node.target is operator.getitem:
        found = rows.lies[node.args[0]]  # type: ignore[index]
        return _same(node, found[node.args[1]]) if isinstance(found, tuple) else None  # type: ignore[index]
    if not isinstance(node.target, _torch.OpOverload) or any(rows.of(a) is None for a in rows.own(node)):
        return None
    rule = _RULES.get(node.target.overloadpacket.__name__) if node.target.namespace == "aten" else None
    if rule is None and torch.Tag.pointwise in node.target.tags:
        rule = _pointwise
    return rule(node, rows) if rule is not None and (is_tensor(node) or rule is _parted) else None


def _same(node: fx.Node, result: Lie, takes: Mapping[fx.Node, Along] | None = None) -> Way:
    return Way(result, node.target, node.args, node.kwargs, takes or {})  # type: ignore[arg-type]


# -- rules -----------------------------------------------------------------------------------------------------------


def _aligned(node: fx.Node, rows: Rows, tensors: Sequence[fx.Node], rank: int) -> Way | None:
    """Dimensions are counted from the end, as in broadcasting; ``rank``: of the result."""
    lies = {rows.of(a).moved(rank - len(rows.shape(a))) for a in tensors if rows.of(a)}  # type: ignore[union-attr]
    if len(lies) != 1:
        return None
    (result,) = lies
    takes: dict[fx.Node, Along] = {}
    for a in tensors:
        here = result.moved(len(rows.shape(a)) - rank)
        if rows.of(a) is None and here.dim >= 0 and rows.shape(a)[here.dim] != 1:
            takes[a] = here
    return _same(node, result, takes)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if is_tensor(a)]


def _pointwise(node: fx.Node, rows: Rows) -> Way | None:
    return _aligned(node, rows, _tensors(node), len(rows.shape(node)))


def _first_alone(node: fx.Node, rows: Rows) -> Along | None:
    """Where rows lie in the first argument, when no other has any."""
    return rows.of(node.args[0]) if rows.own(node) == [node.args[0]] else None


def _kept(node: fx.Node, rows: Rows) -> Way | None:
    """Nothing moves: copies, casts, dropout that drops nothing."""
    along = _first_alone(node, rows)
    return None if along is None else _same(node, along)


def _linear(node: fx.Node, rows: Rows) -> Way | None:
    along = _first_alone(node, rows)
    return _same(node, along) if along and along.dim < len(rows.shape(node)) - 1 else None


def _norm(node: fx.Node, rows: Rows) -> Way | None:
    along, inner = _first_alone(node, rows), node.args[1]
    return _same(node, along) if along and along.dim < len(rows.shape(node)) - len(inner) else None  # type: ignore[arg-type]


def _addmm(node: fx.Node, rows: Rows) -> Way | None:
    bias, x = rows.shape(node.args[0]), node.args[1]
    plain = rows.own(node) == [x] and (len(bias) == 1 or bias[0] == 1)
    along = rows.of(x)
    return _same(node, along) if plain and along and along.dim == 0 else None


def _matmul(node: fx.Node, rows: Rows) -> Way | None:
    left: Any = node.args[0]
    right: Any = node.args[1]
    along, rank = rows.of(left), len(rows.shape(left))
    if rows.of(right) is None and along is not None and along.dim == rank - 2:
        return _same(node, along.moved(len(rows.shape(node)) - rank))
    if rows.of(right) is None and along is not None and len(rows.shape(right)) <= 2 and along.dim < rank - 1:
        return _same(node, along)
    found = (
        _aligned(node, rows, [left, right], len(rows.shape(node))) if min(rank, len(rows.shape(right))) > 2 else None
    )
    return found if found and isinstance(found.result, Along) and found.result.dim < len(rows.shape(node)) - 2 else None


def _batched(node: fx.Node, rows: Rows) -> Way | None:
    """Convolutions and poolings: the first dimension is that of independent examples."""
    along = _first_alone(node, rows)
    batched = along == Along(0) and len(rows.shape(node)) == len(rows.shape(node.args[0])) >= 3
    return _same(node, Along(0)) if batched and not (_is_batch_norm(node) and node.args[5]) else None


def _is_batch_norm(node: fx.Node) -> bool:
    return node.target is aten.batch_norm.default


def _embedding(node: fx.Node, rows: Rows) -> Way | None:
    along = rows.of(node.args[1])
    return _same(node, along) if along and rows.own(node) == [node.args[1]] else None


def _dim(node: fx.Node, number: int, rank: int, default: int = 0) -> int:
    given = node.args[number] if len(node.args) > number else node.kwargs.get("dim", default)
    return given % rank if isinstance(given, int) else -1


def _over_dim(node: fx.Node, rows: Rows) -> Way | None:
    """Softmax and the like: each line along another dimension."""
    along = _first_alone(node, rows)
    dim = _dim(node, 1, len(rows.shape(node.args[0])), -1)
    return _same(node, along) if along and dim not in (-1, along.dim) else None


def _reduced(node: fx.Node, rows: Rows) -> Way | None:
    """Sums over other dimensions."""
    along, rank = _first_alone(node, rows), len(rows.shape(node.args[0]))
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if along is None or given is None or not (given if isinstance(given, (list, tuple)) else [given]):
        return None
    dims = {d % rank for d in (given if isinstance(given, (list, tuple)) else [given])}
    keeps = len(rows.shape(node)) == rank
    return None if along.dim in dims else _same(node, along.moved(0 if keeps else -sum(d < along.dim for d in dims)))


def _reshape(node: fx.Node, rows: Rows) -> Way | None:
    along, given = _first_alone(node, rows), node.args[0]
    if along is None or (len(node.args) > 1 and isinstance(node.args[1], torch.dtype)):
        return None
    shape = rows.shape(node)
    result = reshaped(along, rows.shape(given), shape, rows.count)
    return None if result is None else Way(result, aten.reshape.default, (given, _open(shape, result)), {})


def _open(shape: Sequence[int], along: Along) -> list[int]:
    return [-1 if d == along.dim else n for d, n in enumerate(shape)]


def _expand(node: fx.Node, rows: Rows) -> Way | None:
    along, shape = _first_alone(node, rows), rows.shape(node)
    if along is None:
        return None
    result = along.moved(len(shape) - len(rows.shape(node.args[0])))
    return Way(result, aten.expand.default, (node.args[0], _open(shape, result)), {})


def _permute(node: fx.Node, rows: Rows) -> Way | None:
    along, rank = _first_alone(node, rows), len(rows.shape(node))
    order = list(range(rank))
    if node.target is aten.permute.default:
        given: Any = node.args[1]
        order = [d % rank for d in given]
    elif node.target in (aten.transpose.int, aten.t.default):
        pair: Any = node.args[1:3] if node.target is aten.transpose.int else (0, rank - 1)
        order[pair[0]], order[pair[1]] = order[pair[1]], order[pair[0]]
    return None if along is None else _same(node, Along(order.index(along.dim), along.outer, along.inner))


def _unsqueeze(node: fx.Node, rows: Rows) -> Way | None:
    along, dim = _first_alone(node, rows), _dim(node, 1, len(rows.shape(node)))
    return None if along is None else _same(node, along.moved(int(dim <= along.dim)))


def _squeeze(node: fx.Node, rows: Rows) -> Way | None:
    along, shape = _first_alone(node, rows), rows.shape(node.args[0])
    if along is None or len(node.args) != 2:
        return None
    given: Any = node.args[1]
    gone = {d % len(shape) for d in ([given] if isinstance(given, int) else given) if shape[d] == 1}
    return None if along.dim in gone else _same(node, along.moved(-sum(d < along.dim for d in gone)))


def _select(node: fx.Node, rows: Rows) -> Way | None:
    along, dim = _first_alone(node, rows), _dim(node, 1, len(rows.shape(node.args[0])))
    return _same(node, along.moved(-int(dim < along.dim))) if along and dim != along.dim else None


def _slice(node: fx.Node, rows: Rows) -> Way | None:
    along, dim = _first_alone(node, rows), _dim(node, 1, len(rows.shape(node.args[0])))
    whole = tuple(node.args[2:]) in ((), (0,), (None,), (0, END), (None, None), (0, END, 1))
    if along is not None and dim == along.dim and whole:
        return Way(along, aten.alias.default, (node.args[0],), {})
    return _same(node, along) if along and dim != along.dim else None


def _parted(node: fx.Node, rows: Rows) -> Way | None:
    """``split``, ``chunk`` and ``unbind`` of another dimension."""
    along, spec = _first_alone(node, rows), node.meta.get("spec")
    number = 1 if node.target is aten.unbind.int else 2
    dim = _dim(node, number, len(rows.shape(node.args[0])))
    if along is None or dim == along.dim or not isinstance(spec, tuple):
        return None
    each = along.moved(-int(dim < along.dim)) if number == 1 else along
    return _same(node, (each,) * len(spec))


def _cat(node: fx.Node, rows: Rows) -> Way | None:
    """Beside each other; or behind something empty, as caches begin."""
    parts: Any = [a for a in node.args[0] if 0 not in rows.shape(a)]  # type: ignore[union-attr]
    rank = len(rows.shape(node))
    dim = _dim(node, 1, rank)
    if len(parts) == 1 and rows.of(parts[0]) is not None:
        return Way(rows.lies[parts[0]], aten.alias.default, (parts[0],), {})
    found = _aligned(node, rows, parts, rank)
    return found if found and isinstance(found.result, Along) and found.result.dim != dim else None


def _attention(node: fx.Node, rows: Rows) -> Way | None:
    """Each query is a row; it sees keys and values of its own cell, or the examples of a batch are the rows."""
    lies = [rows.of(a) for a in node.args[:3]]
    ranks = {len(rows.shape(a)) for a in node.args[:3]}
    found = {x for x in lies if x is not None}
    if len(ranks) != 1 or len(found) != 1 or _given(node, 4, "dropout_p", 0.0) != 0:
        return None
    (rank,), (along,), mask = ranks, found, _given(node, 3, "attn_mask", None)
    if rank not in (3, 4) or not along.plain or (mask is not None and rows.of(mask) is not None):
        return None
    if along.dim < rank - 2:
        return _aligned(node, rows, [a for a in node.all_input_nodes if is_tensor(a)], rank)
    square = rows.shape(node.args[0])[-2] == rows.shape(node.args[1])[-2] == rows.count
    return Way(along, node.target, node.args, node.kwargs, {}, True) if along.dim == rank - 2 and square else None  # type: ignore[arg-type]


def _given(node: fx.Node, number: int, name: str, default: Any) -> Any:
    return node.args[number] if len(node.args) > number else node.kwargs.get(name, default)


_RULES: Mapping[str, Callable[[fx.Node, Rows], Way | None]] = {
    **dict.fromkeys(("linear",), _linear),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("addmm",), _addmm),
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "max_pool1d", "max_pool2d", "avg_pool2d"), _batched),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "batch_norm", "group_norm"), _batched),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum"), _over_dim),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "argmax", "argmin", "any", "all", "logsumexp"), _reduced),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _parted),
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "to", "_to_copy", "dropout", "lift_fresh_copy"), _kept),
    "embedding": _embedding,
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
    "slice": _slice,
    "cat": _cat,
    "scaled_dot_product_attention": _attention,
}


def _is_known(dim: Any, sizes: Mapping[str, int]) -> bool:
    return isinstance(dim, int) or all(s.name in sizes for s in dim.free_symbols)
