"""Which columns of a linear layer's result a program reads: an index along the last dimension says it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxsight.effects import mutated_storages, storages
from fxsight.indices import is_integers, items_of
from fxsight.node import is_tensor, tensor_spec
from fxsight.spread import spread

aten = torch.ops.aten
_LINEAR = (aten.linear.default, torch.nn.functional.linear)
_SAME = (aten.alias.default, torch.Tensor.detach, spread)
SHARE = 4  # worth it where no more than a fourth of the columns is read
_MOST = 64  # parts of the weight that are put together

Piece = int | range | fx.Node  # columns that are read in one reading; a node: a tensor of their numbers


@dataclass(frozen=True)
class Reading:
    """One node that reads columns of a value, and which."""

    node: fx.Node
    pieces: tuple[Piece, ...]


def narrowable(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[Reading]]]:
    """The linear layers of which few columns are read, and what reads them."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    linear = [node for node in calls if node.target in _LINEAR and not node.kwargs]
    changed = mutated_storages(calls) if linear else frozenset()
    for node in linear:
        readings = few_columns(node) if all(map(is_tensor, node.all_input_nodes)) else None
        if readings and not storages(node).union(*map(storages, node.all_input_nodes)) & changed:
            yield node, readings


def few_columns(node: fx.Node) -> list[Reading] | None:
    """What reads columns of a value, where few are read in all; None where others are read, too, or it is not known."""
    width = tensor_spec(node).shape[-1] if is_tensor(node) and tensor_spec(node).shape else None
    if not isinstance(width, int):
        return None
    found: list[Reading] = []
    for reading in _readings(node, width):
        if reading is None:
            return None
        found.append(reading)
    pieces = [piece for reading in found for piece in reading.pieces]
    return found if found and len(pieces) <= _MOST and SHARE * count(pieces) <= width else None


def count(pieces: Sequence[Piece]) -> int:
    """How many columns they are; each once."""
    return sum(map(count_of, set(pieces)))


def count_of(piece: Piece) -> int:
    """How many columns one is."""
    if isinstance(piece, fx.Node):
        return math.prod(tensor_spec(piece).numbers)
    return len(piece) if isinstance(piece, range) else 1


# -- what is read ----------------------------------------------------------------------------------------------------


def _readings(node: fx.Node, width: int) -> Iterator[Reading | None]:
    """What reads columns of a value, or of rows of it; None for what reads otherwise."""
    for user in node.users:
        items = items_at(user, node)
        if items is None:
            yield None
        elif items[-1] == slice(None):
            yield from _readings(user, width) if user.users else [None]
        else:
            pieces = _pieces(items[-1], width)
            yield None if pieces is None else Reading(user, pieces)


def items_at(user: fx.Node, node: fx.Node) -> list[Any] | None:
    """What a user takes along each dimension; None where that cannot be said."""
    rank = len(tensor_spec(node).shape)
    if user.op != "call_function" or user.args[:1] != (node,) or user.kwargs:
        return None
    if sum(a is node for a in user.all_input_nodes) != 1:
        return None
    if user.target in _SAME:  # of ``spread``, rows alone are elsewhere
        return [slice(None)] * rank
    if user.target is torch.Tensor.__getitem__:
        return items_of(user.args[1], rank, tensors=True)
    if user.target is aten.select.int:
        return _one(rank, user.args[1], user.args[2])
    if user.target is aten.slice.Tensor and len(user.args) == 4:
        return _one(rank, user.args[1], slice(*user.args[2:]))
    return None


def _one(rank: int, dim: Any, item: Any) -> list[Any]:
    items: list[Any] = [slice(None)] * rank
    items[dim] = item
    return items


def _pieces(item: Any, width: int) -> tuple[Piece, ...] | None:
    """The columns of an index; None where they are not known, or are not there."""
    if isinstance(item, slice):
        known = all(x is None or type(x) is int for x in (item.start, item.stop, item.step))
        found = range(width)[item] if known else range(0)
        return (found,) if len(found) else None
    if is_integers(item):
        return (
            (item,)
            if item.op == "placeholder" and all(isinstance(size, int) for size in tensor_spec(item).shape)
            else None
        )
    columns = [item] if type(item) is int else item
    if not isinstance(columns, list) or not columns or not all(type(c) is int and -width <= c < width for c in columns):
        return None
    return tuple(c % width for c in columns)
