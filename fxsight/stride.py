"""How a program does many cells together: which operators do all rows in one call, and which go cell by cell.

What differs from cell to cell begins in the body: its own operations are small, and are done for each cell alone, on
whole values. Where the model goes on with one of them, the rows of all cells are laid behind one another, and every
operator that makes rows from rows (``rowwise``) does them in one call. What is not known to do so is done cell by cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxsight.along import Along
from fxsight.cost import Sizes, cost_of
from fxsight.effects import mutated_storages
from fxsight.indices import items_of
from fxsight.mutate import mutate
from fxsight.node import is_tensor, origin_of, tensor_spec
from fxsight.numbering import Depends, dependence
from fxsight.program import Program
from fxsight.rowwise import Rows, Way, way
from fxsight.spec import symbol
from fxsight.stage import STAGED

Reading = frozenset[int] | None  # the rows that are needed of a value; None: all that a cell has of its own
_EMPTY: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Lift:
    """A value that each cell has whole, where the model goes on with its rows.

    along: where they lie.  clean: the same without the edits, which all cells share; None where nobody knows it.
    """

    along: Along
    clean: fx.Node | None


@dataclass(frozen=True, eq=False)
class Step:
    """One node that differs from cell to cell.

    way: how it does all rows at once; None where it goes cell by cell.  reading: the rows that are needed of it.
    reads: of values with rows, the rows that it takes itself, when it goes cell by cell.
    lifts: the arguments that each cell has whole, when it does not.
    """

    node: fx.Node
    way: Way | None
    reading: Reading
    reads: Mapping[fx.Node, tuple[int, ...]] = field(default_factory=dict[fx.Node, tuple[int, ...]])
    lifts: Mapping[fx.Node, Lift] = field(default_factory=dict[fx.Node, Lift])


@dataclass(frozen=True, eq=False)
class Stride:
    """All steps of a program.

    axis: the size that counts a cell's rows; count: how many.  early: the steps before any rows.
    partial: whether a cell needs only the rows that its edits reach, the others being those of the clean run.
    """

    axis: str
    count: int
    early: tuple[Step, ...]
    late: tuple[Step, ...]
    lies: Mapping[fx.Node, Any]
    partial: bool

    @property
    def alone(self) -> list[fx.Node]:
        """The model's own operators that go cell by cell."""
        return [s.node for s in (*self.early, *self.late) if s.way is None and not is_body(s.node)]

    def flops_alone(self, sizes: Sizes) -> int:
        """What these cost."""
        return cost_of(self.alone, sizes).flops

    @property
    def attentions(self) -> list[Step]:
        """Where rows see others."""
        return [step for step in self.late if step.way is not None and step.way.attends]


def is_body(node: fx.Node) -> bool:
    """Whether the user's body has asked for this operation."""
    return node.target is mutate or origin_of(node).time < 0


def best_stride(program: Program, captured: Program, varies: Depends, sizes: Sizes) -> Stride | None:
    """The steps along the size with which the fewest operations go cell by cell; None where there is no such size."""
    best: Stride | None = None
    for size in reversed(program.sizes):
        found = stride(program, captured, varies, sizes, size.name)
        if found is not None and (best is None or found.flops_alone(sizes) < best.flops_alone(sizes)):
            best = found
        if best is not None and not best.alone:
            break
    return best


def stride(program: Program, captured: Program, varies: Depends, sizes: Sizes, axis: str) -> Stride | None:
    """The steps along one size; None where nothing is done together, or where memory is changed in place."""
    if not sizes.get(axis):
        return None
    depends = dependence(program.graph, varies)
    own = [node for node in program.graph.nodes if node.op == "call_function" and depends[node]]
    if mutated_storages(own):
        return None
    found = _Survey(program, captured, depends, sizes, axis)
    return found.stride() if any(found.ways.values()) else None


class _Survey:
    """Goes through a program: first forwards, for how each node is done; then backwards, for which rows are needed."""

    def __init__(
        self, program: Program, captured: Program, depends: Mapping[fx.Node, Depends], sizes: Sizes, axis: str
    ) -> None:
        self.program, self.captured, self.depends = program, captured, depends
        self.axis, self.rows = axis, Rows(sizes, sizes[axis])
        self.ways: dict[fx.Node, Way | None] = {}
        self.lifts: dict[fx.Node, dict[fx.Node, Lift]] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and depends[node]:
                self.ways[node] = self._way(node)

    def _way(self, node: fx.Node) -> Way | None:
        if is_body(node) or not all(map(self.rows.is_known, (node, *node.all_input_nodes))):
            return None
        lifts: dict[fx.Node, Lift] = {}
        whole = {a for a in node.all_input_nodes if self.depends[a] and a not in self.rows.lies}
        for given, was in zip(_leaves(node), self._before(node), strict=True) if whole else ():
            if given in whole:
                lift = self._lift(given, was)
                if lift is None:
                    return None
                lifts[given] = lift
        self.rows.lies.update({value: lift.along for value, lift in lifts.items()})
        found = way(node, self.rows)
        for value in lifts:
            del self.rows.lies[value]
        if found is not None:
            self.rows.lies[node], self.lifts[node] = found.result, lifts
        return found

    # -- where values become rows ------------------------------------------------------------------------------------

    def _before(self, node: fx.Node) -> list[Any]:
        """The arguments of the same node in the model as it is."""
        was = self.captured.nodes.get(node.name)
        same = was is not None and was.target is node.target and origin_of(was).time == origin_of(node).time
        found = _leaves(was) if was is not None and same else []
        return found if len(found) == len(_leaves(node)) else [None] * len(_leaves(node))

    def _lift(self, given: fx.Node, was: Any) -> Lift | None:
        if not isinstance(was, fx.Node) or not is_tensor(was) or not is_tensor(given):
            return None
        if not self.rows.is_known(was) or self.rows.shape(given) != self.rows.shape(was):
            return None
        counted = symbol(self.axis)
        dims = [d for d, dim in enumerate(tensor_spec(was).shape) if counted in getattr(dim, "free_symbols", ())]
        if len(dims) != 1 or tensor_spec(was).shape[dims[0]] != counted:
            return None
        return Lift(Along(dims[0]), self._clean(given, was))

    def _clean(self, given: fx.Node, was: fx.Node) -> fx.Node | None:
        """A value that all cells share, of the same shape: what the edit has begun with."""
        base: Any = given
        while isinstance(base, fx.Node) and base.target is mutate:
            base = base.args[0]
        if base is given:
            names = [was.name]
            while was.target is torch.ops.aten.alias.default:
                was = was.all_input_nodes[0]
                names = [was.name, f"{was.name}{STAGED}", *names]
            base = next((self.program.nodes[name] for name in names if name in self.program.nodes), None)
        fits = isinstance(base, fx.Node) and not self.depends[base]
        same = fits and is_tensor(base) and _kind(base, self.rows) == _kind(given, self.rows)
        return base if same else None

    # -- the steps ---------------------------------------------------------------------------------------------------

    def stride(self) -> Stride:
        needed, reads = self._needed()
        early: list[Step] = []
        late: list[Step] = []
        has_rows: set[fx.Node] = set()
        for node, how in self.ways.items():
            step = Step(node, how, needed.get(node, None), reads.get(node, {}), self.lifts.get(node, {}))
            if how is not None or any(a in has_rows for a in node.all_input_nodes):
                has_rows.add(node)
            (late if node in has_rows else early).append(step)
        return Stride(self.axis, self.rows.count, tuple(early), tuple(late), self.rows.lies, self._partial(late))

    def _partial(self, late: list[Step]) -> bool:
        """Every value that becomes rows is there before any rows are, and is known without its edits."""
        before = {step.node for step in late}
        lifts = [(value, lift) for step in late for value, lift in step.lifts.items()]
        whole = [a for s in late if s.way is None for a in s.node.all_input_nodes if a in self.rows.lies]
        known = all(lift.clean is not None and value not in before for value, lift in lifts)
        return known and all(isinstance(self.rows.lies[a], Along) for a in whole)

    def _needed(self) -> tuple[dict[fx.Node, Reading], dict[fx.Node, dict[fx.Node, tuple[int, ...]]]]:
        needed: dict[fx.Node, Reading] = {}
        reads: dict[fx.Node, dict[fx.Node, tuple[int, ...]]] = {}

        def need(node: fx.Node, rows: Reading) -> None:
            before = needed.get(node, _EMPTY)
            needed[node] = None if rows is None or before is None else before | rows

        for result in self.program.results:
            need(result, None)
        for node, how in reversed(self.ways.items()):
            for source in node.all_input_nodes:
                if source not in self.rows.lies:
                    continue
                taken = None if how is not None else self._taken(node, source)
                if taken is not None:
                    reads.setdefault(node, {})[source] = taken
                    need(source, frozenset(taken))
                else:
                    seen = how is not None and how.attends and source in node.args[1:3]
                    need(source, needed.get(node) if how is not None and not seen else None)
        return needed, reads

    def _taken(self, node: fx.Node, source: fx.Node) -> tuple[int, ...] | None:
        """The rows that an operation of the body takes, when they can be said; then it takes no others."""
        along = self.rows.of(source)
        if (
            node.target is not torch.Tensor.__getitem__
            or along is None
            or not along.plain
            or node.args[0] is not source
        ):
            return None
        items = items_of(node.args[1], len(self.rows.shape(source)))
        item = None if items is None or sum(a is source for a in node.all_input_nodes) != 1 else items[along.dim]
        if type(item) is int:
            return (range(self.rows.count)[item],)
        if not isinstance(item, slice) or not all(
            x is None or type(x) is int for x in (item.start, item.stop, item.step)
        ):
            return None
        rows = tuple(range(self.rows.count)[item])
        return rows if rows and len(rows) < self.rows.count else None


def _kind(node: fx.Node, rows: Rows) -> Any:
    spec = tensor_spec(node)
    return spec.dtype, spec.device, rows.shape(node)


def _leaves(node: fx.Node) -> list[Any]:
    """The arguments one by one."""
    found: list[Any] = []

    def walk(value: Any) -> Iterator[Any]:
        if isinstance(value, (list, tuple)):
            for part in value:
                yield from walk(part)
        else:
            yield value

    found += walk(node.args)
    found += walk(list(node.kwargs.values()))
    return found
