"""The recorder: runs a body once on shapes, and writes down what it asks for as an ``Intervention``.

The torch calls between reads and writes are ``body``'s; what has become of each location is ``locations``'. Nothing is
computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from fxsight.arguments import QUIET, Update
from fxsight.arrivals import Arrival
from fxsight.body import Body, Demand
from fxsight.cell import Cell
from fxsight.containers import thaw
from fxsight.dressed import Dresser
from fxsight.errors import TraceError, WriteError
from fxsight.lines import user_line
from fxsight.locations import Locations, State
from fxsight.looked import looked_sizes
from fxsight.lost import stale_edit
from fxsight.node import origin_of
from fxsight.place import Location, Places
from fxsight.resize import resize
from fxsight.rows import Rows
from fxsight.spec import TensorSpec
from fxsight.value import Value

Phase = Literal["open", "waiting", "done"]


@dataclass(frozen=True)
class Stop:
    """Where the forward ends: nothing later than ``time`` is computed."""

    time: float
    what: str
    line: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"where the forward is stopped ({self.line})"


class Recorder:
    """Records one body over one program, for inputs of given sizes.

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
        self.on_edit: Callable[[Location, fx.Node], None] = lambda location, node: None
        self.on_stop: Callable[[], None] = lambda: None
        self.on_row: Callable[[Value, int], None] = lambda value, key: None
        self.force: Callable[[], None] = lambda: None
        self.given: Callable[[], Sequence[Any]] = tuple  # the leaves of the inputs
        self.alive: list[weakref.ref[Value]] | None = None  # in a session: what later blocks may use
        self.saved: list[Any] = []
        self.locations = Locations(self.body.graph, places, sizes)
        self.dresser = Dresser(self.keep)
        self._unset: dict[Cell, str] = {}
        self._stop: Stop | None = None
        self._cells: weakref.WeakSet[Cell] = weakref.WeakSet()  # of the values that are there
        self._branch: list[Cell] | None = None  # what a branch not taken has made
        self.why_no_save = ""  # why nothing can be saved here

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
        state = self._state(location)
        what, spec = location.address, self.locations.spec(location)
        return self.value(Cell(self, spec, state.node, what, self.line(), handles=[(state, state.version)]))

    def node_at(self, location: Location, line: str) -> fx.Node:
        """The present value at a location, of all rows: its node.  line: the user's that asks for it."""
        return self._state(location, lambda: line).node

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

    # -- writes ------------------------------------------------------------------------------------------------------

    def is_current(self, location: Location, value: Any) -> bool:
        """Whether the value is what the location has already (``m.output *= 2`` writes it back)."""
        if not isinstance(value, Value) or value.cell.recorder is not self:
            return False
        state, cell, dim = self._state(location), value.cell, self.row_dim(location)
        if dim is not None and self.rows is not None:  # then it is current when it is these rows of the whole
            if cell.base is None or cell.step is None or cell.step[1][1:] != (dim, self.rows.start, self.rows.count):
                return False
            cell = cell.base
        return self.body.current(cell) is state.node

    def assign(self, location: Location, value: torch.Tensor) -> None:
        """The location gets the value; only there. Shapes have been checked (``write``)."""
        if self.is_current(location, value):
            return
        written = value if self.rows is None else self._scattered(location, value, self.rows)
        node, state = self.body.node_of(written), self._state(location)
        self.locations.assign(state, node, self.line())
        if isinstance(written, Value) and written.cell.base is None and written.cell.recorder is self:
            self.body.remember(written.cell.root)
            written.cell.root.handles.append((state, state.version))

    def _scattered(self, location: Location, value: torch.Tensor, rows: Rows) -> Any:
        """The whole batch with other rows."""
        dim = self.row_dim(location)
        if dim is None:
            raise self._shared(location)
        whole = self._whole(location)
        return self.call(torch.slice_scatter, (whole, value, dim, rows.start, rows.stop), {})

    def _shared(self, location: Location) -> WriteError:
        return WriteError(
            f"{location.address} has no row for each prompt: all invokes share it; write it outside the invokes"
        )

    def _edited(self, root: Cell) -> None:
        """An in-place change of a handle edits its location; of a stale one, it warns."""
        for number, (state, version) in enumerate(root.handles):
            if isinstance(state, Update):
                self.body.updates[state.number] = root.node
                continue
            if state.version != version:
                self.has_warned = True
                stale_edit(state.what if isinstance(state, Arrival) else state.location.address, self.line())
                continue
            if isinstance(state, Arrival):
                state.edited(root.node, self.line())
                root.handles[number] = (state, state.version)
                continue
            if self.rows is not None and self.row_dim(state.location) is None:
                raise self._shared(state.location)
            self.locations.change(state, root.node, self.line())
            root.handles[number] = (state, state.version)
            self.on_edit(state.location, root.node)

    def change(self, location: Location, value: Value) -> None:
        """The location gets the value in place, for all who share its memory; of the shape and dtype it has.

        In an invoke its rows do.  Raises: CausalityError; WriteError for a location that all rows share.
        """
        written = value if self.rows is None else self._scattered(location, value, self.rows)
        state, node = self._state(location), self.body.node_of(written)
        self.locations.change(state, node, self.line())
        self.on_edit(location, node)

    # -- a branch not taken ------------------------------------------------------------------------------------------

    def enter_branch(self) -> Callable[[], None]:
        """What follows is written down and forgotten: nothing of it is done.  Returns: ends the branch."""
        restore = self.locations.snapshot()
        saved, updates, mutated = len(self.saved), dict(self.body.updates), len(self.body.mutated)
        before = set(self.body.graph.nodes)
        self._branch, self.body.journal = [], []
        forget = self.body.gradients.freeze()

        def leave() -> None:
            forget()
            for cell, kept in reversed(self.body.journal or []):
                vars(cell).update(kept)
            restore(self.body.named)
            del self.saved[saved:], self.body.mutated[mutated:]
            self.body.updates = updates
            self.body.seen |= set(self.body.graph.nodes) - before
            why = "belongs to a branch whose condition was false"
            self._unset.update(dict.fromkeys(self._branch or [], why))
            self._branch = self.body.journal = None

        return leave

    @property
    def in_dead_branch(self) -> bool:
        """Whether what is written now is forgotten."""
        return self._branch is not None

    def why_unset(self, cell: Cell) -> str:
        """Why a value has no number though it was saved; empty when there is no reason known."""
        return self._unset.get(cell, "") or self.unreached

    # -- the end -----------------------------------------------------------------------------------------------------

    def keep(self, value: Any) -> None:
        """Mark a structured value as saved.

        Raises: TraceError where nothing is computed.
        """
        if self.why_no_save:
            raise TraceError(f"{self.line()}: {self.why_no_save}")
        self.saved.append(value)

    def stop(self, cell: Cell) -> None:
        """The forward ends where this value is there: of two stops the earlier."""
        if self.in_dead_branch:
            return
        self.on_stop()
        times = [state.location.since for state, _ in cell.root.handles if isinstance(state, State)]
        time = max([*times, *self.locations.needed_times(self.body.current(cell))], default=0.0)
        self.body.seen.add(cell.node)
        if self._stop is None or time < self._stop.time:
            self._stop = Stop(time, str(cell.what), self.line())

    def why_unreached(self, time: float) -> str:
        """Why the forward does not come to what is there at a time; empty when it does."""
        stop = self._stop
        return "" if stop is None or time <= stop.time else f"comes later than {stop.what}, {stop.where}"

    def finish(self) -> None:
        """The block has ended.

        Raises: InputError when a tensor of the user's was changed after the body had used it.
        """
        self.dresser.finish()
        self.body.gradients.finish()
        self.saved = [thaw(value) for value in self.saved]

    def is_result(self, leaf: Any) -> bool:
        """Whether it is a value of this body that the run computes."""
        if not isinstance(leaf, Value) or leaf.cell.recorder is not self:
            return False
        stop = self._stop
        if stop is None or max(self.locations.needed_times(self.body.node_of(leaf)), default=0.0) <= stop.time:
            return True
        self._unset[leaf.cell] = f"is computed later than {stop.what}, {stop.where}"
        return False

    @property
    def constants(self) -> list[torch.Tensor]:
        """The tensors of the user's that the body uses, by number; values of earlier blocks are computed for it."""
        for constant in self.body.constants:
            if isinstance(constant, Value):
                constant.cell.recorder.force()
        return self.body.constants

    def weight(self, name: str) -> Any:
        """A parameter or buffer of the model by name."""
        return self.lookup(name)
