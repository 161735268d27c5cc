"""Which step of a generation a body speaks of: ``tracer.iter[...]``, ``tracer.all()``, ``next()``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from fxsight.errors import TraceError

NEGATIVE = "tracer.iter step cannot be negative"


class Cursor:
    """The step that is meant now: 0 at first, that of the loop inside one, further on by what was moved."""

    def __init__(self) -> None:
        self.step: int | None = None
        self._moved: dict[str, int] = {}

    @property
    def is_plain(self) -> bool:
        """Whether no step has been named."""
        return self.step is None and not self._moved

    def at(self, path: str) -> int:
        """The step that is meant for a module."""
        moved = [way for way in self._moved if not way or path == way or path.startswith(f"{way}.")]
        return (self.step or 0) + (self._moved[max(moved, key=len)] if moved else 0)

    def move(self, path: str) -> None:
        """One step on, for a module and all below it."""
        self._moved[path] = self.at(path) - (self.step or 0) + 1

    def go(self, step: int | None, moved: dict[str, int]) -> tuple[int | None, dict[str, int]]:
        """Mean another step.  Returns: what to give to go back."""
        before = (self.step, self._moved)
        self.step, self._moved = step, moved
        return before


class Stepping(Protocol):
    """What steps need of their generation."""

    cursor: Cursor

    @property
    def count(self) -> int:
        """How many steps there are at most."""
        ...

    def reaches(self, step: int) -> bool:
        """Whether the generation comes to a step, as far as it is known."""
        ...

    def open_template(self, steps: Sequence[int]) -> Callable[[bool], None]:
        """What is said from now on is an edit of all these steps.  Returns: ends that."""
        ...


class Steps:
    """Some steps of a generation: to loop over, or ``with`` a body of edits that is made at each."""

    def __init__(self, generation: Stepping, asked: Any) -> None:
        self._generation, self._asked = generation, asked

    @property
    def numbers(self) -> list[int]:
        """The steps.

        Raises: ValueError for a negative step; TraceError for one that this generation cannot have.
        """
        asked, count = self._asked, self._generation.count
        if isinstance(asked, slice):
            if any(x is not None and x < 0 for x in (asked.start, asked.stop, asked.step)):
                raise ValueError(NEGATIVE)
            return list(range(count))[asked]
        found = [int(step) for step in (asked if isinstance(asked, (list, tuple, range)) else [asked])]
        if any(step < 0 for step in found):
            raise ValueError(NEGATIVE)
        late = next((step for step in found if step >= count), None)
        if late is not None:
            raise TraceError(
                f"step {late}: this generation has {count} steps at most, 0 to {count - 1}; ask for more with "
                "max_new_tokens"
            )
        return found

    def __iter__(self) -> Iterator[int]:
        cursor = self._generation.cursor
        for step in self.numbers:
            if not self._generation.reaches(step):
                return
            before = cursor.go(step, {})
            try:
                yield step
            finally:
                cursor.go(*before)

    def __enter__(self) -> Steps:
        self._leave = self._generation.open_template(self.numbers)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._leave(kind is None)


class Iterations:
    """``tracer.iter``: ``[2]``, ``[[0, 2]]``, ``[1:3]``, ``[:]``."""

    def __init__(self, generation: Stepping) -> None:
        self._generation = generation

    def __getitem__(self, asked: int | list[int] | slice) -> Steps:
        return Steps(self._generation, asked)
