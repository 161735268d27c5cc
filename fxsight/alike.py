"""Bodies on the same inputs, put together by the programs that they become, and cut into what they share.

A plan is kept: the same bodies with other tensors, on other inputs of these sizes, are not woven again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from fxsight.bits import narrow_exactly
from fxsight.captures import Captures
from fxsight.errors import CausalityError, TraceError
from fxsight.intervention import Intervention
from fxsight.lift import Outline, lifted, varying
from fxsight.numbering import has_effects
from fxsight.parts import Alike, Constants, Group, cut, identity, varying_constants
from fxsight.passes.narrow_columns import NarrowColumns
from fxsight.passes.open_stages import OpenStages
from fxsight.pipeline import cell_pass
from fxsight.program import Program
from fxsight.sizes import layouts, lie_as_captured
from fxsight.staged import Stages, Staging
from fxsight.stride import best_stride

KEPT = 16  # plans kept per model
MODES = ("exact", "fast")


def check_options(mode: Any, budget: Any) -> None:
    """Raises: TraceError for what is no mode, and no number of bytes."""
    if mode not in MODES:
        raise TraceError(f"no mode {mode!r}; one of {', '.join(MODES)}")
    if budget is not None and not (type(budget) is int and budget > 0):
        raise TraceError(f"budget={budget!r}: a number of bytes, for example budget=256 * 2**20")


class Written(Protocol):
    """A body that is written down: what it was recorded on, what it asks for, the user's tensors, the inputs."""

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

    @property
    def leaves(self) -> Sequence[Any]: ...


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
    kinds = [{n: cells[n] for n in numbers} for numbers in kinds_of(cells)]
    staged = _staged(captures, [next(iter(members.values())) for members in kinds])
    return [_alike(captures, members, staged, mode) for members in kinds]


def _staged(captures: Captures, cells: Sequence[Written]) -> Mapping[int, Staging]:
    """For each captured program how it is cut for the cells that are recorded on it."""
    stages = Stages(captures.module)
    found = {id(cell.captured): [other for other in cells if other.captured is cell.captured] for cell in cells}
    return {key: Staging(some[0].captured, [cell.asked for cell in some], stages) for key, some in found.items()}


def _alike(captures: Captures, members: Mapping[int, Written], staged: Mapping[int, Staging], mode: str) -> Alike:
    cells = list(members.values())
    captured, sizes = cells[0].captured, cells[0].sizes
    which = varying([cell.outline for cell in cells])
    asked, constants = lifted(cells[0].asked, which), constants_of(cells)
    varies = varying_constants(constants) if mode == "fast" else frozenset[int]()
    try:
        own = staged[id(captured)].of(cells[0].asked)
        whole = cell_pass(asked).apply(own, copies=own is captured).program
    except CausalityError:  # one stage may depend on more than one of its operators does
        whole = cell_pass(asked)(captured)
    if varies:  # one cell alone is computed as in mode exact
        program = OpenStages(varies=varies)(whole)
        if captures.shared.narrow:
            program = NarrowColumns().apply(program, copies=program is whole).program
        found = best_stride(program, captured, varies, sizes)
        if found is not None:
            return Alike(whole, program, tuple(members), constants, sizes, found)
    narrows = captures.shared.narrow and lie_as_captured(captured, cells[0].leaves, sizes)
    program = narrow_exactly(whole, sizes, captures.weight, captures.tried) if narrows else whole
    return Alike(whole, program, tuple(members), constants, sizes)


# -- plans that are kept ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Planned:
    """Bodies cut into what they share.

    groups: without constants, where it is kept.  in_order: whether running twice is not running once; no groups then.
    """

    groups: tuple[Group, ...]
    in_order: bool


def planned(captures: Captures, cells: Mapping[int, Written], mode: str) -> Planned:
    """How cells are computed; found again where bodies, numbers and sizes are those of a plan that is kept.

    Raises: what weaving raises.
    """
    kept: OrderedDict[Hashable, Planned] = captures.plans
    key = (mode, _key(cells))
    if key not in kept:
        kept[key] = _planned(captures, cells, mode)
        if len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return replace(kept[key], groups=tuple(_filled(group, cells) for group in kept[key].groups))


def _planned(captures: Captures, cells: Mapping[int, Written], mode: str) -> Planned:
    found = alike(captures, cells, mode)
    if any(has_effects(one.program.graph.nodes) for one in found):
        return Planned((), True)
    return Planned(tuple(replace(group, constants=()) for group in cut(found, captures.module)), False)


def _filled(group: Group, cells: Mapping[int, Written]) -> Group:
    together = group.together and replace(group.together, done=[])
    return replace(group, constants=constants_of([cells[n] for n in group.cells]), together=together)


def _key(cells: Mapping[int, Written]) -> Hashable:
    """All that a plan depends on: bodies with their numbers, which tensors are one, sizes and strides."""
    tensors: dict[Hashable, int] = {}
    bodies = tuple(
        (number, id(cell.captured), cell.outline.text, str(cell.outline.numbers), _tensors(cell, tensors))
        for number, cell in cells.items()
    )
    first = next(iter(cells.values()), None)
    inputs = () if first is None else (tuple(first.sizes.items()), layouts(first.leaves))
    return bodies, inputs, torch.get_num_threads()


def _tensors(cell: Written, known: dict[Hashable, int]) -> tuple[int, ...]:
    return tuple(known.setdefault(identity(constant), len(known)) for constant in cell.constants)
