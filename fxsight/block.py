"""A block on one program, from its first line to its last: entered, said, and run or left to its session.

with ...:            enter: the program is found (captured once), edits are said; the walk begins
    ...              the body goes a known way, or is written down
                     leave: the finished program of a known way runs, or what is written down is finished and runs
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch

from fxsight.asked import teaches
from fxsight.become import become
from fxsight.branch import Stopped
from fxsight.context import enter_trace, here, leave_trace
from fxsight.edit import Edit
from fxsight.effects import changes_inputs
from fxsight.errors import TraceError
from fxsight.known import Finish, Step
from fxsight.lines import user_line
from fxsight.program import Program
from fxsight.record import Recorder
from fxsight.statements import Statements
from fxsight.value import Value, values_in
from fxsight.walk import Walk


class Block(Statements):
    """``with`` and what it does; ``Tracer`` is what may be said inside."""

    def __enter__(self) -> Self:
        if self._batch.calls:
            self._begin()
        enter_trace(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        leave_trace(self)
        self.captures.attached_calls.forget(self)
        stopped = isinstance(error, Stopped) and error.block is self
        if self._walk is None and error is None:
            raise TraceError("trace() needs an input, or at least one `with tracer.invoke(...)` block")
        if self._walk is None:
            return None
        try:
            if error is None or stopped:
                self._end(self._walk)
        finally:
            if self._recorder is not None and self._recorder.phase == "open":
                self._recorder.phase = "done"
            self._walk.end()
            if self._recorder is None or self._recorder.phase == "done":
                self.forget()
        return stopped or None

    def _end(self, walk: Walk) -> None:
        finish = walk.step.finish if walk.fast and walk.step is not None else None
        if finish is not None and (finish.learning is None or finish.learning == self._learning(walk)):
            self._run_finished(walk, finish)
            return
        walk.settle()
        recorder = self._written
        self._finish(recorder)
        session = here().session
        if session is not None:
            self._wait(recorder, session)
            return
        learning = None if recorder.body.gradients.is_empty else self._learning(walk)
        self.run([])
        if self._executable is not None and not self._updates and not self.is_decided:
            walk.remember(self._executable, recorder.constants, self._numbers, learning)

    def _wait(self, recorder: Recorder, session: Any) -> None:
        """For the end of the session; a block that changes tensors of the user's runs at once, with all before.

        It changes them in place, or gives them gradients: what is written next may read them.

        Raises: TraceError for such a block in one that is written once, around which an optimizer's step would not be.
        """
        gives = teaches(recorder)
        if gives and session.is_written_down:
            raise TraceError(
                "backward() gives a .grad to tensors of yours, and this block is written once for all elements: what "
                "follows it, such as optimizer.step(), would be done once; write `for item in session.iter(...):`"
            )
        recorder.phase = "waiting"
        self.lend()
        session.add(self)
        changes = recorder.body.changes_given or changes_inputs(self._captured)
        if (gives or changes) and not session.is_written_down:
            session.force()

    def _learning(self, walk: Walk) -> Any:
        return walk.learning(self.captures.watched().tensors, self.inputs)

    def _run_finished(self, walk: Walk, finish: Finish) -> None:
        """The body has gone a known way to its end: run the program that is there."""
        self._finished, self._constants = finish, walk.constants(finish)
        results = self._compute(finish.executable, self.inputs, self._constants, self._batch.joined)
        values = walk.values
        for index, place in finish.results:
            become(values[index], results[place])

    def _finish(self, recorder: Recorder) -> None:
        recorder.finish()
        self._kept = [keeper.read(recorder, self._why_skipped) for keeper in self._keepers]

    def _begin(self) -> None:
        found = self.captures.quick(*self._batch.joined)
        self._inputs.check(found.program, self._batch.joined)
        self._captured = self._base = found.program
        self._sizes = found.sizes
        self._walk = Walk(self, found.root(user_line(), self._backend, torch.is_grad_enabled()), found.watch.names)
        if here().session is not None or self._batch.grows:
            self._walk.leave()
        self._replay_all()

    def _begin_on_latest(self) -> None:
        """Record on the program of the last forward, at its sizes: what is recorded so has no inputs to run on.

        Raises: TraceError when there has been none.
        """
        captures = self.captures
        if captures.latest is None:
            raise TraceError(
                "this is written on a forward of the model, and there has been none: give example inputs, "
                "model.edit(x), or trace once before"
            )
        self._captured = self._base = captures.latest
        self._sizes, self._walk = captures.latest_sizes, Walk(self, Step(), captures.weight_names())
        self._replay_all()

    def _replay_all(self) -> None:
        for edit in self.edits:
            self.replay(edit)

    def replay(self, edit: Edit) -> None:
        """Say the statements of an edit here, as if they stood in the body.

        Raises: EditError where this forward does not have its places; what its statements raise.
        """
        if self._walk is not None and self._walk.live:
            self._walk.edit(edit)
        else:
            self.do_edit(edit)

    @property
    def needed(self) -> list[Value]:
        """The values of earlier blocks that this one needs."""
        return [*values_in(self.recorder.body.constants), *values_in(self._batch.joined)]

    @property
    def captured(self) -> Program:
        """The program the body is recorded on."""
        return self._captured

    @property
    def sizes(self) -> Mapping[str, int]:
        """The named sizes of the inputs."""
        return self._sizes
