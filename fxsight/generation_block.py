"""The block of a generation, from its first line to its last: rehearsed as it is entered, generated as it is left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from fxsight.auto import Backend
from fxsight.branch import Stopped
from fxsight.cache import Cache
from fxsight.captures import Captures
from fxsight.containers import list as SavedList
from fxsight.containers import thaw
from fxsight.context import enter_trace, here, leave_trace
from fxsight.edit import Edit
from fxsight.errors import TraceError
from fxsight.generating import Generating
from fxsight.prompted import Prompted
from fxsight.repertoire import Repertoire, Score
from fxsight.tracer import Tracer
from fxsight.value import Value, values_in


class GenerationBlock(Generating):
    """``with`` and what it does; ``Generation`` is what may be said inside.

    prompts: what is generated from, which invokes may bring.  method: of the module, ``generate``.
    """

    def __init__(
        self,
        captures: Captures,
        prompts: Prompted,
        backend: Backend,
        edits: Sequence[Edit],
        repertoire: Repertoire,
        method: str = "generate",
    ) -> None:
        super().__init__(captures, prompts, backend, edits, method)
        self.position = 0
        self._repertoire = repertoire
        self._outside: Any = None
        self._caches: list[tuple[Cache, dict[int, Cache]]] = []
        self._template: Tracer | None = None
        self._saved: list[Any] = []
        self._returned: Any = None

    def __enter__(self) -> Self:
        session = here().session
        if session is not None and session.is_written_down:
            raise TraceError(
                "generate in a block that is written once for all elements: write `for item in session.iter(...):`"
            )
        if self._prompts.calls:
            self._known = self._rehearsed()
        enter_trace(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        leave_trace(self)
        stopped = isinstance(error, Stopped) and error.block is self
        try:
            if error is None or stopped:
                self._end()
        finally:
            for step in self._steps.values():
                step.end()
            self._steps.clear()
            self._saved.clear()
            self._prepared.clear()
            self._caches.clear()
            self._has_ended, self._performance = True, None
        return stopped or None

    def _rehearsed(self) -> Score:
        score = self._repertoire.of(self.captures, self.method, self._prompts.call)
        self._prompts.check(score.steps[0])
        return score

    def _end(self) -> None:
        if self._known is None:
            raise TraceError("generate() needs a prompt, or at least one `with tracer.invoke(prompt):` block")
        self._keep_containers()
        session = here().session
        if session is not None:
            session.force()
        self._is_held = session is not None  # values of it may be used in the session
        for number, step in self._steps.items():
            if number not in self._ran and not self._is_held:
                step.close()
        self._returned = self.run()
        for cache, steps in self._caches:
            cache.join(steps)
        self._drop_unreached()

    def alone(self) -> Any:
        """Without a block: what the method returns, with the edits of the model."""
        with self:
            pass
        return self._returned

    def _keep_containers(self) -> None:
        for container in self._saved:
            for value in values_in(thaw(container)):
                value.save()

    def _drop_unreached(self) -> None:
        """What a kept list was given at steps that did not run is not in it."""
        for container in self._saved:
            if isinstance(container, SavedList):
                container[:] = [x for x in container if type(x) is not Value]
