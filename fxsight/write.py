"""Structured reads and writes of a place: what a body sees, and what it may put there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxsight.address import Address
from fxsight.book import Const, Leaf, SizeRef, Structure, Weight
from fxsight.containers import savable
from fxsight.errors import WriteError
from fxsight.place import Location, Place
from fxsight.record import Recorder
from fxsight.spec import TensorSpec, number, parse_dims
from fxsight.tree import Tree, flatten
from fxsight.value import Members, given_spec

Writer = Callable[[Location, Any], None]


def present(recorder: Recorder, place: Place, port: str, write: Writer) -> Any:
    """What a body sees at a port: values, in the model's structure; assigning a member of a tuple writes it."""
    structure, found = recorder.places.locations(place, port)
    leaves = [_leaf(recorder, leaf, location, place) for leaf, location in zip(structure.leaves, found, strict=True)]
    return _build(recorder, structure.tree, leaves, list(found), place.address.at(port), write)


def _leaf(recorder: Recorder, leaf: Leaf, location: Location | None, place: Place) -> Any:
    return constant(recorder, leaf) if location is None else recorder.read(location)


def constant(recorder: Recorder, leaf: Leaf) -> Any:
    """What a body sees of a leaf that is not a value of the graph."""
    match leaf:
        case Const(value):
            return value
        case SizeRef(text):
            return number(parse_dims(text)[0], recorder.sizes)
        case Weight(name):
            return recorder.weight(name)
        case _:
            return leaf


def _build(
    recorder: Recorder,
    tree: Tree,
    leaves: list[Any],
    found: list[Location | None],
    address: Address,
    write: Writer,
) -> Any:
    if tree.kind in ("fields", "dict", "list") and any(found):
        return recorder.dresser.dress(savable(tree.build(leaves)), address)
    if tree.kind != "tuple" or not any(found):
        return tree.build(leaves)
    parts: list[Any] = []
    slots: list[list[Location | None]] = []
    at = 0
    for child in tree.children:
        slots.append(found[at : at + child.size])
        parts.append(_build(recorder, child, leaves[at : at + child.size], slots[-1], address, write))
        at += child.size
    members = Members(parts)

    def assign(key: int, value: Any) -> None:
        given, outline = flatten(value)
        if len(given) != len(slots[key]):
            raise WriteError(
                f"{address.place}: member {key} is {_kind(tree.children[key])}, and what is written is {_kind(outline)}"
            )
        for location, leaf in zip(slots[key], given, strict=True):
            if location is None:
                raise WriteError(f"{address.place}: member {key} is not a tensor and cannot be written")
            write(location, fit(recorder, location, leaf))

    members.writer = assign
    return members


def check_write(recorder: Recorder, place: Place, port: str, value: Any) -> Iterator[tuple[Location, Any]]:
    """Location and fitting value for each leaf of what is written to a port.

    Raises: WriteError showing both sides where structure, shape, dtype or device differ.
    """
    structure, found = recorder.places.locations(place, port)
    leaves, tree = flatten(value)
    address = place.address.at(port)
    if not any(found):
        raise WriteError(f"{address} is {_shown(structure)}: there is no tensor to write")
    if tree.size != structure.tree.size or _outline(tree) != _outline(structure.tree):
        raise WriteError(
            f"{address} is {_kind(structure.tree)}, and what is written is {_kind(tree)}; "
            f"write the same structure, or one member: .{port}[0] = ..."
        )
    pairs: list[tuple[Location, Any]] = []
    for location, leaf, there in zip(found, leaves, structure.leaves, strict=True):
        if location is not None:
            pairs.append((location, fit(recorder, location, leaf)))
        elif not (isinstance(there, Const) and there.value is leaf) and not _unchanged(there, leaf):
            raise WriteError(
                f"{address}: this member is {_leaf_text(there)}, fixed when the model was captured, "
                f"and cannot become {_describe(leaf)}"
            )
    yield from pairs


def _unchanged(there: Leaf, leaf: Any) -> bool:
    return leaf is there or (isinstance(there, Const) and type(leaf) is type(there.value) and leaf == there.value)


def _outline(tree: Tree) -> Any:
    """Structure up to the kind of sequence."""
    kind = {"list": "tuple", "namedtuple": "tuple"}.get(tree.kind, tree.kind)
    return (kind, *(_outline(child) for child in tree.children))


def fit(recorder: Recorder, location: Location, leaf: Any) -> Any:
    """The leaf as it can stand at the location: numbers and broadcastable tensors are expanded, and the memory is
    laid out row by row, so that a ``view`` of the model's finds what it needs.

    Raises: WriteError for another shape, dtype or device.
    """
    spec = recorder.spec(location)
    if isinstance(leaf, (bool, int, float)):
        return torch.full_like(recorder.read(location), leaf)
    if not isinstance(leaf, torch.Tensor):
        raise WriteError(f"{location.address} is {spec}, and what is written is {_describe(leaf)}")
    given = given_spec(leaf)
    if given.dtype != spec.dtype or given.device != spec.device:
        raise WriteError(
            f"{location.address} is {spec} on {spec.device}, and what is written is {_describe(leaf)}; "
            f"write {_moved(given, spec)}"
        )
    if given.shape == spec.shape:
        return (
            leaf
            if recorder.layout(leaf) or recorder.is_current(location, leaf)
            else recorder.call(torch.Tensor.contiguous, (leaf,), {})
        )
    return _expanded(recorder, location, leaf, spec)


def _moved(given: TensorSpec, spec: TensorSpec) -> str:
    """How the user writes a value as it has to be."""
    parts = [str(spec.dtype)] if given.dtype != spec.dtype else []
    parts += [repr(spec.device)] if given.device != spec.device else []
    return f"value{''.join(f'.to({part})' for part in parts)}"


def _expanded(recorder: Recorder, location: Location, leaf: torch.Tensor, spec: TensorSpec) -> Any:
    shape = given_spec(leaf).shape
    fits = len(shape) <= len(spec.shape) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(spec.shape), strict=False)
    )
    if not fits:
        raise WriteError(
            f"{location.address} is {spec}, and what is written is {_describe(leaf)}; the shapes cannot be broadcast"
        )
    return recorder.call(
        torch.Tensor.contiguous,
        (recorder.call(torch.Tensor.expand_as, (leaf, recorder.read(location)), {}),),
        {},
    )


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{given_spec(leaf)} on {given_spec(leaf).device}"
    return f"a {type(leaf).__name__}"


def _kind(tree: Tree) -> str:
    return "one tensor" if tree.kind == "leaf" else f"a {tree.kind} of {len(tree.children)}"


def _shown(structure: Structure) -> str:
    return ", ".join(_leaf_text(leaf) for leaf in structure.leaves)


def _leaf_text(leaf: Leaf) -> str:
    match leaf:
        case Const(value):
            return str(value)
        case SizeRef(expr):
            return expr
        case _:
            return str(leaf)
