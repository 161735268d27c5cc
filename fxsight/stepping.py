"""``with tracer.all():`` a body of edits that is written once and made at several steps."""

from __future__ import annotations

from fxsight.address import Address
from fxsight.around import Around
from fxsight.edit import Edit
from fxsight.editing import EditTrace
from fxsight.inputs import PLAIN
from fxsight.known import Step as Way
from fxsight.place import Place
from fxsight.record import Recorder
from fxsight.rehearsal import Known
from fxsight.walk import Walk

_ONCE = (
    "`with tracer.all():` and `with tracer.iter[...]:` write their body down once, for edits; to save at each step "
    "write a loop, `for step in tracer.all():`"
)


class StepEdit(EditTrace):
    """The body of one such block, over the program of the first of its steps."""

    def __init__(self, around: Around, number: int, known: Known) -> None:
        super().__init__(around.captures, None, PLAIN, {})
        self._around, self._number = around, number
        self._captured = self._base = known.program
        self._sizes = known.sizes
        self._walk = Walk(self, Way(), self.captures.weight_names())
        self._walk.leave()

    def place(self, address: Address) -> Place:
        """As in a trace.

        Raises: TraceError for the encoder, which has one step.
        """
        self._around.check_repeats(address)
        return super().place(address)

    def begin_recorder(self) -> Recorder:
        """The recorder, which saves nothing."""
        recorder = super().begin_recorder()
        recorder.series, recorder.why_no_save = (self._around, self._number), _ONCE
        return recorder

    def made(self) -> list[Edit]:
        """The edit, when the block has ended; none where nothing was written.

        Raises: EditError.
        """
        assert self._walk is not None
        self._end(self._walk)
        assert self._recorder is not None
        self._recorder.phase = "done"
        return [] if self.edit is None else [self.edit]
