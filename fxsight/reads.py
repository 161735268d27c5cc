"""What a body holds while it is recorded: values of its calls, and of the locations that it reads."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from fxsight.arguments import QUIET
from fxsight.body import Body, Demand
from fxsight.cell import Cell
from fxsight.lines import user_line
from fxsight.locations import Locations, State
from fxsight.looked import looked_sizes
from fxsight.node import origin_of
from fxsight.place import Location, Places
from fxsight.resize import resize
from fxsight.rows import Rows
from fxsight.spec import TensorSpec
from fxsight.value import Value

Phase = Literal["open", "waiting", "done"]


class Reads(ABC):
    """The values of one body over one program, for inputs of given sizes.

    weights: asked for the names of the model's parameters and buffers by ``id``.  demand: computes nodes at once, for
    bodies that need a number.  lookup: a parameter or buffer by name.
    phase: the block is being written, has ended and waits for the end of its session, or is done.
    rows: the rows of the batch that are read and written now; None for all.
    """

    def __init__(
        self,
        places: Places,
        sizes: Mapping[str, int],
        weights: Callable[[], Mapping[int, str]],
        demand: Demand,
        lookup: Callable[[str], torch.Tensor],
    ) -> None:
        self.places, self.program, self.sizes, self.lookup = places, places.program, sizes, lookup
        self.body = Body(self, weights, demand, sizes, self._edited, places.rules)
        self.phase: Phase = "open"
        self.line: Callable[[], str] = user_line  # of the statement that is written down
        self.has_warned = False
        self.series: tuple[object, int] | None = None  # the generation that the block is a step of, and which
        self.unreached = ""  # why the block did not run at all
        self.rows: Rows | None = None
        self.on_row: Callable[[Value, int], None] = lambda value, key: None
        self.force: Callable[[], None] = lambda: None
        self.given: Callable[[], Sequence[Any]] = tuple  # the leaves of the inputs
        self.alive: list[weakref.ref[Value]] | None = None  # in a session: what later blocks may use
        self.locations = Locations(self.body.graph, places, sizes)
        self._cells: weakref.WeakSet[Cell] = weakref.WeakSet()  # of the values that are there
        self._branch: list[Cell] | None = None  # what a branch not taken has made

    @abstractmethod
    def _edited(self, root: Cell) -> None:
        """A value has been changed in place."""

    @abstractmethod
    def keep(self, value: Any) -> None:
        """Mark a structured value as saved."""

    @abstractmethod
    def stop(self, cell: Cell) -> None:
        """The forward ends where this value is there."""

    @abstractmethod
    def why_unset(self, cell: Cell) -> str:
        """Why a value has no number though it was saved; empty when there is no reason known."""

    @property
    def is_open(self) -> bool:
        """Whether the block is still being written."""
        return self.phase == "open"

    @property
    def is_waiting(self) -> bool:
        """Whether the block has ended and runs with its session."""
        return self.phase == "waiting"

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One torch call on values: see ``body``."""
        if func is torch.Tensor.__getitem__ and type(args[1]) is int:
            self.on_row(args[0], args[1])
        return self.body.call(func, args, kwargs)

    def apply(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Any function on the numbers of values, now."""
        return self.body.apply(function, args, kwargs)

    def returned(self, cell: Cell, is_kept: bool) -> Value:
        """A value that autograd makes of one: kept for a backward, else a result that is an input."""
        return self.value(cell) if is_kept else self.body.gradients.functions.returned(self.value(cell))

    def fake(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data, in memory of its own."""
        return self.body.fake(spec)

    def value(self, cell: Cell) -> Value:
        """The value of a cell; known to the session and to the branch in which it is made."""
        value = Value.of(cell)
        self._cells.add(cell)
        if self.alive is not None:
            self.alive.append(weakref.ref(value))
        if self._branch is not None:
            self._branch.append(cell)
        return value

    def empty(self, node: fx.Node) -> torch.Tensor:
        """A tensor without data, as the value of a node."""
        spec: TensorSpec = node.meta["spec"]
        return torch.empty_strided(spec.numbers, spec.steps, dtype=spec.dtype, device="meta")

    # -- locations ---------------------------------------------------------------------------------------------------

    def read(self, location: Location) -> Value:
        """The present value at a location: a snapshot of its own, and a handle for in-place edits.

        Of the rows of an invoke, when one is being written.
        """
        dim = self.row_dim(location)
        if dim is None or self.rows is None:
            return self._whole(location)
        part: Value = self.call(torch.Tensor.narrow, (self._whole(location), dim, self.rows.start, self.rows.count), {})
        part.cell.what = location.address
        part.cell.node.meta[QUIET] = part.cell.is_rows = True
        return part

    def _whole(self, location: Location) -> Value:
        state = self.locations.present(self._state(location), self.rows)
        what, spec = location.address, self.locations.spec(location)
        return self.value(Cell(self, spec, state.node, what, self.line(), handles=[(state, state.version)]))

    def node_at(self, location: Location, line: str) -> fx.Node:
        """The present value at a location, of all rows: its node.  line: the user's that asks for it."""
        return self.locations.present(self._state(location, lambda: line), self.rows).node

    def row_dim(self, location: Location) -> int | None:
        """The dimension of a location that counts the rows of the batch, inside an invoke; None where all share it.

        Raises: TraceError where the batch is folded into another dimension.
        """
        return self.locations.row_dim(location, self.rows)

    def spec(self, location: Location) -> TensorSpec:
        """Dtype, shape (numbers) and strides of a location for the present inputs (and rows)."""
        spec, dim = self.locations.spec(location), self.row_dim(location)
        if dim is None or self.rows is None:
            return spec
        return replace(spec, shape=(*spec.shape[:dim], self.rows.count, *spec.shape[dim + 1 :]))

    def move(self, places: Places, sizes: Mapping[str, int] | None = None) -> None:
        """Go on over another program of the same model: one in which something has been opened."""
        self.sizes = self.body.sizes = self.sizes if sizes is None else sizes
        self.places, self.program = places, places.program
        self.locations.move(places, self.sizes)

    def resize(self) -> None:
        """After a move to other sizes, and to other places: shapes as they are now."""
        resize(self.body.graph, self.locations.read_specs(), self.places.rules, self.body.fake, lambda: self.body.mode)
        for cell in self._cells:
            spec = cell.node.meta["spec"]
            if isinstance(spec, TensorSpec) and spec.shape != cell.spec.shape:
                cell.spec, cell.known_fake = spec, None

    def looked_at(self) -> list[tuple[str, tuple[int | None, ...]]]:
        """The shapes that the body has looked at: the user's line, and the sizes, None for those not looked at."""
        return [(origin_of(node).user, looked_sizes(node, dims)) for node, dims in self.body.shapes.items()]

    def _state(self, location: Location, line: Callable[[], str] | None = None) -> State:
        state = self.locations.state(location, line or self.line)
        if not self.in_dead_branch and self.rows not in state.used:
            state.used.append(self.rows)
        return state

    @property
    def used(self) -> list[Location]:
        """What has been read or written so far for rows of those that are read and written now."""
        return self.locations.used(self.rows)

    def layout(self, value: torch.Tensor) -> bool:
        """Whether a tensor or value lies row by row in memory."""
        return value.cell.fake.is_contiguous() if isinstance(value, Value) else value.is_contiguous()

    @property
    def in_dead_branch(self) -> bool:
        """Whether what is written now is forgotten."""
        return self._branch is not None
