"""The caches that a call is given end as the module would leave them: the same objects, grown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from fxsight.book import Const, Leaf, Ref, SizeRef, Weight
from fxsight.errors import TraceError
from fxsight.intervention import Save
from fxsight.node import Fixed
from fxsight.past import pasts_in, restore
from fxsight.program import Program
from fxsight.sizes import bind_sizes
from fxsight.spec import number, parse_dims
from fxsight.tree import LEAF, Tree
from fxsight.written import written

T = TypeVar("T")


class Leaving:
    """Lets the caches among the arguments of a call be as a program says.

    Where a cache keeps its shape, as from one decode step to the next, its new tensors are put into it and nothing
    else; otherwise it is made anew and taken over.
    """

    def __init__(self, program: Program) -> None:
        after = program.book.after
        self._program = program
        self._has_counts = after is not None and any(isinstance(leaf, SizeRef) for leaf in after.leaves)
        given = _caches(program.inputs, program.input_leaves)
        self._put: Callable[[Any, Sequence[Any]], None] | None = None
        if after is not None and not self._has_counts and [tree for tree, _ in given] == list(after.tree.children):
            before = [leaf for _, leaves in given for leaf in leaves]
            if all(_stays(a, b) for a, b in zip(before, after.leaves, strict=True)):
                self._put = _putting(program.inputs, after.leaves)

    def __call__(self, call: Any, leaves: Sequence[Any], left: Sequence[torch.Tensor]) -> None:
        """leaves: of the call.  left: the tensors in the caches afterwards (``Book.left``)."""
        if self._put is not None:
            return self._put(call, left)
        sizes = bind_sizes(self._program, leaves) if self._has_counts else {}
        for past, now in zip(pasts_in(call), pasts_after(self._program, sizes, left), strict=True):
            restore(past, now)
        return None


def _stays(before: Any, after: Leaf) -> bool:
    """Whether a leaf is a tensor, or what it was."""
    if isinstance(after, Const):
        return isinstance(before, Fixed) and before.value == after.value
    return isinstance(after, Ref)


def _putting(tree: Tree, after: Sequence[Leaf]) -> Callable[[Any, Sequence[Any]], None]:
    """A function that puts tensors into the caches of a call of this shape.

    def put(call, left):
        m0 = call[1]['past_key_values'].__dict__['layers'][0].__dict__
        m0['keys'] = left[0]
    """
    lines, members = ["def put(call, left):"], dict[str, str]()
    tensors = [leaf for leaf in zip(_ways(tree, "call", False), after, strict=True) if isinstance(leaf[1], Ref)]
    for place, ((owner, key), _) in enumerate(tensors):
        if owner not in members:
            members[owner] = f"m{len(members)}"
            lines.append(f"    {members[owner]} = {owner}")
        lines.append(f"    {members[owner]}[{key!r}] = left[{place}]")
    put: Callable[[Any, Sequence[Any]], None] = written([*lines, "    return None"], "leave", {})
    return put


def _ways(tree: Tree, name: str, is_inside: bool) -> Iterator[tuple[str, Any]]:
    """How to come to each leaf of the caches in a value: the members that it is among, and its key in them."""
    is_inside |= tree.kind == "object"
    if not is_inside and tree.kind not in ("tuple", "list", "dict"):
        return
    owner = f"{name}.__dict__" if tree.kind == "object" else name
    for key, child in zip(tree.keys, tree.children, strict=True):
        if child.kind != "leaf":
            yield from _ways(child, f"{owner}[{key!r}]", is_inside)
        elif is_inside:
            yield owner, key


def pasts_after(program: Program, sizes: Mapping[str, int], left: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The caches that a call is given, as it leaves them."""
    after, tensors = program.book.after, iter(left)
    assert after is not None
    found: tuple[Any, ...] = after.tree.build([_member(leaf, tensors, sizes) for leaf in after.leaves])
    return found


def _member(leaf: Leaf, tensors: Iterator[Any], sizes: Mapping[str, int]) -> Any:
    match leaf:
        case Ref():
            return next(tensors)
        case Const(value):
            return value
        case SizeRef(expr):
            return number(parse_dims(expr)[0], sizes)
        case _:
            raise TraceError(f"the forward leaves {leaf} in a cache, and a program cannot make that")


@dataclass(frozen=True)
class Kept:
    """In what a module returns: cache number ``number`` of those that it was given."""

    number: int


class Returned:
    """What a module returns, to be built from a run: the caches in it are those of the call, and not computed twice."""

    def __init__(self, program: Program) -> None:
        output, after = program.book.calls[0].output, program.book.after
        self._leaves: list[tuple[int, Leaf | Kept]] = []
        self._tree = self._walk(
            output.tree, list(enumerate(output.leaves)), [] if after is None else _caches(after.tree, after.leaves)
        )

    @property
    def count(self) -> int:
        """How many tensors it takes."""
        return sum(isinstance(leaf, Ref) for _, leaf in self._leaves)

    def save(self, node_at: Callable[[int], fx.Node]) -> Save:
        """What a program is to keep for it.  node_at: the node of a leaf of the module's output."""
        names = tuple(node_at(i).name if isinstance(leaf, Ref) else Fixed(None) for i, leaf in self._leaves)
        return Save(self._tree, names)

    def build(self, tensors: Sequence[Any], call: Any, sizes: Mapping[str, int], weight: Callable[[str], Any]) -> Any:
        """The module's output.  tensors: those of ``save``.  call: the arguments, whose caches are in it."""
        given, pasts = iter(tensors), tuple(pasts_in(call))
        made: list[Any] = []
        for _, leaf in self._leaves:
            if isinstance(leaf, Kept):
                made.append(pasts[leaf.number])
            else:
                made.append(weight(leaf.name) if isinstance(leaf, Weight) else _member(leaf, given, sizes))
        return self._tree.build(made)

    def _walk(self, tree: Tree, leaves: list[tuple[int, Leaf]], pasts: Sequence[tuple[Tree, list[Leaf]]]) -> Tree:
        if tree.kind == "object":
            known = (i for i, past in enumerate(pasts) if past == (tree, [leaf for _, leaf in leaves]))
            place = next(known, None)
            if place is not None:
                self._leaves.append((leaves[0][0], Kept(place)))
                return LEAF
        if tree.kind == "leaf":
            self._leaves += leaves
            return tree
        children: list[Tree] = []
        for child in tree.children:
            children.append(self._walk(child, leaves[: child.size], pasts))
            leaves = leaves[child.size :]
        return Tree(tree.kind, tree.name, tree.keys, tuple(children))


def _caches(tree: Tree, leaves: Sequence[T]) -> list[tuple[Tree, list[T]]]:
    """Shape and leaves of each cache in plain containers."""
    if tree.kind == "object":
        return [(tree, list(leaves))]
    found: list[tuple[Tree, list[T]]] = []
    for child in tree.children if tree.kind in ("tuple", "list", "dict") else ():
        found += _caches(child, leaves[: child.size])
        leaves = leaves[child.size :]
    return found
