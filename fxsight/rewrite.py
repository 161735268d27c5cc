"""``Pass`` and ``Pipeline``: program → program, with the contract kept in one place.

A pass is a frozen dataclass with one method, ``rewrite(editor)``. The base class copies, rewrites, schedules,
verifies the result and knows whether anything changed; the input program is never touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fxsight.editor import Editor
from fxsight.effects import schedule
from fxsight.program import Program
from fxsight.verify import verify


@dataclass(frozen=True)
class Rewritten:
    """What a pass made: the program, and whether it differs from the one it was given."""

    program: Program
    changed: bool


class Pass(ABC):
    """One rewrite. Subclasses are frozen dataclasses whose fields are its options and whose docstring shows
    before and after."""

    @abstractmethod
    def rewrite(self, editor: Editor) -> None:
        """Change the graph through the editor; change nothing to mean "nothing to do"."""

    @property
    def label(self) -> str:
        """How the pass stands in a program's history."""
        return repr(self)

    def apply(self, program: Program, copies: bool = True) -> Rewritten:
        """The rewritten and verified program; the argument itself when nothing changed.

        copies: False gives the argument up: its graph becomes the result's.

        Raises: ProgramError when the result breaks a rule of ``verify``: a bug of the pass.
        """
        editor = Editor(program, self.label, copies)
        self.rewrite(editor)
        result = editor.finish()
        return Rewritten(program if result is program else verify(result), result is not program)

    def __call__(self, program: Program) -> Program:
        """The rewritten program."""
        return self.apply(program).program


@dataclass(frozen=True)
class Together(Pass):
    """Several passes as one: one copy of the graph, one check of the result, one line in the history.

    passes: the first may leave the graph in any order; the others keep the order they find.
    """

    passes: tuple[Pass, ...]

    def rewrite(self, editor: Editor) -> None:
        """One after the other."""
        first, *others = self.passes
        first.rewrite(editor)
        schedule(editor.graph)
        editor.keeps_order = True
        for step in others:
            step.rewrite(editor)


Between = Callable[[Pass, Rewritten], None]


class Pipeline:
    """Passes in order. ``between`` is called after each: for printing, timing, counting.

    One copy of the graph serves all of them, as long as nobody is shown what lies between.
    """

    def __init__(self, *passes: Pass, between: Between | None = None) -> None:
        self.passes = passes
        self.between = between

    def __call__(self, program: Program) -> Program:
        """Run all passes."""
        given = program
        for step in self.passes:
            done = step.apply(program, copies=program is given or self.between is not None)
            if self.between is not None:
                self.between(step, done)
            program = done.program
        return program

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(repr, self.passes))})"
