"""The plan of a sweep: what runs once, what runs for each cell, what it costs; printed before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fxsight.captures import Captures
from fxsight.cost import Cost, Sizes, bytes_of
from fxsight.errors import SweepWarning
from fxsight.estimate import Estimate, bytes_text, total_line
from fxsight.grid import Grid, Labels, cells_of
from fxsight.lines import user_line
from fxsight.parts import Group, run_groups
from fxsight.progress import Progress
from fxsight.spec import TensorSpec
from fxsight.text import Text
from fxsight.together import BUDGET, Together
from fxsight.tree import Tree


@dataclass(frozen=True)
class Returned:
    """What each cell returns: its structure and, per leaf, dtype, shape and device."""

    tree: Tree
    leaves: tuple[TensorSpec, ...]


@dataclass(eq=False)
class Plan:
    """How a sweep will be computed: ``print(plan)``, then ``plan.run()``.

    axes: name → labels.  cells: what was recorded, one for each cell.  groups: those that share; all others run alone.
    alone: their numbers, and why.  returned: what each cell returns.  mode: "exact" or "fast".
    budget: bytes that cells which are computed together may hold at once.
    """

    axes: Labels
    cells: Sequence[Any]
    groups: Sequence[Group]
    alone: dict[int, str]
    returned: Returned
    mode: str
    captures: Captures
    sizes: Sizes
    leaves: Sequence[Any]
    budget: int = BUDGET

    # -- what it costs -----------------------------------------------------------------------------------------------

    @cached_property
    def _estimate(self) -> Estimate:
        return Estimate(self.groups, self.sizes, self.budget)

    @property
    def naive(self) -> Cost:
        """Of all cells, each run alone."""
        return self._estimate.naive + self._alone

    @property
    def cost(self) -> Cost:
        """Of this plan."""
        return self.shared + self.own + self._alone

    @property
    def shared(self) -> Cost:
        """Of what runs once."""
        return self._estimate.shared

    @property
    def own(self) -> Cost:
        """Of what runs for each cell, or for some cells together; of what is computed together, at most."""
        return self._estimate.own

    @property
    def together(self) -> list[tuple[Group, Together]]:
        """The groups whose cells are computed together."""
        return self._estimate.together

    @cached_property
    def _alone(self) -> Cost:
        return sum((self._estimate.whole(self.cells[number].program_alone.program) for number in self.alone), Cost())

    @property
    def held(self) -> int:
        """The most memory that shared values hold at once, in bytes."""
        return self._estimate.held

    @property
    def result_bytes(self) -> int:
        """Memory of the results."""
        return len(self.cells) * sum(bytes_of(spec, {}) for spec in self.returned.leaves)

    @property
    def cell_bytes(self) -> int:
        """The most memory that one part, or one chunk, holds while it runs, besides weights and shared values."""
        return self._estimate.while_one_runs

    # -- text --------------------------------------------------------------------------------------------------------

    def explain(self) -> Text:
        """What is shared, what runs for each cell, and an estimate of operations and memory."""
        return Text("\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        count = len(self.cells)
        grid = " × ".join(f"{name} {len(labels)}" for name, labels in self.axes.items())
        yield f"{count} cells: {grid}; {self.mode}"
        yield from self._estimate.lines("cell")
        reasons = dict.fromkeys(self.alone.values())
        for reason in reasons:
            yield f"  {sum(r == reason for r in self.alone.values())} cells run alone: {reason}"
        yield total_line("cell", self.naive, self.cost)
        yield f"{self._estimate.memory_line('cell')}, results {bytes_text(self.result_bytes)}"

    def __str__(self) -> str:
        return self.explain()

    __repr__ = __str__

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, progress: bool = True) -> Grid:
        """Compute all cells.

        progress: a line on stderr while it takes long, in a terminal.
        Interrupted (``KeyboardInterrupt``), it warns and returns what is done: ``grid.done``.
        Raises: InputError when a tensor that a body used has been changed since.
        """
        for cell in self.cells:
            cell.check_unchanged()
        grid = self._empty()
        try:
            with Progress("sweeping") as tick, torch.no_grad():
                for done, (number, results) in enumerate(self._results(), 1):
                    self._keep(grid, number, results)
                    if progress:
                        tick(f"sweeping: {done} of {len(self.cells)} cells")
        except KeyboardInterrupt:
            done = int(grid.done.sum())
            file, _, line = user_line().rpartition(":")
            message = f"{done} of {len(self.cells)} cells were done when the sweep was interrupted; see grid.done"
            warnings.warn_explicit(message, SweepWarning, file or "<sweep>", int(line or 0))
        return grid

    def _results(self) -> Iterator[tuple[int, list[Any]]]:
        for number in self.alone:
            yield number, self.cells[number].run_alone(self.leaves)
        yield from run_groups(self.groups, self.leaves, self.budget)

    def _empty(self) -> Grid:
        shape = [len(labels) for labels in self.axes.values()]
        leaves = [_blank((*shape, *spec.numbers), spec) for spec in self.returned.leaves]
        return Grid(self.axes, self.returned.tree, leaves, torch.zeros(shape, dtype=torch.bool), self.mode, self)

    @cached_property
    def _places(self) -> list[tuple[int, ...]]:
        return cells_of(self.axes)

    def _keep(self, grid: Grid, number: int, results: Sequence[Any]) -> None:
        at = self._places[number]
        for leaf, value in zip(grid.leaves, self.cells[number].finish(results), strict=True):
            leaf[at] = value
        grid.done[at] = True


def _blank(shape: Sequence[int], spec: TensorSpec) -> torch.Tensor:
    has_nan = spec.dtype.is_floating_point or spec.dtype.is_complex
    return torch.full(tuple(shape), float("nan") if has_nan else 0, dtype=spec.dtype, device=spec.device)
