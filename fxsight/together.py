"""Run a stride: many cells at once, in chunks that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxsight.along import Along, join, put, take
from fxsight.attend import Asked, Attend, allowed
from fxsight.cost import Cost, Sizes, bytes_of, cost_of
from fxsight.effects import storages
from fxsight.indices import items_of
from fxsight.node import binding_of, tensor_spec
from fxsight.program import Program
from fxsight.rowset import RowSet, changed_rows, reach
from fxsight.run import Weights
from fxsight.stride import Reading, Step, Stride

BUDGET = 256 * 2**20  # bytes that a chunk may hold at once, where nothing else is said
MOST_ROWS = 512  # of one chunk: beyond, products of matrices gain nothing, and one mask for all cells is mostly closed


@dataclass(eq=False)
class Cell:
    """One cell on its way: its number among all, its constants, the values that it has alone."""

    number: int
    constants: Sequence[Any]
    values: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])
    places: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


@dataclass(eq=False)
class Together:
    """How the cells of one group are computed together.

    shared: for each value that all cells share, its number; clean: the same for values without the edits.
    done: after a run: rows that were computed, and that there are.
    """

    program: Program
    stride: Stride
    shared: Mapping[fx.Node, int]
    clean: Mapping[fx.Node, int]
    module: nn.Module
    sizes: Sizes
    done: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def run(
        self,
        cells: Sequence[tuple[int, Sequence[Any]]],
        leaves: Sequence[Any],
        values: Mapping[int, Any],
        budget: int,
    ) -> Iterator[tuple[int, list[Any]]]:
        """Cell by cell, its number and what it saves.  values: what is shared, by number."""
        run = _Run(self, leaves, values)
        for chunk in self._chunks((run.admit(number, constants) for number, constants in cells), budget):
            rows = sum(len(cell.places) for cell in chunk)
            self.done.append((rows, len(chunk) * self.stride.count))
            yield from run.finish(chunk)

    def most_rows(self, budget: int) -> int:
        """How many rows fit the budget."""
        return max(1, min(MOST_ROWS, budget * self.stride.count // max(self.peak, 1)))

    def chunks(self, cells: int, budget: int) -> int:
        """How many chunks there are when each cell needs all its rows."""
        return -(-cells // self._each(budget))

    def chunk_bytes(self, cells: int, budget: int) -> int:
        """What a chunk holds at once, at most."""
        return self.peak * min(cells, self._each(budget))

    def _each(self, budget: int) -> int:
        return max(1, self.most_rows(budget) // self.stride.count)

    def cost(self, cells: int, budget: int) -> Cost:
        """At most: of so many cells when each needs all its rows."""
        chunks = self.chunks(cells, budget)
        alone = [*self.stride.early, *(step for step in self.stride.late if step.way is None)]
        total = sum((cost_of([step.node], self.sizes) * cells for step in alone), Cost())
        for step in self.stride.late:
            if step.way is not None:
                whole = cost_of([step.node], self.sizes).flops * cells
                total += Cost(whole if step.reading is None else whole * len(step.reading) // self.stride.count, chunks)
        return total

    def _chunks(self, cells: Iterator[Cell], budget: int) -> Iterator[list[Cell]]:
        most, chunk, rows = self.most_rows(budget), list[Cell](), 0
        for cell in cells:
            if chunk and rows + len(cell.places) > most:
                yield chunk
                chunk, rows = [], 0
            chunk.append(cell)
            rows += len(cell.places)
        if chunk:
            yield chunk

    @cached_property
    def peak(self) -> int:
        """The most memory that all rows of one cell hold at once, in bytes."""
        last: dict[str, int] = {}
        for at, step in enumerate(self.stride.late):
            for node in (step.node, *step.node.all_input_nodes):
                last.update(dict.fromkeys(storages(node), at))
        held, most, made = 0, 0, dict[str, int]()
        ends: list[list[str]] = [[] for _ in self.stride.late]
        for storage, at in last.items():
            ends[at].append(storage)
        for at, step in enumerate(self.stride.late):
            for storage in storages(step.node) - made.keys():
                made[storage] = self._bytes(step)
                held += made[storage]
            most = max(most, held)
            held -= sum(made.get(storage, 0) for storage in ends[at])
        return most

    def _bytes(self, step: Step) -> int:
        whole = bytes_of(step.node.meta.get("spec"), self.sizes)
        return whole if step.reading is None else whole * len(step.reading) // self.stride.count


class _Run:
    """One run of a group: what is shared in it, and the rows that an edit can reach."""

    def __init__(self, together: Together, leaves: Sequence[Any], values: Mapping[int, Any]) -> None:
        self.together, self.stride, self.program = together, together.stride, together.program
        self._leaves, self._values = leaves, values
        weights = {n: str(binding_of(n).key) for n in self._placeholders("weight")}
        self._weights = dict(zip(weights, Weights(together.module, list(weights.values()))(), strict=True))
        self.readings: dict[fx.Node, Reading] = {step.node: step.reading for step in self.stride.late}
        read = [frozenset(rows) for step in self.stride.late for rows in step.reads.values()]
        self.always = frozenset[int]().union(*read, *(r for r in self.readings.values() if r is not None))
        self.reach = self._reach() if self.stride.partial else None
        self._kept = self._used_late()
        self._frees = self._last_uses()

    def _placeholders(self, kind: str) -> list[fx.Node]:
        return [n for n in self.program.graph.nodes if n.op == "placeholder" and binding_of(n).kind == kind]

    def _used_late(self) -> set[fx.Node]:
        return {a for step in self.stride.late for a in step.node.all_input_nodes} | set(self.program.results)

    def common(self, node: fx.Node, constants: Sequence[Any]) -> Any:
        """A value that is not computed cell by cell."""
        if node.op != "placeholder":
            return self._values[self.together.shared[node]]
        binding = binding_of(node)
        if binding.kind == "weight":
            return self._weights[node]
        if binding.kind == "input":
            return self._leaves[int(binding.key)]
        return constants[int(binding.key)] if binding.kind == "constant" else self.program.literals[str(binding.key)]

    def clean(self, node: fx.Node) -> Any:
        """The same value without the edits; None where no cell needs it."""
        number = self.together.clean.get(node)
        return None if number is None else self._values[number]

    # -- before there are rows ---------------------------------------------------------------------------------------

    def admit(self, number: int, constants: Sequence[Any]) -> Cell:
        """A cell with what comes before any rows, and the rows that it needs of its own."""
        cell = Cell(number, constants)
        for step in self.stride.early:
            args, kwargs = fx.map_arg((step.node.args, step.node.kwargs), lambda a: self.whole(a, cell))
            cell.values[step.node] = step.node.target(*args, **kwargs)  # type: ignore[operator]
        cell.values = {node: value for node, value in cell.values.items() if node in self._kept}
        cell.places = self._places(cell)
        return cell

    def whole(self, node: fx.Node, cell: Cell) -> Any:
        """A value that a cell has alone, or that all share."""
        return cell.values[node] if node in cell.values else self.common(node, cell.constants)

    def _places(self, cell: Cell) -> torch.Tensor:
        needed = torch.ones(self.stride.count, dtype=torch.bool)
        if self.reach is not None:
            changed = torch.zeros(self.stride.count, dtype=torch.bool)
            for step in self.stride.late:
                for value, lift in step.lifts.items():
                    clean = self.common(lift.clean, cell.constants)  # type: ignore[arg-type]
                    changed |= changed_rows(self.whole(value, cell), clean, lift.along.dim).cpu()
            needed = self.reach[:, changed].any(1)
            needed[list(self.always) if self.always or needed.any() else [-1]] = True  # at least one
        return needed.nonzero().flatten().to(self._device)

    @property
    def _device(self) -> str:
        lifted = [tensor_spec(value).device for step in self.stride.late for value in step.lifts]
        return lifted[0]

    def _reach(self) -> torch.Tensor:
        seen = [
            allowed(None if a.mask is None else self.common(a.mask, []), bool(a.causal), self.stride.count)
            for a in map(_asked, self.stride.attentions)
        ]
        return reach(seen, self.stride.count)

    # -- with rows ---------------------------------------------------------------------------------------------------

    def finish(self, chunk: Sequence[Cell]) -> Iterator[tuple[int, list[Any]]]:
        """The rest of some cells, together."""
        work = _Chunk(self, chunk)
        for at, step in enumerate(self.stride.late):
            work.do(step)
            for node in self._frees[at]:
                work.forget(node)
        for number, cell in enumerate(chunk):
            yield cell.number, [work.whole(result, number) for result in self.program.results]

    def _last_uses(self) -> list[list[fx.Node]]:
        """For each late step the values that nobody needs after it."""
        last: dict[fx.Node, int] = {}
        for at, step in enumerate(self.stride.late):
            last.update(dict.fromkeys([step.node, *step.node.all_input_nodes], at))
        found: list[list[fx.Node]] = [[] for _ in self.stride.late]
        kept = set(self.program.results)
        for node, at in last.items():
            if node not in kept:
                found[at].append(node)
        return found


@dataclass(frozen=True)
class _Attention:
    mask: Any
    causal: Any
    options: dict[str, Any]


def _asked(step: Step) -> _Attention:
    args, kwargs = step.node.args, dict(step.node.kwargs)
    given = [args[i] if len(args) > i else kwargs.pop(name, None) for i, name in _NAMED]
    kwargs.pop("dropout_p", None)
    return _Attention(given[0], given[1] or False, kwargs)


_NAMED = ((3, "attn_mask"), (5, "is_causal"))


class _Chunk:
    """Some cells on their way together: what they have alone, and the rows of all of them."""

    def __init__(self, run: _Run, cells: Sequence[Cell]) -> None:
        self.run, self.cells = run, cells
        self.lies = run.stride.lies
        self.sets: dict[Reading, RowSet] = {None: RowSet([cell.places for cell in cells])}
        self.rows: dict[fx.Node, Any] = {}
        self.attend = Attend(self.sets[None], run.stride.count)

    def set(self, reading: Reading) -> RowSet:
        """The rows of all cells that are needed of a value."""
        if reading not in self.sets:
            places = torch.tensor(sorted(reading or ()), device=self.cells[0].places.device)
            self.sets[reading] = RowSet([places] * len(self.cells))
        return self.sets[reading]

    def forget(self, node: fx.Node) -> None:
        """A value that nobody needs any more."""
        self.rows.pop(node, None)
        for cell in self.cells:
            cell.values.pop(node, None)

    def do(self, step: Step) -> None:
        """One step."""
        if step.way is None:
            for number, cell in enumerate(self.cells):
                cell.values[step.node] = self._alone(step, number)
        elif step.way.attends:
            self.rows[step.node] = self._attention(step)
        else:
            args, kwargs = fx.map_arg((step.way.args, step.way.kwargs), lambda a: self._argument(step, a, step.reading))
            self.rows[step.node] = step.way.target(*args, **kwargs)

    # -- together ----------------------------------------------------------------------------------------------------

    def _argument(self, step: Step, node: fx.Node, reading: Reading) -> Any:
        """An argument, as far as its rows are needed."""
        if node in self.rows:
            return self._narrowed(node, reading)
        lift = step.lifts.get(node)
        if lift is not None:
            pairs = zip(self.cells, self.set(reading).places, strict=True)
            return join([take(self.run.whole(node, cell), lift.along, rows) for cell, rows in pairs], lift.along)
        value = self.run.common(node, self.cells[0].constants)
        along = step.way.takes.get(node) if step.way is not None else None
        return value if along is None else take(value, along, self.set(reading).rows)

    def _narrowed(self, node: fx.Node, reading: Reading) -> Any:
        has = self.run.readings[node]
        if has == reading:
            return self.rows[node]
        rows = self.set(reading).within(self.set(has))
        return _each(self.rows[node], self.lies[node], lambda value, along: take(value, along, rows))

    def _attention(self, step: Step) -> torch.Tensor:
        asked, (query, key, value) = _asked(step), step.node.args[:3]
        found: list[Any] = []
        for node in (key, value):
            assert isinstance(node, fx.Node)
            is_own = node in self.rows or node in step.lifts
            if is_own:
                clean = step.lifts[node].clean if node in step.lifts else None
                shared = self.run.clean(node) if clean is None else self.run.common(clean, self.cells[0].constants)
                found.append((self._argument(step, node, None), shared))
            else:
                shared = self.run.common(node, self.cells[0].constants)
                found.append((take(shared, Along(shared.ndim - 2), self.set(None).rows), shared))
        own = self._query(step, query)
        mask = None if asked.mask is None else self.run.common(asked.mask, self.cells[0].constants)
        (k, clean_k), (v, clean_v) = found
        return self.attend(
            Asked(own, k, v, clean_k, clean_v, mask, bool(asked.causal), asked.options), self.set(step.reading)
        )

    def _query(self, step: Step, query: Any) -> torch.Tensor:
        if query in self.rows or query in step.lifts:
            found: torch.Tensor = self._argument(step, query, step.reading)
            return found
        shared = self.run.common(query, self.cells[0].constants)
        return take(shared, Along(shared.ndim - 2), self.set(step.reading).rows)

    # -- cell by cell ------------------------------------------------------------------------------------------------

    def _alone(self, step: Step, number: int) -> Any:
        node = step.node
        if step.reads:
            ((source, rows),) = step.reads.items()
            return node.target(self._read(source, rows, number), self._index(node, source, number))  # type: ignore[operator]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: self.whole(a, number))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _index(self, node: fx.Node, source: fx.Node, number: int) -> tuple[Any, ...]:
        """The same index where the rows that it takes are all there are."""
        along = self.lies[source]
        items = items_of(node.args[1], len(source.meta["spec"].shape))
        assert items is not None, "only such indices are read so"
        items[along.dim] = 0 if type(items[along.dim]) is int else slice(None)
        return tuple(fx.map_arg(items, lambda a: self.whole(a, number)))

    def _read(self, source: fx.Node, rows: tuple[int, ...], number: int) -> torch.Tensor:
        has = self.set(self.run.readings[source])
        wanted = torch.tensor(rows, device=has.rows.device)
        places = torch.searchsorted(has.places[number], wanted) + has.starts[number]
        return take(self.rows[source], self.lies[source], places)

    def whole(self, node: fx.Node, number: int) -> Any:
        """A value as one cell has it, all rows of it."""
        if node not in self.rows:
            return self.run.whole(node, self.cells[number])
        has = self.set(self.run.readings[node])
        places = torch.arange(has.starts[number], has.starts[number + 1], device=has.rows.device)
        clean: Any = self.run.clean(node) if len(places) < self.run.stride.count else None

        def one(value: torch.Tensor, along: Along) -> torch.Tensor:
            own = take(value, along, places)
            return own if len(places) == self.run.stride.count else put(clean, along, has.places[number], own)

        return _each(self.rows[node], self.lies[node], one)


def _each(value: Any, lie: Any, fn: Callable[[torch.Tensor, Along], torch.Tensor]) -> Any:
    """Of a tensor, or of each member of a tuple."""
    if isinstance(lie, Along):
        return fn(value, lie)
    return tuple(fn(part, along) for part, along in zip(value, lie, strict=True))
