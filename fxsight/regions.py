"""A program cut into regions: the blocks that a model repeats, and what stands before, between and after them.

A block is a call of a member of a repeated container (``transformer.h.3``), with at least ``SMALLEST`` operators; of
blocks inside blocks the innermost counts. The program's own order of nodes is cut where one block ends and another
begins, so regions run one after the other. What a user's edit puts into a block belongs to that block's region.

    before: embedding, add, expand      → add, expand
    transformer.h.0: layer_norm, …      → add_2
    transformer.h.1: layer_norm, …      → add_4
    after: layer_norm_2, linear         → linear

Nothing is cut between the first touch of memory and its last change in place, nor between a value that no region can
return (a tuple, a view taken for an in-place call) and its last use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from fxsight.book import Call
from fxsight.effects import mutated_arguments, storages
from fxsight.node import origin_of
from fxsight.program import Program
from fxsight.spec import SizeSpec, TensorSpec

SMALLEST = 8  # operators of a block; smaller ones cost more to call than their fusion saves


@dataclass(frozen=True)
class Region:
    """Consecutive operators of a program.

    place: address of the block, "" for what is outside of all blocks.  nodes: in order.  inputs: values from outside
    that they use, in order of first use.  outputs: values that later regions or the caller use, in order.
    is_compiled: whether a compiler is given it, or it runs op by op.
    """

    place: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    is_compiled: bool = True

    def __str__(self) -> str:
        names = [", ".join(n.name for n in part) for part in (self.inputs, self.nodes, self.outputs)]
        return f"{self.place or 'outside'}: ({names[0]}) {names[1]} -> ({names[2]})"


def cut(program: Program) -> tuple[Region, ...]:
    """The regions of a finished program, in the order in which they run; one for a program without blocks."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    blocks = _blocks(program, nodes)
    spans = list(_uncut(nodes, program))
    borders = [i for i in range(1, len(nodes)) if blocks[i] != blocks[i - 1]]
    kept = [i for i in borders if not any(first < i <= last for first, last in spans)]
    pieces = [nodes[i:j] for i, j in pairwise([0, *kept, len(nodes)])] if nodes else []
    starts = [0, *kept]
    return tuple(_region(program, blocks[i], piece) for i, piece in zip(starts, pieces, strict=False))


def whole(program: Program) -> Region:
    """The program as one region."""
    return _region(program, "", [n for n in program.graph.nodes if n.op == "call_function"])


def _region(program: Program, place: str, nodes: Sequence[fx.Node]) -> Region:
    inside, results = set(nodes), set(program.results)
    inputs = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
    outputs = [n for n in nodes if n in results or (any(u not in inside for u in n.users) and not _is_named_size(n))]
    return Region(place, tuple(nodes), tuple(inputs), tuple(outputs))


def _is_named_size(node: fx.Node) -> bool:
    """Whether its value is a size with a name: no region need return what the inputs' shapes tell."""
    spec = node.meta["spec"]
    return isinstance(spec, SizeSpec) and bool(spec.expr.is_Symbol)


# ------------------------------------------------------------------------------------------------------ where to cut


def _blocks(program: Program, nodes: Sequence[fx.Node]) -> list[str]:
    """The address of each node's block, "" for none; a user's operators belong to the block they stand in."""
    calls = program.book.calls
    above = {call.id: tuple(_members(calls, call)) for call in calls}
    sizes = Counter(member for n in nodes for member in above.get(origin_of(n).call, ()))
    alike = Counter(_kind(calls[member]) for member in sizes if sizes[member] >= SMALLEST)
    found: list[str | None] = []
    for node in nodes:
        call = origin_of(node).call
        block = next((m for m in above.get(call, ()) if sizes[m] >= SMALLEST and alike[_kind(calls[m])] > 1), None)
        named = "" if block is None else str(program.book.address(calls[block]))
        found.append(named if call in above else found[-1] if found else None)
    first = next((block for block in found if block is not None), "")
    return [first if block is None else block for block in found]


def _members(calls: Sequence[Call], call: Call) -> Iterator[int]:
    """The calls of members of containers that a call is part of, innermost first."""
    at: int | None = call.id
    while at is not None:
        if calls[at].kind == "module" and calls[at].module.rpartition(".")[2].isdecimal():
            yield at
        at = calls[at].parent


def _kind(call: Call) -> tuple[str, str]:
    """Equal for the members of one container that are of one class."""
    return call.module.rpartition(".")[0], call.title


def _uncut(nodes: Sequence[fx.Node], program: Program) -> Iterator[tuple[int, int]]:
    """Pairs (first, last) of positions between which nothing may be cut."""
    at = {node: i for i, node in enumerate(nodes)}
    memory = _memory(program.graph.nodes)
    first: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for storage in {s for n in (node, *node.all_input_nodes) for s in memory[n]}:
            first.setdefault(storage, i)
        for storage in {s for argument in _changed(node) for s in memory[argument]}:
            yield first[storage], i
        if not isinstance(node.meta["spec"], (TensorSpec, SizeSpec)):
            yield i, max((at.get(user, i) for user in node.users), default=i)


def _memory(nodes: Iterable[fx.Node]) -> Mapping[fx.Node, frozenset[str]]:
    """The memory of each value; of a value without a spec (a view taken for an in-place call) that of what it views."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in nodes:
        own = storages(node)
        viewed = node.all_input_nodes[:1] if node.op == "call_function" and node.meta.get("spec") is None else []
        found[node] = own | frozenset(s for n in viewed for s in found[n])
    return found


def _changed(node: fx.Node) -> Sequence[fx.Node]:
    """The values whose memory an operator may change: by its schema, or, of a torch function, by its missing spec."""
    in_place = node.meta["spec"] is None and not mutated_arguments(node)
    return node.all_input_nodes[:1] if in_place else mutated_arguments(node)
