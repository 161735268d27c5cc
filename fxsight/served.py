"""Finished programs for bodies that differ in numbers alone: the second number makes one program for all.

h[:, 3] = 0.5    then    h[:, 7] = 2.0    are two programs; every further position and value is the second
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from fxsight.errors import FxsightError
from fxsight.intervention import Intervention
from fxsight.lift import Number, Outline, lifted, outline, varying
from fxsight.run import Executable

Make = Callable[[Intervention], Executable]


@dataclass(frozen=True)
class _Seen:
    """What is known of bodies of one outline.

    first: the numbers of one of them.  which: those that have varied.  program: with these as constants; None while no
    number has varied, or where only programs of their own can be made.
    """

    first: tuple[Number, ...]
    which: tuple[int, ...] = ()
    program: Executable | None = None
    refused: bool = False


class Served:
    """The outlines that have been seen, the latest so many.  kept: how many."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._seen: OrderedDict[Hashable, _Seen] = OrderedDict()

    def find(self, program: Hashable, asked: Intervention, make: Make) -> Executable:
        """The finished program of a body, and the numbers for it.

        program: what the body was recorded on.  make: finishes an intervention.
        Raises: what ``make`` raises for the body itself.
        """
        own = outline(asked)
        key = (program, "\n".join(line.partition("    # ")[0] for line in own.text.splitlines()))
        seen = self._seen.get(key)
        if seen is None or seen.refused or len(seen.first) != len(own.numbers):
            found = make(asked)
            self._seen.setdefault(key, _Seen(own.numbers))
            if len(self._seen) > self._kept:
                self._seen.popitem(last=False)
            return found
        return self._lifted(key, seen, own, asked, make)

    def _lifted(self, key: Hashable, seen: _Seen, own: Outline, asked: Intervention, make: Make) -> Executable:
        differ = varying([Outline(own.text, seen.first), own])
        which = tuple(sorted({*seen.which, *differ}))
        if seen.program is None or which != seen.which:
            try:
                seen = replace(seen, which=which, program=make(lifted(asked, which)))
            except FxsightError:  # a pass must see the number: stack(xs)[3]
                self._seen[key] = replace(seen, refused=True)
                return make(asked)
            self._seen[key] = seen
        assert seen.program is not None
        return seen.program.with_numbers([own.numbers[i] for i in which])
