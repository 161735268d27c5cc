"""A session: several traces, run in the order in which they are written, when the session ends.

Values of one trace are used in the next without ``.save()``. Nothing runs before the end unless a number is needed;
then everything up to there runs, and what is still held becomes plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NoReturn

from fxsight.branch import Stopped
from fxsight.containers import thaw
from fxsight.context import enter_session, here, leave_session
from fxsight.errors import TraceError
from fxsight.item import Elements, Item, evaluate
from fxsight.loop import Condition, Loop, Statement
from fxsight.shared import SHARED, Sharing, Terms
from fxsight.text import Text
from fxsight.tracer import Tracer
from fxsight.value import Value, values_in


class Session:
    """``with model.session() as session:``, or ``fxsight.session()`` for traces of several models.

    terms: whether, and how, traces on the same inputs compute what they have in common once.
    """

    def __init__(self, terms: Terms = SHARED) -> None:
        self._sharing = Sharing(terms)
        self._waiting: list[Tracer] = []
        self._written: list[Tracer] = []  # in the outermost block, which has not run yet
        self._kept: list[Any] = []
        self._blocks: list[list[Statement]] = []
        self._loops: list[Loop | None] = []

    def __enter__(self) -> Session:
        enter_session(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        leave_session()
        ended = isinstance(error, Stopped) and error.block is self
        try:
            if error is None or ended:
                self._finish()
        finally:
            for tracer in self._waiting:
                tracer.recorder.phase = "done"
            self._waiting.clear()
        return ended or None

    # -- what traces ask ---------------------------------------------------------------------------------------------

    def add(self, tracer: Tracer) -> None:
        """A block has ended, and waits."""
        if not self._blocks:
            self._waiting.append(tracer)
            return
        self._written.append(tracer)
        self._blocks[-1].insert(tracer.position, lambda now: self._run_again(tracer, now))
        for outer in here().traces:  # of another model: it runs later than this one
            outer.position += outer.position >= tracer.position

    @property
    def position(self) -> int:
        """Where a trace that begins now stands in the block that is written down: before what is done in it."""
        return len(self._blocks[-1]) if self._blocks else 0

    def _run_again(self, tracer: Tracer, now: Elements) -> None:
        for written in self._written:
            written.seal()
        self._written.clear()
        args, kwargs = evaluate(tracer.asked_call, now)
        tracer.run_again((tuple(args), kwargs), self._held(tracer))

    def example(self, value: Any) -> Any:
        """A structure with the first elements of the loops for their items: what a body in a loop is recorded on.

        Raises: TraceError when there are none.
        """
        loops = [loop for loop in self._loops if loop is not None]
        first = next(_elements(loops, {}), None)
        if first is None:
            raise TraceError(
                "a trace in a loop over nothing: a block that is written once for all elements is written on the "
                "first; write `for item in session.iter(...):`"
            )
        return evaluate(value, first)

    def force(self) -> None:
        """Run what waits, and let everything that is still held become plain tensors."""
        waiting = self._take()
        try:
            self._sharing.run(waiting, self._held)
        finally:
            for tracer in waiting:
                tracer.recorder.phase = "done"

    def _take(self) -> list[Tracer]:
        """What waits, to run now."""
        waiting, self._waiting = self._waiting, []
        for tracer in waiting:
            tracer.seal()
        return waiting

    def _held(self, tracer: Tracer) -> list[Value]:
        """The values of a block that somebody still holds."""
        refs = tracer.recorder.alive or []
        held = [value for value in (ref() for ref in refs) if value is not None]
        refs.clear()  # a tensor with weak references cannot become another
        return held

    def _finish(self) -> None:
        for value in self._kept:
            self.refer(thaw(value))
        used: list[Any] = [value for tracer in self._waiting for value in tracer.needed]
        waiting = self._take()

        def wanted(tracer: Tracer) -> list[Value]:
            self._held(tracer).clear()
            return [value for value in used if type(value) is Value and value.cell.recorder is tracer.recorder]

        try:
            self._sharing.run(waiting, wanted)
        finally:
            for tracer in waiting:
                tracer.recorder.phase = "done"

    # -- what users ask ----------------------------------------------------------------------------------------------

    def explain(self) -> Text:
        """What the traces that have run by now have shared: what ran once, what for each, and which ran alone, why."""
        return self._sharing.explain()

    def save(self, value: Any) -> Any:
        """Keep every value in a structure, those put into it later too.  Returns: the structure."""
        self._kept.append(value)
        return value

    # -- statements --------------------------------------------------------------------------------------------------

    def open_block(self, loop: Loop | None) -> None:
        """Statements are written down from now on; what waits runs first."""
        self.force()
        if not self._blocks:
            self._written.clear()
        self._blocks.append([])
        self._loops.append(loop)

    def close_block(self) -> list[Statement]:
        """They are complete."""
        self._loops.pop()
        return self._blocks.pop()

    def do(self, statement: Statement) -> None:
        """Now, or in the block that is being written."""
        if self._blocks:
            self._blocks[-1].append(statement)
        else:
            statement({})

    def refer(self, value: Any) -> None:
        """Values in a structure are needed when a block, or the session, runs."""
        for leaf in values_in(value):
            leaf.cell.recorder.keep(leaf)

    @property
    def is_written_down(self) -> bool:
        """Whether statements are written down, in a loop or a condition."""
        return bool(self._blocks)

    def later(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Item:
        """A call on values that are there when the block runs."""
        self.refer((args, kwargs))
        return Item(lambda now: function(*evaluate(args, now), **evaluate(kwargs, now)))

    def log(self, *values: Any) -> None:
        """Print values; what they need is run now, in a loop for each element."""
        self.refer(values if self._blocks else ())
        self.do(lambda now: print(*evaluate(values, now)))

    def iter(self, items: Iterable[Any] | Item, return_context: bool = False) -> Loop:
        """A loop over items: Python's own (``for item in session.iter(xs)``), or a block written once (``with``).

        return_context: the block gets ``(item, loop)``, with ``loop.exit()``, ``loop.log(...)``, ``loop.cond(...)``.
        """
        return Loop(self, items, return_context)

    def cond(self, condition: Any) -> AbstractContextManager[None]:
        """A block of traces and statements that counts only if the condition holds."""
        return Condition(self, condition)

    def exit(self) -> None:
        """End the session here: the traces so far run, what comes after is not done.

        In a block of ``with session.iter(...)`` or ``session.cond(...)``: when the block runs and comes here.
        """
        for trace in here().traces:
            trace.check_alive()
        self.do(self._exit)

    def _exit(self, now: Elements) -> NoReturn:
        raise Stopped(self)


def _elements(loops: Sequence[Loop], now: Elements) -> Iterator[Elements]:
    """The elements of nested loops, in the order in which they come."""
    if not loops:
        yield now
        return
    for element in loops[0].elements(now):
        yield from _elements(loops[1:], {**now, loops[0]: element})
