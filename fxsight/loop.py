"""``session.iter(items)``: a plain Python loop, or a block that is written once and run for every element.

for item in session.iter([0, 1, 2]):            # Python's own loop
with session.iter([0, 1, 2]) as item:           # written down once, run for each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

from fxsight.item import Elements, Item, evaluate

Statement = Callable[[Elements], None]


class LoopEnd(Exception):
    """``iterator.exit()`` has been reached while a loop runs; never seen outside."""

    def __init__(self, loop: object) -> None:
        super().__init__("the loop has ended")
        self.loop = loop


class Block(Protocol):
    """What a loop needs of its session."""

    def open_block(self, loop: Loop | None) -> None:
        """Statements are written down from now on."""
        ...

    def close_block(self) -> list[Statement]:
        """They are complete."""
        ...

    def do(self, statement: Statement) -> None:
        """Now, or in the block that is being written."""
        ...

    def log(self, *values: Any) -> None:
        """Print."""
        ...

    def refer(self, value: Any) -> None:
        """Values in a structure are needed when the block runs."""
        ...


class Loop:
    """One loop over ``items``, which may be an item of a loop around it.

    with_context: whether the block gets ``(item, loop)``, as ``return_context=True`` asks.
    """

    def __init__(self, session: Block, items: Iterable[Any] | Item, with_context: bool) -> None:
        self._session, self._items, self._with_context = session, items, with_context
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        """The elements, or ``(element, loop)`` pairs: ``loop.exit()`` ends the loop there."""
        for element in self._items:
            yield (element, self) if self._with_context else element
            if self._ended:
                return

    def __enter__(self) -> Any:
        self._session.open_block(self)
        item = Item(lambda now: now[self])
        return (item, self) if self._with_context else item

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block = self._session.close_block()
        if error is None:
            self._session.do(lambda now: self._run(block, now))

    def _run(self, block: list[Statement], now: Elements) -> None:
        try:
            for element in self.elements(now):
                for statement in block:
                    statement({**now, self: element})
        except LoopEnd as end:
            if end.loop is not self:
                raise

    def elements(self, now: Elements) -> Iterable[Any]:
        """What the loop is over, for given elements of the loops around it."""
        found: Iterable[Any] = evaluate(self._items, now)
        return found

    def log(self, *values: Any) -> None:
        """Print values, once for each element."""
        self._session.log(*values)

    def exit(self) -> None:
        """End the loop here; of a plain loop, after this element."""
        self._session.do(self._end)

    def _end(self, now: Elements) -> None:
        if self in now:
            raise LoopEnd(self)
        self._ended = True

    def cond(self, condition: Any) -> AbstractContextManager[None]:
        """A block of statements for the elements for which the condition holds."""
        return Condition(self._session, condition)


class Condition:
    """``with iterator.cond(item == 2):``, and ``session.cond``."""

    def __init__(self, session: Block, condition: Any) -> None:
        self._session, self._condition = session, condition

    def __enter__(self) -> None:
        self._session.refer(self._condition)
        self._session.open_block(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block = self._session.close_block()
        if error is None:
            self._session.do(lambda now: self._run(block, now))

    def _run(self, block: list[Statement], now: Elements) -> None:
        if bool(evaluate(self._condition, now)):
            for statement in block:
                statement(now)
