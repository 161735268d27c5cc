"""What is compiled ahead of its use: one program's compilations in other processes, one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxsight.artifacts import Artifacts, NotReady
from fxsight.background import Child, Workers
from fxsight.compiled import Lowered
from fxsight.driver import can_drive
from fxsight.job import Job, Unwritable
from fxsight.program import Program
from fxsight.regions import cut
from fxsight.varying import compile_for

SMALL = 256  # nodes of a program that Inductor compiles in one piece about as quickly as in regions
TRIES = 2  # compilations for one size: what was compiled may be damaged before it is read
MOST = 16  # compilations of one program

Run = tuple[Lowered, Sequence[Any]]  # something compiled, and what it has computed


class Failed(Exception):
    """What keeps a program from being compiled, in words."""


class Ahead:
    """A program that other processes compile.

    make: makes it, at the first compilation.  fixed: sizes that it holds for alone.  artifacts: of a folder.
    """

    def __init__(
        self, make: Callable[[], Program], fixed: Mapping[str, int], artifacts: Artifacts, workers: Workers
    ) -> None:
        self._make, self._fixed, self._artifacts, self._workers = make, dict(fixed), artifacts, workers
        self._program: Program | None = None
        self._child: tuple[Any, Child] | None = None
        self._failed: dict[Any, str] = {}
        self._begun: Counter[Any] = Counter()

    @property
    def program(self) -> Program:
        """What is compiled."""
        if self._program is None:
            self._program = self._make()
        return self._program

    def is_one(self) -> bool:
        """Whether one piece is as good as regions: the program is small, or has no blocks."""
        return len(self.program.nodes) <= SMALL or len(cut(self.program)) < 2

    def run(self, key: Any, arguments: Sequence[Any], is_whole: bool, known: Lowered | None = None) -> Run | None:
        """The program run compiled; None as long as something that it needs is not: that is compiled now.

        key: what it is compiled for: the same each time.  known: what has been returned before.
        Raises: Failed.
        """
        if not self._is_free() or key in self._failed:
            if key in self._failed:
                raise Failed(self._failed[key])
            return None
        try:
            compiled = known or self._find(arguments, is_whole)
            return compiled, compiled(*arguments)
        except NotReady:
            self._begin(key, arguments, is_whole)
            return None
        except Exception as error:  # whatever torch and Inductor raise
            raise Failed(f"it cannot be compiled: {first_line(error)}") from None

    def _is_free(self) -> bool:
        """Whether no compilation goes on."""
        if self._child is None:
            return True
        key, child = self._child
        said = child.poll()
        if said is None:
            return False
        self._child = None
        if said:
            self._failed[key] = f"the compilation failed: {said}"
        return True

    def _find(self, arguments: Sequence[Any], is_whole: bool) -> Lowered:
        """Raises: NotReady; Failed; whatever torch raises."""
        if not can_drive(self.program, arguments):
            raise NotImplementedError("memory that it changes is reached in two ways, or an input is no plain tensor")
        return compile_for(self.program, arguments, self._fixed, self._artifacts.ready(), is_whole)

    def _begin(self, key: Any, arguments: Sequence[Any], is_whole: bool) -> None:
        """Raises: Failed."""
        if self._begun[key] >= TRIES:
            raise Failed("what was compiled cannot be read back")
        if self._begun.total() >= MOST:
            raise Failed(f"{MOST} compilations are the most for one program")
        assert self._artifacts.folder is not None
        job = Job(self.program, arguments, self._fixed, is_whole, self._artifacts.folder)
        try:
            child = self._workers.start(job)
        except (Unwritable, OSError) as error:
            raise Failed(first_line(error)) from None
        if child is not None:
            self._begun[key] += 1
            self._child = (key, child)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
