"""Bodies on the same inputs, put together by the programs that they become: what ``parts`` then cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from fxsight.bits import Known, narrow_exactly
from fxsight.captures import Captures
from fxsight.intervention import Intervention
from fxsight.lift import Outline, lifted, varying
from fxsight.parts import Alike, Constants, varying_constants
from fxsight.pipeline import cell_pass
from fxsight.program import Program
from fxsight.stride import best_stride


class Written(Protocol):
    """A body that is written down: what it was recorded on, what it asks for, the user's tensors."""

    @property
    def captured(self) -> Program: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def asked(self) -> Intervention: ...

    @cached_property
    def outline(self) -> Outline: ...

    @property
    def constants(self) -> Sequence[Any]: ...


def kinds_of(cells: Mapping[int, Written]) -> list[list[int]]:
    """The numbers of cells that differ in numbers and tensors alone."""
    kinds: dict[tuple[int, str], list[int]] = {}
    for number, cell in cells.items():
        kinds.setdefault((id(cell.captured), cell.outline.text), []).append(number)
    return list(kinds.values())


def constants_of(cells: Sequence[Written]) -> tuple[Constants, ...]:
    """Of cells of one kind: the user's tensors, then the numbers that vary."""
    which = varying([cell.outline for cell in cells])
    return tuple((*cell.constants, *(cell.outline.numbers[i] for i in which)) for cell in cells)


def alike(captures: Captures, cells: Mapping[int, Written], mode: str) -> list[Alike]:
    """One program for each kind.  cells: by number.  mode: "exact", or "fast" where rows are to be computed together.

    Raises: what weaving raises.
    """
    tried: Known = {}
    return [_alike(captures, {n: cells[n] for n in numbers}, tried, mode) for numbers in kinds_of(cells)]


def _alike(captures: Captures, members: Mapping[int, Written], tried: Known, mode: str) -> Alike:
    cells = list(members.values())
    captured, sizes = cells[0].captured, cells[0].sizes
    which = varying([cell.outline for cell in cells])
    program = whole = cell_pass(lifted(cells[0].asked, which))(captured)
    constants = constants_of(cells)
    found = best_stride(whole, captured, varying_constants(constants), sizes) if mode == "fast" else None
    if found is None:
        program = narrow_exactly(whole, sizes, captures.weight, tried)
    return Alike(whole, program, tuple(members), constants, sizes, found)
