"""``with tracer.cond(condition):`` a block whose edits and saves count only if the condition holds."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from fxsight.record import Recorder


class Stopped(BaseException):
    """Ends one block, of a trace, of a session or of a branch not taken; never seen outside it."""

    def __init__(self, block: object) -> None:
        super().__init__("the block is stopped")
        self.block = block


class Branch:
    """One such block. In a branch not taken nothing is computed for a condition inside it."""

    def __init__(self, recorder: Recorder, condition: Any) -> None:
        self._recorder, self._condition = recorder, condition
        self._leave: Callable[[], None] | None = None

    def __enter__(self) -> None:
        if not self._recorder.in_dead_branch and not bool(self._condition):
            self._leave = self._recorder.enter_branch()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._leave is None:
            return None
        self._leave()
        return (isinstance(error, Stopped) and error.block is self._recorder) or None
