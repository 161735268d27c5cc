"""``NarrowReads``: what is read of each row is taken before the rows are worked on, not after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import fx

from fxsight.editor import Editor
from fxsight.effects import is_random, mutated_storages, storages
from fxsight.indices import items_of
from fxsight.node import is_tensor, output_node, tensor_spec
from fxsight.rewrite import Pass
from fxsight.spec import Dim, contiguous_stride
from fxsight.spread import spread

aten = torch.ops.aten
_alias = aten.alias.default
# ``contiguous`` would leave one row of a batch of one where it is, with strides by which kernels are chosen.
ROW_MAJOR: Mapping[str, Any] = MappingProxyType({"memory_format": torch.contiguous_format})
END = 2**63 - 1  # what torch.export writes for an open end of a slice
_POINTWISE = frozenset(
    getattr(aten, name)
    for name in (
        *("add", "sub", "mul", "div", "neg", "relu", "gelu", "silu", "tanh", "sigmoid", "exp", "abs", "pow"),
        *("dropout", "rsqrt", "sqrt", "clamp", "where"),
    )
)


@dataclass(frozen=True)
class Move:
    """One operator that works on fewer rows: its node, the dimension, the last row that is read, and how many are kept.

    The rows kept end with row ``index``; where there are fewer than ``rows`` before it, all of them.
    """

    node: str
    dim: int
    index: int
    rows: int

    @property
    def start(self) -> int:
        """Of the slice that is kept."""
        first = self.index - self.rows + 1
        return max(first, 0) if self.index >= 0 else first

    @property
    def end(self) -> int:
        """Of that slice."""
        return END if self.index == -1 else self.index + 1


@dataclass(frozen=True)
class NarrowReads(Pass):
    """Where only some rows of a dimension are read, take them before linear layers, norms and pointwise operators.

        norm = aten.layer_norm.default(x, [8])                        # f32[batch, length, 8]
        logits = aten.linear.default(norm, weight)                    # f32[batch, length, 96]
        last = torch.Tensor.__getitem__(logits, (slice(None), -1))    # f32[batch, 96]
    becomes
        narrow_1 = aten.slice.Tensor(x, 1, -1, END)                   # f32[batch, 1, 8]
        norm = aten.layer_norm.default(narrow_1, [8])                 # f32[batch, 1, 8]
        narrow = aten.slice.Tensor(norm, 1, -1, END)                  # f32[batch, 1, 8]
        rows = aten.clone.default(narrow, memory_format=torch.contiguous_format)  # f32[batch, 1, 8]
        logits = aten.linear.default(rows, weight)                    # f32[batch, 1, 96]
        last = torch.Tensor.__getitem__(logits, (slice(None), -1))    # f32[batch, 96]

    rows: how many rows are kept at least; they end with the one that is read.  but: nodes that keep all their rows.
    layout: whether readers see the strides of the whole: ``spread(logits, x, -2, -1, END)`` is what they read then.

    Safe: these operators make each row of their result from the same row of their arguments; memory that anything
    changes in place, and operators that draw random numbers, are left alone. The formula is the same, but a kernel may
    add up in another order for another shape: ``fxsight.bits`` finds how many rows give the same bits.
    """

    rows: int = 1
    but: tuple[str, ...] = field(default=(), repr=False)
    layout: bool = field(default=False, repr=False)

    def rewrite(self, editor: Editor) -> None:
        """Find what moves, then move it, the last operator first; all else stays where it is."""
        found = moves(editor.graph, self)
        moved = {editor.nodes[move.node] for move in found}
        readers = {node: [user for user in node.users if user not in moved] for node in moved if self.layout}
        editor.keeps_order = bool(found)
        for move in found:
            node = editor.nodes[move.node]
            if readers.get(node):
                _spread(editor, node, move, moved, readers[node])
            _narrow(editor, node, move)


def moves(graph: fx.Graph, asked: NarrowReads) -> list[Move]:
    """What the pass changes, last operator first: a read that has moved up is a read of what comes before."""
    return list(_moves(graph, asked).values())


def read_in_part(graph: fx.Graph, values: Iterable[fx.Node]) -> list[fx.Node]:
    """The values, of some, of which only some rows are read."""
    found, saved = _moves(graph, NarrowReads()), set(output_node(graph).all_input_nodes)
    some = [value for value in values if value.users and is_tensor(value) and value not in saved]
    return [value for value in some if all(_reading(user, value, found) for user in value.users)]


def _moves(graph: fx.Graph, asked: NarrowReads) -> dict[fx.Node, Move]:
    calls = [node for node in graph.nodes if node.op == "call_function"]
    changed = mutated_storages(calls)
    saved = set(output_node(graph).all_input_nodes)
    found: dict[fx.Node, Move] = {}
    for node in reversed(calls):
        if node in saved or node.name in asked.but or not node.users or not is_tensor(node) or is_random(node):
            continue
        move = _move_of(node, asked.rows, found)
        if move is None or (asked.layout and not _fits(node, found)):
            continue
        if not storages(node).union(*map(storages, node.all_input_nodes)) & changed:
            found[node] = move
    return found


def _move_of(node: fx.Node, rows: int, found: Mapping[fx.Node, Move]) -> Move | None:
    """The rows that all users read of a dimension that the operator leaves alone: they end with the same."""
    dims = _row_dims(node)
    readings = [_reading(user, node, found) for user in node.users] if dims else []
    if not all(readings):
        return None
    for dim in dims:
        windows = [reading[dim] for reading in readings if reading is not None and dim in reading]
        if len(windows) == len(readings) and len({index for index, _ in windows}) == 1:
            move = Move(node.name, dim, windows[0][0], max(rows, *(count for _, count in windows)))
            size = tensor_spec(node).shape[dim]
            return None if _kept(size, move) == size else move
    return None


def _fits(node: fx.Node, found: Mapping[fx.Node, Move]) -> bool:
    """Whether ``spread`` gives readers the strides of the whole: it is row-major, or all that read it move."""
    return tensor_spec(node).contiguous or all(user in found for user in node.users)


# -- what is read ----------------------------------------------------------------------------------------------------

Window = tuple[int, int]  # the last row that is read, and how many


def _reading(user: fx.Node, node: fx.Node, found: Mapping[fx.Node, Move]) -> Mapping[int, Window] | None:
    """The rows that a user reads, by dimension; None for a user that reads otherwise.  found: users that move."""
    if user in found:
        move, dim = found[user], found[user].dim - _rank(user) + _rank(node)
        return {dim: (move.index, move.rows)} if node in row_arguments(user, move.dim) else None
    if user.args[0] is not node or sum(a is node for a in user.all_input_nodes) != 1:
        return None
    if user.target is aten.slice.Tensor:
        return _sliced(user)
    if user.target is aten.select.int:
        dim, index = int(user.args[1]) % _rank(node), user.args[2]  # type: ignore[arg-type]
        return {dim: (index, 1)} if type(index) is int else None
    if user.target is torch.Tensor.__getitem__:
        items = items_of(user.args[1], _rank(node))
        return None if items is None else {d: x for d, item in enumerate(items) if (x := _row(item)) is not None}
    return None


def _rank(node: fx.Node) -> int:
    return len(tensor_spec(node).shape)


def _sliced(node: fx.Node) -> Mapping[int, Window] | None:
    """The rows of a slice that reads some: its end and its length are known."""
    if len(node.args) != 4:
        return None
    dim, start, end = (x if type(x) is int else None for x in node.args[1:])
    if dim is None or start is None or end is None or (start < 0) != (end < 0 or end == END):
        return None
    window = (-1, -start) if end == END else (end - 1, end - start)
    return {dim % _rank(node): window} if window[1] > 0 else None


def _row(item: Any) -> Window | None:
    if type(item) is int:
        return item, 1
    from_end = isinstance(item, slice) and type(item.start) is int and (item.stop, item.step) == (None, None)
    return (-1, -item.start) if from_end and item.start < 0 else None


# -- where rows stay rows --------------------------------------------------------------------------------------------


def _row_dims(node: fx.Node) -> range:
    """The dimensions along which the operator makes each row of its result from the same row of its arguments."""
    rank = _rank(node)
    if node.target is aten.linear.default:
        return range(rank - 1)
    if node.target is aten.layer_norm.default:
        return range(rank - len(node.args[1]))  # type: ignore[arg-type]
    same = getattr(node.target, "overloadpacket", None) in _POINTWISE or is_view(node)
    return range(rank) if same else range(0)


def is_view(node: fx.Node) -> bool:
    """Whether it is the same tensor: a module's border, or a slice that leaves nothing out."""
    return node.target is _alias or (node.target is aten.slice.Tensor and tuple(node.args[2:]) in ((), (0,), (0, END)))


def row_arguments(node: fx.Node, dim: int) -> list[fx.Node]:
    """The arguments that have the rows of a dimension, and do not broadcast along it."""
    if node.target in (aten.linear.default, aten.layer_norm.default):
        return [node.args[0]]  # type: ignore[list-item]
    from_end = _rank(node) - dim
    tensors = [a for a in node.all_input_nodes if is_tensor(a) and _rank(a) >= from_end]
    return [a for a in tensors if tensor_spec(a).shape[-from_end] != 1]


def needs_layout(node: fx.Node) -> bool:
    """Whether the rows are laid out anew: a matrix product chooses its kernel by layout."""
    return node.target is aten.linear.default


# -- the change ------------------------------------------------------------------------------------------------------


def _kept(size: Dim, move: Move) -> Dim:
    """How many rows are left."""
    if isinstance(size, int):
        return min(move.index + 1 if move.index >= 0 else size + move.index + 1, move.rows)
    kept: Dim = _least(size, move.index, move.rows)
    return kept


@cache
def _least(size: Any, index: int, rows: int) -> Any:
    """So many rows, or as many as there are up to one of them; sympy takes milliseconds to say it."""
    if index >= 0:
        return min(index + 1, rows)
    return 1 if rows == 1 else sympy.Min(size + index + 1, rows)


def _narrow(editor: Editor, node: fx.Node, move: Move) -> None:
    spec = tensor_spec(node)
    kept = _kept(spec.shape[move.dim], move)
    for source in row_arguments(node, move.dim):
        own = tensor_spec(source)
        dim = move.dim - len(spec.shape) + len(own.shape)
        made = replace(own, shape=(*own.shape[:dim], kept, *own.shape[dim + 1 :]))
        args = (source, dim, move.start, move.end)
        part = editor.call(aten.slice.Tensor, args, spec=made, name="narrow", like=node, before=node)
        if needs_layout(node):
            made = replace(made, stride=contiguous_stride(made.shape))
            part = editor.call(aten.clone.default, (part,), ROW_MAJOR, spec=made, name="rows", like=node, before=node)
            part.meta["spec"] = replace(made, storage=part.name)
        editor.replace(source, part, [node])
    shape = (*spec.shape[: move.dim], kept, *spec.shape[move.dim + 1 :])
    node.meta["spec"] = replace(spec, shape=shape, stride=contiguous_stride(shape))
    for user in (user for user in list(node.users) if user.target is not spread):
        _read_last(user, move.dim, _rank(node))


def _spread(editor: Editor, node: fx.Node, move: Move, moved: set[fx.Node], readers: Sequence[fx.Node]) -> None:
    """Let those who read the rows read them in memory of the whole's strides."""
    whole, dim = node, move.dim - _rank(node)
    while whole in moved:
        whole = row_arguments(whole, dim % _rank(whole))[0]
    args = (node, whole, dim, move.start, move.end)
    made = editor.call(spread, args, spec=node.meta["spec"], name="spread", like=node, after=node)
    editor.replace(node, made, readers)


def _read_last(user: fx.Node, dim: int, rank: int) -> None:
    """The same rows, counted from the end: those that are kept end with the last one read."""
    if user.target is aten.slice.Tensor:
        _, count = (_sliced(user) or {})[dim]
        user.args = (user.args[0], dim, -count, END)
    elif user.target is aten.select.int:
        user.args = (user.args[0], dim, -1)
    else:
        items = items_of(user.args[1], rank)
        assert items is not None, "only readings are narrowed"
        items[dim] = items[dim] if isinstance(items[dim], slice) else -1
        user.args = (user.args[0], tuple(items))
