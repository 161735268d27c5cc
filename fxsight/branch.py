"""``with tracer.cond(condition):`` a block whose edits and saves count only if the condition holds."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from fxsight.record import Recorder


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
    ) -> None:
        if self._leave is not None:
            self._leave()
