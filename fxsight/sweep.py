"""``model.sweep``: one body for every cell of a grid, recorded cell by cell and computed as one plan.

def patch(layer, position):
    model.transformer.h[layer].input[:, position] = clean[layer][:, position]
    return model.lm_head.output[:, -1, paris] - model.lm_head.output[:, -1, rome]

grid = model.sweep(patch, corrupted, layer=range(12), position=range(15))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from fxsight import _torch
from fxsight.alike import check_options, planned
from fxsight.asked import asked_in_all, results_of
from fxsight.become import become
from fxsight.captures import Captures
from fxsight.collector import waiting
from fxsight.containers import thaw
from fxsight.context import here
from fxsight.edit import Edit
from fxsight.errors import TraceError
from fxsight.grid import Labels, cell_name, cells_of
from fxsight.intervention import Intervention
from fxsight.lift import Outline, outline
from fxsight.lost import warn_of_lost_edits
from fxsight.parts import Group
from fxsight.plan import Plan, Returned
from fxsight.progress import Progress
from fxsight.rows import Call
from fxsight.run import Executable
from fxsight.spec import TensorSpec
from fxsight.together import BUDGET
from fxsight.tracer import Tracer
from fxsight.tree import flatten
from fxsight.value import Value
from fxsight.walk import Walk

Body = Callable[..., Any]
_NUMBERS = "its body asks for numbers"
_GRADIENTS = "they compute gradients"
_EFFECTS = "random numbers are drawn, or the model changes its own buffers"


class SweepCell(Tracer):
    """A trace of one cell: recorded now, computed with the others.

    name: its labels, for messages.  asked: what the body asked for, once it is written down.
    """

    def __init__(self, captures: Captures, call: Any, name: str, edits: Sequence[Edit] = ()) -> None:
        super().__init__(captures, call, "eager", edits=edits)
        self.name = name
        self._returned: list[Any] = []

    def record(self, body: Body, arguments: Mapping[str, Any]) -> None:
        """Write the body of this cell down.

        Raises: what the body raises, with a note that names the cell; TraceError where it returns nothing.
        """
        try:
            with self:
                self._keep(body(**arguments))
        except Exception as error:
            error.add_note(f"in the cell {self.name} of the sweep")
            raise

    def _keep(self, returned: Any) -> None:
        self._returned, self.tree = flatten(thaw(returned))
        plain = (bool, int, float, complex, torch.Tensor)
        if not self._returned or not all(isinstance(x, plain) for x in self._returned):
            raise TraceError(
                f"the body of a sweep returns a value of the trace, or a dict of values; this one returns {returned!r}"
            )
        for value in self._values:
            if value.cell.recorder is not self.recorder:
                raise TraceError(f"{value.cell.what} is a value of another trace; save it there")
        self.recorder.keep(tuple(self._values))

    @property
    def _values(self) -> list[Value]:
        return [x for x in self._returned if isinstance(x, Value)]

    def _begin(self) -> None:
        super()._begin()
        self.recorder  # noqa: B018 - cells are compared when all are there, and not remembered

    def _end(self, walk: Walk) -> None:
        recorder = self.recorder
        recorder.finish()
        recorder.phase, recorder.force = "waiting", self._refuse
        kept = results_of(recorder, [])
        if [id(x) for x in kept[len(kept) - len(self._values) :]] != [id(x) for x in self._values]:
            raise TraceError("the body returns a value that is computed later than where it stops the forward")
        if recorder.body.updates:
            raise TraceError(
                "the body changes a tensor of yours in place; return the value instead, cells have no order"
            )
        self._results = kept
        self.asked: Intervention = asked_in_all(recorder, [])
        warn_of_lost_edits(recorder.body, self.asked)

    def _refuse(self) -> None:
        raise TraceError(f"a value of the cell {self.name} is used outside of it: return it from the body")

    # -- what the plan asks ------------------------------------------------------------------------------------------

    @cached_property
    def outline(self) -> Outline:
        """The same without its numbers."""
        return outline(self.asked)

    @property
    def constants(self) -> list[Any]:
        """The user's tensors."""
        return self.recorder.constants

    @property
    def has_numbers(self) -> bool:
        """Whether the body asked for numbers, which have been computed: its program is for this cell alone."""
        return bool(self._known)

    @property
    def leaves(self) -> list[Any]:
        """Of the inputs."""
        return flatten(self._batch.joined)[0]

    @cached_property
    def program_alone(self) -> Executable:
        """The finished program of this cell as a trace would run it."""
        constants = self.constants
        return self.captures.executable(self.captured, self.asked, constants, "eager", self._sizes, self._use_known())

    def run_alone(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """The results, computed as a trace does."""
        return self.program_alone.run(leaves, [*self.constants, *self._known.values()])

    def finish(self, results: Sequence[Any]) -> list[torch.Tensor]:
        """What the body returned, for these results; what it saved besides becomes plain tensors."""
        first = len(self._results) - len(self._values)
        saved = {id(v): (v, x) for v, x in zip(self._results[:first], results[:first], strict=True)}
        for value, tensor in saved.values():
            become(value, tensor.clone())
        self.recorder.phase = "done"
        computed = iter(results[first:])
        return [next(computed) if isinstance(x, Value) else torch.as_tensor(x) for x in self._returned]

    def check_unchanged(self) -> None:
        """The tensors that the body used are as they were.

        Raises: InputError.
        """
        try:
            self.recorder.body.constant_specs()
        except Exception as error:
            error.add_note(f"in the cell {self.name} of the sweep: all cells are written down before any is computed")
            raise

    @property
    def returned(self) -> Returned:
        """What it returns."""
        return Returned(self.tree, tuple(map(_spec, self._returned)))


def _spec(leaf: Any) -> TensorSpec:
    if isinstance(leaf, Value):
        return TensorSpec(leaf.cell.spec.dtype, leaf.cell.spec.shape, (), leaf.cell.spec.device)
    tensor = torch.as_tensor(leaf)
    return TensorSpec(tensor.dtype, tuple(tensor.shape), (), str(tensor.device))


# -- axes ------------------------------------------------------------------------------------------------------------


def split_arguments(body: Body, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The axes, which are the body's parameters, and the keyword arguments of the model.

    Raises: TraceError for a parameter that has no axis, and where there is no axis at all.
    """
    parameters = inspect.signature(body).parameters
    axes = {name: value for name, value in kwargs.items() if name in parameters}
    missing = [
        n for n, p in parameters.items() if n not in axes and p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if missing:
        raise TraceError(f"the body has a parameter {missing[0]!r}: give its axis, sweep(..., {missing[0]}=range(...))")
    if not axes:
        raise TraceError("a sweep has at least one axis: a parameter of the body, sweep(body, x, layer=range(12))")
    return axes, {name: value for name, value in kwargs.items() if name not in axes}


def _axis(name: str, given: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Labels and values of an axis."""
    if isinstance(given, Mapping):
        labels, values = tuple(given.keys()), tuple(given.values())
    elif isinstance(given, str) or not isinstance(given, Iterable):
        raise TraceError(f"the axis {name}={given!r} is one value: write {name}=[{given!r}]")
    else:
        values = tuple(given)
        plain = all(isinstance(v, (bool, int, float, str)) for v in values) and len(set(values)) == len(values)
        labels = values if plain else tuple(range(len(values)))
    if not values:
        raise TraceError(f"the axis {name} is empty")
    return labels, values


# -- the sweep -------------------------------------------------------------------------------------------------------


def plan_sweep(
    captures: Captures,
    body: Body,
    call: Call,
    axes: Mapping[str, Any],
    mode: str,
    edits: Sequence[Edit] = (),
    budget: int | None = None,
) -> Plan:
    """Record every cell, and find what they share; nothing runs but the numbers that a body asks for.

    edits: of the model, the same in all cells.

    Raises: what the body raises, with the name of its cell; TraceError.
    """
    check_options(mode, budget)
    if here().session is not None:
        raise TraceError("a sweep inside a session: it runs at once; write it before or after")
    both = {name: _axis(name, given) for name, given in axes.items()}
    labels = {name: pair[0] for name, pair in both.items()}
    values = {name: pair[1] for name, pair in both.items()}
    with waiting():
        cells = _record(captures, body, call, labels, values, edits)
        parts, alone = _grouped(captures, cells, mode)
    returned, first = _same_returns(cells), cells[0]
    return Plan(
        labels,
        cells,
        parts,
        alone,
        returned,
        mode,
        captures,
        first.sizes,
        first.leaves,
        BUDGET if budget is None else budget,
    )


def _record(
    captures: Captures,
    body: Body,
    call: Any,
    labels: Labels,
    values: Mapping[str, tuple[Any, ...]],
    edits: Sequence[Edit],
) -> list[SweepCell]:
    cells: list[SweepCell] = []
    places, before = cells_of(labels), _weights(captures)
    with Progress("sweeping") as tick:
        for at in places:
            cell = SweepCell(captures, call, cell_name(labels, at), edits)
            cell.record(body, {name: axis[i] for (name, axis), i in zip(values.items(), at, strict=True)})
            cells.append(cell)
            tick(f"sweeping: {len(cells)} of {len(places)} cells written down")
    for cell in cells:
        cell.check_unchanged()
    if _weights(captures) != before:
        raise TraceError("the body changes weights of the model; all cells are written down before any is computed")
    return cells


def _weights(captures: Captures) -> list[int]:
    module = captures.module
    return [_torch.version(tensor) for tensor in (*module.parameters(), *module.buffers())]


def _same_returns(cells: Sequence[SweepCell]) -> Returned:
    first = cells[0].returned
    for cell in cells:
        other = cell.returned
        if other != first:
            shown = [", ".join(map(str, each.leaves)) for each in (first, other)]
            raise TraceError(
                f"the cells of a sweep return values of one structure, shape and dtype: "
                f"{cells[0].name} returns {shown[0]}, {cell.name} returns {shown[1]}"
            )
    return first


def _grouped(captures: Captures, cells: Sequence[SweepCell], mode: str) -> tuple[Sequence[Group], dict[int, str]]:
    """Groups of cells with one program, and the cells that run alone, with the reason."""
    alone = {number: _NUMBERS for number, cell in enumerate(cells) if cell.has_numbers}
    alone |= {number: _GRADIENTS for number, cell in enumerate(cells) if cell.asked.backwards}
    found = planned(captures, {n: cell for n, cell in enumerate(cells) if n not in alone}, mode)
    if not found.in_order:
        return found.groups, alone
    if alone:
        name = cells[next(iter(alone))].name
        raise TraceError(
            f"the body asks for numbers in the cell {name}, and the model draws random numbers "
            "or changes its buffers, so that the order of the cells matters: trace them one by one"
        )
    return [], dict.fromkeys(range(len(cells)), _EFFECTS)
