"""The recorder: runs a body once on shapes, and writes down what it asks for as an ``Intervention``.

Values are made in ``reads``; the torch calls between reads and writes are ``body``'s, and what has become of each
location is ``locations``'. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxsight.arguments import Update
from fxsight.arrivals import Arrival
from fxsight.body import Demand
from fxsight.cell import Cell
from fxsight.containers import thaw
from fxsight.dressed import Dresser
from fxsight.errors import TraceError, WriteError
from fxsight.locations import State
from fxsight.lost import stale_edit
from fxsight.place import Location, Places
from fxsight.reads import Reads
from fxsight.rows import Rows
from fxsight.value import Value


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


class Recorder(Reads):
    """Records one body over one program, for inputs of given sizes: the arguments are those of ``Reads``."""

    def __init__(
        self,
        places: Places,
        sizes: Mapping[str, int],
        weights: Callable[[], Mapping[int, str]],
        demand: Demand,
        lookup: Callable[[str], torch.Tensor],
    ) -> None:
        super().__init__(places, sizes, weights, demand, lookup)
        self.on_edit: Callable[[Location, fx.Node], None] = lambda location, node: None
        self.on_stop: Callable[[], None] = lambda: None
        self.saved: list[Any] = []
        self.dresser = Dresser(self.keep)
        self._unset: dict[Cell, str] = {}
        self._stop: Stop | None = None
        self.why_no_save = ""  # why nothing can be saved here

    # -- writes ------------------------------------------------------------------------------------------------------

    def is_current(self, location: Location, value: Any) -> bool:
        """Whether the value is what the location has already (``m.output *= 2`` writes it back)."""
        if not isinstance(value, Value) or value.cell.recorder is not self:
            return False
        state = self.locations.present(self._state(location), self.rows)
        cell, dim = value.cell, self.row_dim(location)
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
            self.locations.check_alone(state, self.rows)
            self.locations.change(state, root.node, self.line())
            root.handles[number] = (state, state.version)
            self.on_edit(state.location, root.node)

    def change(self, location: Location, value: Value) -> None:
        """The location gets the value in place, for all who share its memory; of the shape and dtype it has.

        In an invoke its rows do.  Raises: CausalityError; WriteError for a location that all rows share.
        """
        written = value if self.rows is None else self._scattered(location, value, self.rows)
        state, node = self._state(location), self.body.node_of(written)
        self.locations.check_alone(state, self.rows)
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
