"""``NarrowColumns``: of a linear layer, only the columns that are read are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxsight.columns import Piece, Reading, count, count_of, items_at, narrowable
from fxsight.editor import Editor
from fxsight.node import tensor_spec
from fxsight.rewrite import Pass
from fxsight.spec import contiguous_stride
from fxsight.spread import spread, spread_columns

aten = torch.ops.aten


@dataclass(frozen=True)
class NarrowColumns(Pass):
    """Where only some columns of a linear layer's result are read, only these are computed: the logits of two tokens.

        logits = aten.linear.default(x, weight)                               # f32[batch, length, 96]
        right = torch.Tensor.__getitem__(logits, (slice(None), -1, 5))        # f32[batch]
        wrong = torch.Tensor.__getitem__(logits, (slice(None), -1, 70))       # f32[batch]
    becomes
        column = aten.slice.Tensor(weight, 0, 5, 6)                           # f32[1, 8]
        column_1 = aten.slice.Tensor(weight, 0, 70, 71)                       # f32[1, 8]
        columns = aten.cat.default([column, column_1])                        # f32[2, 8]
        logits = aten.linear.default(x, columns)                              # f32[batch, length, 2]
        right = torch.Tensor.__getitem__(logits, (slice(None), -1, 0))        # f32[batch]
        wrong = torch.Tensor.__getitem__(logits, (slice(None), -1, 1))        # f32[batch]

    columns: how many are computed at least, column 0 among them.  but: nodes that keep all their columns.
    layout: whether readers see the strides of the whole: ``spread_columns(logits, 96, [5, 70])`` is what they read.

    Safe: each column is made of the same row of the weight and of the same input; memory that anything changes in
    place is left alone. The formula is the same, but a kernel may add up in another order for another shape:
    ``fxsight.bits`` finds how many columns give the same bits.
    """

    columns: int = 1
    but: tuple[str, ...] = field(default=(), repr=False)
    layout: bool = field(default=False, repr=False)

    def rewrite(self, editor: Editor) -> None:
        """Each linear layer by itself; all else stays where it is."""
        editor.keeps_order = True
        for node, readings in list(narrowable(editor.graph)):
            if node.name not in self.but:
                _narrow(editor, node, readings, self)


# -- the change ------------------------------------------------------------------------------------------------------


def _narrow(editor: Editor, node: fx.Node, readings: Sequence[Reading], asked: NarrowColumns) -> None:
    wanted = list(dict.fromkeys(piece for reading in readings for piece in reading.pieces))
    pieces: list[Piece] = [*wanted, *[0] * (asked.columns - count(wanted))]
    for number, given in enumerate(node.args[1:], 1):
        if isinstance(given, fx.Node):
            editor.replace_argument(node, number, _columns_of(editor, given, pieces, node))
    if asked.layout:
        _spread(editor, _last(node), wanted)
    _shape(node, sum(map(count_of, pieces)))
    if not asked.layout:
        starts = accumulate(map(count_of, wanted), initial=0)
        places = dict(zip(wanted, starts, strict=False))
        for reading in readings:
            _read(editor, reading, places)


def _last(node: fx.Node) -> fx.Node:
    """The node itself, or its rows at the places of the whole, where only these are read."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is spread else node


def _spread(editor: Editor, node: fx.Node, wanted: Sequence[Piece]) -> None:
    """Let those who read the columns read them in memory of the whole's strides."""
    spec = tensor_spec(node)
    places = [slice(p.start, p.stop, p.step) if isinstance(p, range) else p for p in wanted]
    args = (node, spec.shape[-1], places)
    made = editor.call(spread_columns, args, spec=spec, name="spread", like=node, after=node)
    made.meta["spec"] = replace(spec, storage=made.name)
    editor.replace(node, made)


def _columns_of(editor: Editor, given: fx.Node, pieces: Sequence[Piece], node: fx.Node) -> fx.Node:
    """These rows of a weight or bias."""
    parts = {piece: _part(editor, given, piece, node) for piece in dict.fromkeys(pieces)}
    if len(pieces) == 1:
        return parts[pieces[0]]
    wanted = [parts[piece] for piece in pieces]
    return _made(editor, aten.cat.default, (wanted,), given, sum(map(count_of, pieces)), node)


def _part(editor: Editor, given: fx.Node, piece: Piece, node: fx.Node) -> fx.Node:
    if isinstance(piece, fx.Node):
        flat = _flat(editor, piece, node)
        return _made(editor, aten.index.Tensor, (given, [flat]), given, count_of(piece), node)
    spec, wanted = tensor_spec(given), piece if isinstance(piece, range) else range(piece, piece + 1)
    shape, stride = (len(wanted), *spec.shape[1:]), (spec.stride[0] * wanted.step, *spec.stride[1:])
    steps = () if wanted.step == 1 else (wanted.step,)
    args = (given, 0, wanted.start, wanted.stop, *steps)
    made = replace(spec, shape=shape, stride=stride)
    return editor.call(aten.slice.Tensor, args, spec=made, name="column", like=node, before=node)


def _flat(editor: Editor, index: fx.Node, node: fx.Node) -> fx.Node:
    spec = tensor_spec(index)
    if len(spec.shape) == 1:
        return index
    made = replace(spec, shape=(count_of(index),), stride=(1,))
    return editor.call(aten.reshape.default, (index, [-1]), spec=made, name="index", like=node, before=node)


def _made(editor: Editor, target: Any, args: tuple[Any, ...], like: fx.Node, rows: int, node: fx.Node) -> fx.Node:
    """A call that gives so many rows in memory of its own."""
    shape = (rows, *tensor_spec(like).shape[1:])
    spec = replace(tensor_spec(like), shape=shape, stride=contiguous_stride(shape))
    made = editor.call(target, args, spec=spec, name="columns", like=node, before=node)
    made.meta["spec"] = replace(spec, storage=made.name)
    return made


def _shape(node: fx.Node, width: int) -> None:
    """So many columns, of this value and of the rows that are taken of it."""
    spec = tensor_spec(node)
    shape = (*spec.shape[:-1], width)
    node.meta["spec"] = replace(spec, shape=shape, stride=contiguous_stride(shape))
    for user in node.users:
        items = items_at(user, node)
        if items is not None and items[-1] == slice(None):
            _shape(user, width)


def _read(editor: Editor, reading: Reading, places: Mapping[Piece, int]) -> None:
    """The same columns, where they lie now."""
    node, found = reading.node, [places[piece] for piece in reading.pieces]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    items, first = items_at(node, source), reading.pieces[0]
    assert items is not None, "only readings are narrowed"
    item: Any = found if isinstance(items[-1], list) else found[0]
    if isinstance(items[-1], slice):
        item = slice(found[0], found[0] + count_of(first))
    elif isinstance(first, fx.Node):
        item = _places(editor, first, found[0], node)
    if node.target is torch.Tensor.__getitem__:
        node.args = (source, (*items[:-1], item))
    elif node.target is aten.select.int:
        node.args = (source, node.args[1], item)
    else:
        node.args = (source, node.args[1], item.start, item.stop)


def _places(editor: Editor, index: fx.Node, start: int, node: fx.Node) -> fx.Node:
    """Numbers from ``start`` on, in the shape of an index."""
    spec, number = tensor_spec(index), count_of(index)
    long = replace(spec, dtype=torch.int64, shape=(number,), stride=(1,))
    device = {"device": torch.device(spec.device)}
    args = (start, start + number)
    flat = editor.call(aten.arange.start, args, device, spec=long, name="places", like=node, before=node)
    flat.meta["spec"] = long = replace(long, storage=flat.name)
    if len(spec.shape) == 1:
        return flat
    made = replace(long, shape=spec.shape, stride=contiguous_stride(spec.shape))
    shape = list(spec.shape)
    return editor.call(aten.reshape.default, (flat, shape), spec=made, name="places", like=node, before=node)
