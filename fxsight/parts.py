"""Many cells as few parts: what is the same in all of them runs once, the rest once for each that differs.

The cells of one *group* have one program and differ in its constants. A *part* of it is all that depends on the same
varying constants: what depends on none is shared, with other groups, too (``numbering``); what depends on the first
axis alone runs once for each of its values; and so on. Every operator stays what it was, on the values it had: the
numbers are those of each cell's own run, to the bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxsight import _torch
from fxsight.clean import Clean
from fxsight.cost import Sizes, bytes_of
from fxsight.extract import extract
from fxsight.node import Binding
from fxsight.numbering import Depends, Numbering, dependence, value_numbers
from fxsight.program import Program
from fxsight.run import Executable
from fxsight.stage import Stage
from fxsight.stride import Stride
from fxsight.together import Together

Constants = Sequence[Any]  # of one cell: the user's tensors, then the numbers that vary


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of a group's program.

    depends: the constants it depends on, of those that vary.  takes, gives: numbers of values.
    """

    executable: Executable
    depends: tuple[int, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]

    @property
    def program(self) -> Program:
        """What it runs."""
        return self.executable.program

    def held(self, sizes: Sizes) -> dict[int, int]:
        """Memory of what it gives, in bytes."""
        pairs = zip(self.gives, self.program.results, strict=True)
        return {value: bytes_of(node.meta["spec"], sizes) for value, node in pairs}


@dataclass(frozen=True, eq=False)
class Group:
    """Cells with one program.

    whole: a cell's program as a trace would run it.  program: the same, narrowed to what is read.
    cells: their numbers.  constants: of each.  parts: in order, the shared one first.
    results: values that a cell saves.  last: shared values that no later group needs.
    together: how its cells are computed together, where they are (``mode="fast"``); the parts are what they share then.
    """

    whole: Program
    program: Program
    cells: tuple[int, ...]
    constants: tuple[Constants, ...]
    parts: tuple[Part, ...]
    results: tuple[int, ...]
    last: frozenset[int]
    together: Together | None = None

    @property
    def shared(self) -> list[Part]:
        """What all its cells have in common, and perhaps those of later groups."""
        return [part for part in self.parts if not part.depends]

    @property
    def own(self) -> list[Part]:
        """What differs from cell to cell."""
        return [part for part in self.parts if part.depends]

    def keys(self, part: Part) -> list[tuple[Hashable, ...]]:
        """For each cell what the part depends on: cells with equal keys share its values."""
        return [tuple(identity(constants[k]) for k in part.depends) for constants in self.constants]


def identity(constant: Any) -> Hashable:
    """Equal for constants that are the same: one number, or the same view of the same memory."""
    if not isinstance(constant, torch.Tensor):
        return type(constant), str(constant)
    memory = _torch.storage_key(constant)
    if memory is None:
        return id(constant)
    kind = (constant.dtype, constant.is_conj(), constant.is_neg())
    return memory, constant.storage_offset(), tuple(constant.shape), constant.stride(), kind


# -- making ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Alike:
    """Cells with one program that has not been cut yet; ``whole`` is that of a trace.

    stride: how they are computed together, where they are.
    """

    whole: Program
    program: Program
    cells: tuple[int, ...]
    constants: tuple[Constants, ...]
    sizes: Sizes
    stride: Stride | None = None

    @property
    def varies(self) -> Depends:
        """The constants that are not the same in all cells."""
        return varying_constants(self.constants)


def varying_constants(constants: Sequence[Constants]) -> Depends:
    """The constants that are not the same in all cells."""
    columns = [list(map(identity, column)) for column in zip(*constants, strict=True)]
    return frozenset(i for i, column in enumerate(columns) if any(x != column[0] for x in column))


class _Draft:
    """One group while all are being cut."""

    def __init__(self, alike: Alike, number: int, numbering: Numbering, done: set[int], opened: bool) -> None:
        self.alike, self._opened = alike, opened
        graph, varies = alike.program.graph, alike.varies
        self.numbers = value_numbers(graph, numbering, lambda b: self._given(b, number, varies), number, opened)
        self.results = tuple(self.numbers[node] for node in alike.program.results)
        self.pieces: dict[Depends, dict[fx.Node, None]] = {}
        self.own: dict[fx.Node, None] = {}  # what is computed together
        self.clean: dict[fx.Node, int] = {}
        self.before = self._clean(alike.stride, number, numbering, done) if alike.stride is not None else None
        for node, depends in dependence(graph, varies).items():
            runs = node.op == "call_function" or (node.op == "placeholder" and node in alike.program.results)
            if runs and not self._is_done(node, done):
                self.pieces.setdefault(depends, {})[node] = None
        if alike.stride is not None:
            shared = self.pieces.get(frozenset(), {})
            self.own = {node: None for piece in self.pieces.values() for node in piece if node not in shared}
            self.pieces = {frozenset(): shared}
        done |= {self.numbers[node] for node in self.pieces.get(frozenset(), ())}

    def _clean(self, stride: Stride, number: int, numbering: Numbering, done: set[int]) -> _Draft | None:
        """What cells need of the run without edits, as far as no group before has computed it."""
        clean = Clean(self.alike.program, stride)
        numbers = clean.numbers(self.numbers, [step.node for step in (*stride.early, *stride.late)], numbering)
        self.clean = dict(zip(clean.wanted, numbers, strict=True))
        if done.issuperset(numbers):
            return None
        program = clean.made()
        alike = Alike(program, program, (), self.alike.constants[:1], self.alike.sizes)
        return _Draft(alike, -1 - number, numbering, done, self._opened)

    def _is_done(self, node: fx.Node, done: Set[int]) -> bool:
        """Whether a group before has computed it, or all that is taken of it."""
        if self._opened and isinstance(node.target, Stage) and node.meta["spec"] == ():
            return all(self.numbers[user] in done for user in node.users)
        return self.numbers[node] in done

    @property
    def shared(self) -> dict[fx.Node, int]:
        """What the cells that are computed together take of what they share."""
        stride = self.alike.stride
        lifts = [lift.clean for step in stride.late for lift in step.lifts.values()] if stride is not None else []
        nodes = [*self.outside(self.own), *(node for node in lifts if node is not None)]
        nodes += [n for n in self.alike.program.results if n not in self.own]
        return {node: self.numbers[node] for node in nodes if node.op == "call_function"}

    def _given(self, binding: Binding, number: int, varies: Depends) -> Hashable:
        if binding.kind != "constant":
            return str(binding)
        key = int(binding.key)
        return ("cell", number, key) if key in varies else ("constant", identity(self.alike.constants[0][key]))

    def outside(self, piece: Mapping[fx.Node, None]) -> list[fx.Node]:
        """What a piece takes of others."""
        sources = dict.fromkeys(a for node in piece for a in node.all_input_nodes)
        return [a for a in sources if a.op == "call_function" and a not in piece]

    def wanted(self, piece: Mapping[fx.Node, None], needed: set[int]) -> dict[int, fx.Node]:
        """What a piece gives to others: each value once."""
        return {self.numbers[node]: node for node in reversed(list(piece)) if self.numbers[node] in needed}

    @property
    def needs(self) -> set[int]:
        """The values that pass between pieces, or are saved."""
        crossing = {self.numbers[a] for piece in self.pieces.values() for a in self.outside(piece)}
        before = self.before.needs if self.before is not None else set[int]()
        crossing |= set(self.clean.values())
        return crossing | before | set(self.shared.values() if self.alike.stride is not None else self.results)


def cut(groups: Sequence[Alike], module: nn.Module) -> list[Group]:
    """The groups in parts. Programs are those before in-place calls are written out (``cell_pass``)."""
    numbering, done = Numbering(), set[int]()
    opened = any(alike.stride is not None for alike in groups)  # then stages of one group are operators in others
    drafts = [_Draft(alike, number, numbering, done, opened) for number, alike in enumerate(groups)]
    last = {value: number for number, draft in enumerate(drafts) for value in draft.needs}
    return [_group(draft, number, last, module) for number, draft in enumerate(drafts)]


def _group(draft: _Draft, number: int, last: Mapping[int, int], module: nn.Module) -> Group:
    parts = [
        _part(each, depends, piece, set(last), module)
        for each in ([draft.before] if draft.before is not None else []) + [draft]
        for depends, piece in sorted(each.pieces.items(), key=lambda pair: (len(pair[0]), sorted(pair[0])))
    ]
    over = frozenset(value for value, group in last.items() if group == number)
    kept = tuple(part for part in parts if part.gives)
    alike, together = draft.alike, None
    if alike.stride is not None:
        together = Together(alike.program, alike.stride, draft.shared, draft.clean, module, alike.sizes)
    return Group(alike.whole, alike.program, alike.cells, alike.constants, kept, draft.results, over, together)


def _part(draft: _Draft, depends: Depends, piece: Mapping[fx.Node, None], needed: set[int], module: nn.Module) -> Part:
    wanted = draft.wanted(piece, needed)
    given = draft.outside(piece)
    first = len(draft.alike.constants[0])
    taken = extract(draft.alike.program, piece, given, tuple(wanted.values()), first)
    return Part(
        Executable(taken, module, [], "eager", {}),
        tuple(sorted(depends)),
        tuple(draft.numbers[node] for node in given),
        tuple(wanted),
    )


# -- running ---------------------------------------------------------------------------------------------------------

Values = dict[int, Any]


def run_groups(groups: Sequence[Group], leaves: Sequence[Any], budget: int) -> Iterator[tuple[int, list[Any]]]:
    """Cell by cell, its number and what it saves: tensors that others may share, to be copied.

    leaves: of the inputs.  budget: bytes that cells which are computed together may hold at once.
    """
    shared: Values = {}
    for group in groups:
        if group.together is None:
            yield from _run_group(group, leaves, shared)
        else:
            yield from _run_together(group, group.together, leaves, shared, budget)
        for value in group.last & shared.keys():
            del shared[value]


def _run_together(
    group: Group, together: Together, leaves: Sequence[Any], shared: Values, budget: int
) -> Iterator[tuple[int, list[Any]]]:
    for part in group.shared:
        shared.update(_run_part(part, leaves, group.constants[0], shared))
    yield from together.run(list(zip(group.cells, group.constants, strict=True)), leaves, shared, budget)


def _run_group(group: Group, leaves: Sequence[Any], shared: Values) -> Iterator[tuple[int, list[Any]]]:
    for part in group.shared:
        shared.update(_run_part(part, leaves, group.constants[0], shared))
    keys = [group.keys(part) for part in group.own]
    ends = [{key: at for at, key in enumerate(column)} for column in keys]
    kept: dict[tuple[int, Hashable], Values] = {}
    for at, (cell, constants) in enumerate(zip(group.cells, group.constants, strict=True)):
        values = dict(shared)
        for number, part in enumerate(group.own):
            key = (number, keys[number][at])
            if key not in kept:
                kept[key] = _run_part(part, leaves, constants, values)
            values.update(kept[key])
        yield cell, [values[result] for result in group.results]
        for number, column in enumerate(keys):
            if ends[number][column[at]] == at:
                del kept[number, column[at]]


def _run_part(part: Part, leaves: Sequence[Any], constants: Constants, values: Values) -> Values:
    results = part.executable.run(leaves, [*constants, *(values[value] for value in part.takes)])
    return dict(zip(part.gives, results, strict=True))
