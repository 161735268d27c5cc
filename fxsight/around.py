"""What a step of a generation needs of the generation around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fxsight.address import Address
from fxsight.auto import Backend
from fxsight.captures import Captures
from fxsight.cursor import Cursor
from fxsight.known import Step as Way
from fxsight.rehearsal import Known
from fxsight.rows import Call
from fxsight.run import Executable

if TYPE_CHECKING:
    from fxsight.step import Step


class Around(Protocol):
    """What a step needs of its generation."""

    captures: Captures
    cursor: Cursor
    backend: Backend

    def step(self, number: int) -> Step:
        """One of its steps."""
        ...

    def meant(self, address: Address) -> Step:
        """The step that is meant for a place."""
        ...

    @property
    def names(self) -> Mapping[int, str]:
        """Names of the module's weights by ``id``."""
        ...

    def touch(self) -> None:
        """Something is read or written."""
        ...

    @property
    def count(self) -> int:
        """How many steps there are at most."""
        ...

    def call_of(self, number: int) -> Call | None:
        """The call of a step with its real inputs, before it is made; None where it is not known in the block."""
        ...

    def stop_at(self, number: int) -> None:
        """A step is the last."""
        ...

    def is_last(self, number: int) -> bool:
        """Whether the generation ends at a step."""
        ...

    def check_repeats(self, address: Address) -> None:
        """Raises: TraceError for a module that has no further steps."""
        ...

    def root(self, known: Known, line: str) -> Way:
        """Where bodies begin that begin at a line, over a program."""
        ...

    def prepared(self, executable: Executable) -> list[Any]:
        """The arguments of a program with the weights among them, looked up once in a generation."""
        ...
