"""What a walk needs where a body goes no known way: of the trace, and of the recorder that the trace makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fxsight.dressed import Dresser


class Writing(Protocol):
    """What a walk needs of its recorder."""

    line: Callable[[], str]
    """The user's line of the statement that is written down."""
    dresser: Dresser
    """What watches the structures of the model in the body."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One torch call on values."""
        ...

    def keep(self, value: Any) -> None:
        """Mark a structured value as saved."""
        ...


class Slow(Protocol):
    """What a walk needs of its trace."""

    @property
    def is_decided(self) -> bool:
        """Whether the body has looked at numbers, or has warned: then it is recorded each time."""
        ...

    def begin_recorder(self) -> Writing:
        """The recorder, made now."""
        ...

    def do_read(self, address: Any, port: str) -> Any:
        """A read, written down."""
        ...

    def do_write(self, address: Any, port: str, value: Any) -> None:
        """A write, written down."""
        ...

    def do_edit(self, edit: Any) -> None:
        """All statements of an edit, written down."""
        ...
