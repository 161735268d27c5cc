"""The statements of a block on its program: reads, writes and edits, as the recorder writes them down.

The walk asks for them when a body goes no known way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fxsight.address import Address
from fxsight.causality import check_causal, check_edit
from fxsight.cell import check_usable
from fxsight.context import here
from fxsight.edit import Edit, replay
from fxsight.errors import NotExecuted, TraceError, UnknownAddress
from fxsight.first_row import warn_of_row
from fxsight.looked import sizes_text
from fxsight.place import Location, Place
from fxsight.program import Program
from fxsight.record import Recorder
from fxsight.rows import overlap
from fxsight.running import Running
from fxsight.sizes import check_guards
from fxsight.value import Value, values_in
from fxsight.write import check_write, present


class Statements(Running):
    """A block whose statements can be written down; ``Tracer`` says when."""

    def begin_recorder(self) -> Recorder:
        """The recorder, made when something must be written down."""
        captures = self.captures
        recorder = self._recorder = Recorder(
            self._places, self._sizes, captures.weight_names, self._demand, captures.weight
        )
        recorder.on_edit = partial(check_edit, recorder)
        recorder.body.gradients.enabled, recorder.given = self._differentiates, lambda: self.inputs
        recorder.on_row = partial(warn_of_row, self._captured, captures.module, captures.told)
        session = here().session
        if session is not None:
            recorder.alive, recorder.force = [], session.force
        return recorder

    @property
    def is_decided(self) -> bool:
        """Whether the body has looked at numbers, or has warned: then it is recorded each time."""
        return bool(self._known) or (self._recorder is not None and self._recorder.has_warned)

    @property
    def is_eager(self) -> bool:
        """Whether it runs op by op."""
        return self._backend == "eager"

    def do_read(self, address: Address, port: str) -> Any:
        """A read, written down."""
        return present(self._written, self.place(address), port, self._write_member)

    def do_write(self, address: Address, port: str, value: Any) -> None:
        """A write, written down."""
        place, recorder = self.place(address), self._written
        for leaf in values_in(value):
            check_usable(leaf.cell)
            if leaf.cell.recorder.is_open and leaf.cell.recorder is not recorder:
                self._check_foreign(leaf, place.address.at(port))
        for location, leaf in check_write(recorder, place, port, value):
            self._write_leaf(location, leaf)

    def _check_foreign(self, value: Value, address: Address) -> None:
        """Raises: TraceError for a value of another open block that is written here."""
        raise TraceError(
            f"{address} is written {value.cell.what}, a value of another trace; "
            "save it there and write it after that block"
        )

    def do_edit(self, edit: Edit) -> None:
        """All statements of an edit, written down."""
        replay(edit, self._written, self.find, self.edits)
        self._skipped += [(address, self._written.rows, line) for address, line in edit.skipped]

    def find(self, address: Address) -> tuple[Place, Sequence[Location | None]]:
        """The place of an address, and its locations: one for each leaf of its port."""
        place = self.place(address.place)
        return place, self._places.locations(place, address.port)[1]

    def _write_leaf(self, location: Location, leaf: Any) -> None:
        check_causal(self._written, location, leaf)
        self._written.assign(location, leaf)

    def _write_member(self, location: Location, leaf: Any) -> None:
        self.recorder  # noqa: B018 - such writes are not remembered
        self._write_leaf(location, leaf)

    @property
    def recorder(self) -> Recorder:
        """What the body is written down in; from here on it is not remembered.

        Raises: TraceError before the first invoke of a trace without input.
        """
        if self._walk is not None:
            self._walk.leave()
        return self._written

    # -- places ------------------------------------------------------------------------------------------------------

    def place(self, address: Address) -> Place:
        """The place of an address in this trace's program; what is fused above it is opened first.

        Raises: UnknownAddress, NotExecuted.
        """
        if self._walk is None:
            raise TraceError("this trace has no input yet: its values are there inside `with tracer.invoke(x):`")
        self._check_skipped(address)
        try:
            return self._places.find(address)
        except UnknownAddress:
            self._open(address)
            return self._places.find(address)

    def _open(self, address: Address) -> None:
        """Go on with the program in which what is fused above the address is opened.

        Raises: UnknownAddress when opening does not help; InputError at sizes for which the operator is made of
        other parts.
        """
        opened = self.captures.opened(self._captured, address)
        check_guards(opened, self._sizes)
        self._captured = opened
        if self._recorder is not None:
            self._recorder.move(self._places)

    def _go_on(self, recorder: Recorder, program: Program, sizes: Mapping[str, int]) -> None:
        """What has been said, said of another program of the model at other sizes."""
        before, self._captured, self._base, self._sizes = self._captured, program, program, sizes
        recorder.move(self._places, sizes)
        if program is not before:
            recorder.locations.relocate(self._relocated)

    def _resize(self, recorder: Recorder, program: Program, sizes: Mapping[str, int], whose: str = "") -> None:
        """More rows, perhaps longer ones: the same statements at their sizes.  whose: for messages.

        Raises: TraceError where the body has looked at a shape that is another now.
        """
        looked = recorder.looked_at()
        self._known.clear()
        self._go_on(recorder, program, sizes)
        recorder.resize()
        for (line, then), (_, now) in zip(looked, recorder.looked_at(), strict=True):
            if then != now:
                raise TraceError(
                    f"{line}: the body has looked at a shape{whose}, {sizes_text(then)}, which is {sizes_text(now)} "
                    "with the rows of this invoke; write the invoke of the longest prompt first, or look at one "
                    "dimension alone: h.size(-1)"
                )

    def _relocated(self, location: Location) -> Location:
        port = location.address.port
        try:
            place = self.place(location.address.place)
            found = self._places.locations(place, "output" if port == "output" else "inputs")[1]
            return next(x for x in found if x is not None and (x.side, x.leaf) == (location.side, location.leaf))
        except (UnknownAddress, NotExecuted, StopIteration):
            raise TraceError(
                f"with the rows of another invoke the forward takes another way, on which {location.address} has no "
                "value; use a trace for each"
            ) from None

    def _check_skipped(self, address: Address) -> None:
        why = self._why_skipped(address)
        if why:
            raise NotExecuted(f"{address.place} {why}")

    def _why_skipped(self, address: Address) -> str:
        """Why a call does not run for the present rows; empty when it does."""
        for skipped, rows, line in self._skipped:
            if is_inside(address, skipped) and overlap(rows, self._written.rows):
                return f"does not run: {skipped} around it is skipped ({line})"
        return ""


def is_inside(address: Address, outer: Address) -> bool:
    """Whether a place is inside the call of another."""
    if outer.steps:
        return (address.module, address.call) == (outer.module, outer.call) and (
            len(address.steps) > len(outer.steps) and address.steps[: len(outer.steps)] == outer.steps
        )
    below = address.module.startswith(f"{outer.module}." if outer.module else "") and address.module != outer.module
    return below or (address.module == outer.module and bool(address.steps))
