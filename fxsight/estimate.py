"""What groups of cells cost, from their shapes: what runs once, what runs for each, and cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from fxsight.cost import Cost, Sizes, cost_of
from fxsight.parts import Group
from fxsight.program import Program
from fxsight.together import Together


@dataclass(eq=False)
class Estimate:
    """Of some groups, for inputs of these sizes.  budget: bytes that cells computed together may hold at once."""

    groups: Sequence[Group]
    sizes: Sizes
    budget: int

    @cached_property
    def naive(self) -> Cost:
        """Of all cells, each run alone."""
        return sum((self.whole(group.whole) * len(group.cells) for group in self.groups), Cost())

    @cached_property
    def shared(self) -> Cost:
        """Of what runs once."""
        return sum((self.whole(part.program) for group in self.groups for part in group.shared), Cost())

    @cached_property
    def own(self) -> Cost:
        """Of what runs for each cell, or for some cells together; of what is computed together, at most."""
        exact = (self.whole(p.program) * len(set(g.keys(p))) for g in self.groups if not g.together for p in g.own)
        fast = (together.cost(len(group.cells), self.budget) for group, together in self.together)
        return sum((*exact, *fast), Cost())

    @property
    def together(self) -> list[tuple[Group, Together]]:
        """The groups whose cells are computed together."""
        return [(group, group.together) for group in self.groups if group.together is not None]

    @property
    def cells(self) -> int:
        """How many there are."""
        return sum(len(group.cells) for group in self.groups)

    def whole(self, program: Program) -> Cost:
        """Of one program, run once."""
        return cost_of(program.graph.nodes, self.sizes)

    def lines(self, cells: str) -> Iterator[str]:
        """What is computed how often.  cells: what the cells are called."""
        programs = "one program" if len(self.groups) == 1 else f"{len(self.groups)} programs"
        if self.groups:
            yield f"  {programs} for {self.cells} {cells}s"
            yield f"  once           {cost_text(self.shared)}"
            yield f"  for each {cells:<5} {'at most ' if self.together else ''}{cost_text(self.own)}"


def total_line(cells: str, naive: Cost, planned: Cost) -> str:
    """All that is computed, and how much more it would be cell by cell."""
    times = f"; {cells} by {cells} it would be {naive.flops / planned.flops:.2f} times as many" if planned.flops else ""
    return f"  all            {cost_text(planned)}{times}"


def cost_text(cost: Cost) -> str:
    """``171 operators, 26.3 kFLOP``."""
    return f"{cost.operators:,} operators, {_scaled(cost.flops, 1000, ('', 'k', 'M', 'G', 'T', 'P'))}FLOP"


def bytes_text(count: int) -> str:
    """``320 B``."""
    return f"{_scaled(count, 1024, ('', 'k', 'M', 'G', 'T'))}B"


def _scaled(number: float, step: int, units: Sequence[str]) -> str:
    unit = 0
    while number >= step and unit < len(units) - 1:
        number, unit = number / step, unit + 1
    return f"{number:.3g} {units[unit]}" if number < 1000 else f"{number:.0f} {units[unit]}"
