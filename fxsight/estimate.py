"""What groups of cells cost, from their shapes: what runs once, what runs for each, and cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from fxsight.cost import Cost, Sizes, cost_of, peak_bytes
from fxsight.parts import Group
from fxsight.program import Program
from fxsight.targets import target_name
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

    @cached_property
    def held(self) -> int:
        """The most memory that shared values hold at once, in bytes."""
        held = dict[int, int]()
        most = 0
        for group in self.groups:
            for part in group.shared:
                held.update(part.held(self.sizes))
            most = max(most, sum(held.values()))
            held = {value: size for value, size in held.items() if value not in group.last}
        return most

    @cached_property
    def while_one_runs(self) -> int:
        """The most memory that one part, or one chunk, holds while it runs, besides weights and shared values."""
        parts = [peak_bytes(p.program.graph, self.sizes) for g in self.groups for p in g.parts]
        return max([*parts, *(t.chunk_bytes(len(group.cells), self.budget) for group, t in self.together)], default=0)

    # -- text --------------------------------------------------------------------------------------------------------

    def lines(self, cells: str) -> Iterator[str]:
        """What is computed how often.  cells: what the cells are called."""
        programs = "one program" if len(self.groups) == 1 else f"{len(self.groups)} programs"
        if self.groups:
            yield f"  {programs} for {self.cells} {cells}s"
            yield f"  once           {cost_text(self.shared)}"
            yield f"  for each {cells:<5} {'at most ' if self.together else ''}{cost_text(self.own)}"
        if self.together:
            yield from self._fast_lines(cells)
        for what, by in (("rows", "NarrowReads"), ("columns", "NarrowColumns")):
            narrowed = [g for g in self.groups if any(made.startswith(by) for made in g.program.history)]
            tried = "" if any(group.together for group in narrowed) else ", tried to give the same bits"
            if narrowed:
                yield f"  only {what} that are read: {len(narrowed)} programs{tried}"

    def _fast_lines(self, word: str) -> Iterator[str]:
        axes = dict.fromkeys(together.stride.axis for _, together in self.together)
        cells = sum(len(group.cells) for group, _ in self.together)
        chunks = sum(together.chunks(len(group.cells), self.budget) for group, together in self.together)
        by = f"{cells} {word}s by {' and '.join(axes)}"
        yield f"  together       {by}, in at most {chunks} chunks of {bytes_text(self.budget)}"
        if any(together.stride.partial for _, together in self.together):
            yield "                 only rows that an edit reaches; the others are those of the run without it"
        names = sorted({target_name(node.target) for _, together in self.together for node in together.stride.alone})
        if names:
            yield f"                 but {word} by {word}: {', '.join(names)}"
        exact = len(self.groups) - len(self.together)
        if exact:
            yield f"                 but {exact} programs as in mode exact: nothing in them is known to go by rows"
        done = [rows for _, together in self.together for rows in together.done]
        if done:
            yield f"  computed       {sum(n for n, _ in done):,} of {sum(n for _, n in done):,} rows"

    def memory_line(self, cell: str) -> str:
        """The memory that it takes."""
        shared, one = bytes_text(self.held), bytes_text(self.while_one_runs)
        return f"  memory         shared values {shared}, while {_a(cell)} runs {one}"


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


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
