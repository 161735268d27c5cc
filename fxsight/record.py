"""The recorder: runs a body once on shapes, and writes down what it asks for as an ``Intervention``.

Here are the locations: what was read, what was written to them, in which order. The torch calls between are ``body``'s.
Nothing is computed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx

from fxsight.address import Address
from fxsight.backward import Arrival
from fxsight.body import QUIET, Body, Demand, Update, looked_sizes
from fxsight.containers import thaw
from fxsight.errors import TraceError, WriteError
from fxsight.intervention import Intervention, Read, Save, Write
from fxsight.lines import user_line
from fxsight.lost import stale_edit
from fxsight.node import Binding, Fixed, Origin, origin_of
from fxsight.past import Count
from fxsight.place import Location, Places
from fxsight.resize import resize
from fxsight.rows import Rows, overlap
from fxsight.spec import TensorSpec
from fxsight.tree import LEAF, Tree, flatten
from fxsight.value import Cell, Value


@dataclass(eq=False)
class State:
    """What a body has made of one location: the node of its present value, and how it got there.

    read: the placeholder of the value before any write.  version: how often it was written.  used: for which rows it
    was read or written.
    """

    location: Location
    node: fx.Node
    read: str
    version: int = 0
    in_place: fx.Node | None = None
    assigned: fx.Node | None = None
    in_place_line: str = ""
    line: str = ""
    used: list[Rows | None] = field(default_factory=list[Rows | None])


Dressed = tuple[Any, list[Any], Address]  # a structure of the model's, its leaves, and where it is from


def undress(dressed: Iterable[Dressed]) -> None:
    """Take the ``.save`` of model outputs away again.

    Raises: WriteError when a member was assigned, which the model cannot see.
    """
    for structure, leaves, address in dressed:
        attributes: Any = vars(structure)
        attributes.pop("save", None)
        now = flatten(structure)[0]
        if len(now) != len(leaves) or any(not _is_same(a, b) for a, b in zip(now, leaves, strict=True)):
            raise WriteError(
                f"a member of {address} was assigned, which the model does not see; change it in place "
                f"(out.logits[:] = ...) or write the whole (model.{address.port} = ...)"
            )


def _is_same(now: Any, before: Any) -> bool:
    return now is before or (type(now) is Count and now == before)  # a count has no identity of its own


Phase = Literal["open", "waiting", "done"]


@dataclass(frozen=True)
class Stop:
    """Where the forward ends: nothing later than ``time`` is computed."""

    time: float
    what: str
    line: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"where the forward is stopped ({self.line})"


class Recorder:
    """Records one body over one program, for inputs of given sizes.

    weights: asked for the names of the model's parameters and buffers by ``id``.  demand: computes nodes at once, for
    bodies that need a number.  lookup: a parameter or buffer by name.
    phase: the block is being written, has ended and waits for the end of its session, or is done.
    rows: the rows of the batch that are read and written now; None for all.
    """

    def __init__(
        self,
        places: Places,
        sizes: Mapping[str, int],
        weights: Callable[[], Mapping[int, str]],
        demand: Demand,
        lookup: Callable[[str], torch.Tensor],
    ) -> None:
        self.places, self.program, self.sizes, self.lookup = places, places.program, sizes, lookup
        self._specs = places.specs(sizes)
        self.body = Body(self, weights, demand, sizes, self._edited, places.rules)
        self.phase: Phase = "open"
        self.line: Callable[[], str] = user_line  # of the statement that is written down
        self.has_warned = False
        self.series: tuple[object, int] | None = None  # the generation that the block is a step of, and which
        self.unreached = ""  # why the block did not run at all
        self.rows: Rows | None = None
        self.on_edit: Callable[[Location, fx.Node], None] = lambda location, node: None
        self.on_stop: Callable[[], None] = lambda: None
        self.on_row: Callable[[Value, int], None] = lambda value, key: None
        self.force: Callable[[], None] = lambda: None
        self.given: Callable[[], Sequence[Any]] = tuple  # the leaves of the inputs
        self.alive: list[weakref.ref[Value]] | None = None  # in a session: what later blocks may use
        self.saved: list[Any] = []
        self._states: dict[tuple[str, str, int], State] = {}
        self._dressed: list[Dressed] = []
        self._unset: dict[Cell, str] = {}
        self._stop: Stop | None = None
        self._versions = itertools.count(1)
        self._cells: weakref.WeakSet[Cell] = weakref.WeakSet()  # of the values that are there
        self._branch: list[Cell] | None = None  # what a branch not taken has made
        self.why_no_save = ""  # why nothing can be saved here

    @property
    def is_open(self) -> bool:
        """Whether the block is still being written."""
        return self.phase == "open"

    @property
    def is_waiting(self) -> bool:
        """Whether the block has ended and runs with its session."""
        return self.phase == "waiting"

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One torch call on values: see ``body``."""
        if func is torch.Tensor.__getitem__ and type(args[1]) is int:
            self.on_row(args[0], args[1])
        return self.body.call(func, args, kwargs)

    def apply(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Any function on the numbers of values, now."""
        return self.body.apply(function, args, kwargs)

    def returned(self, cell: Cell, is_kept: bool) -> Value:
        """A value that autograd makes of one: kept for a backward, else a result that is an input."""
        return self.value(cell) if is_kept else self.body.gradients.functions.returned(self.value(cell))

    def fake(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data, in memory of its own."""
        return self.body.fake(spec)

    def value(self, cell: Cell) -> Value:
        """The value of a cell; known to the session and to the branch in which it is made."""
        value = Value.of(cell)
        self._cells.add(cell)
        if self.alive is not None:
            self.alive.append(weakref.ref(value))
        if self._branch is not None:
            self._branch.append(cell)
        return value

    def empty(self, node: fx.Node) -> torch.Tensor:
        """A tensor without data, as the value of a node."""
        spec: TensorSpec = node.meta["spec"]
        return torch.empty_strided(spec.numbers, spec.steps, dtype=spec.dtype, device="meta")

    # -- locations ---------------------------------------------------------------------------------------------------

    def read(self, location: Location) -> Value:
        """The present value at a location: a snapshot of its own, and a handle for in-place edits.

        Of the rows of an invoke, when one is being written.
        """
        dim = self.row_dim(location)
        if dim is None or self.rows is None:
            return self._whole(location)
        part: Value = self.call(torch.Tensor.narrow, (self._whole(location), dim, self.rows.start, self.rows.count), {})
        part.cell.what = location.address
        part.cell.node.meta[QUIET] = part.cell.is_rows = True
        return part

    def _whole(self, location: Location) -> Value:
        state = self._state(location)
        what, spec = location.address, self._spec(location)
        return self.value(Cell(self, spec, state.node, what, self.line(), handles=[(state, state.version)]))

    def node_at(self, location: Location, line: str) -> fx.Node:
        """The present value at a location, of all rows: its node.  line: the user's that asks for it."""
        return self._state(location, line).node

    def row_dim(self, location: Location) -> int | None:
        """The dimension of a location that counts the rows of the batch, inside an invoke; None where all share it.

        Raises: TraceError where the batch is folded into another dimension.
        """
        if self.rows is None:
            return None
        spec = self.program.nodes[location.node].meta["spec"]
        try:
            return self.rows.dim_of(spec)
        except TraceError as error:
            raise TraceError(f"{location.address} inside an invoke: {error}") from None

    def spec(self, location: Location) -> TensorSpec:
        """Dtype, shape (numbers) and strides of a location for the present inputs (and rows)."""
        spec, dim = self._spec(location), self.row_dim(location)
        if dim is None or self.rows is None:
            return spec
        return replace(spec, shape=(*spec.shape[:dim], self.rows.count, *spec.shape[dim + 1 :]))

    def _spec(self, location: Location) -> TensorSpec:
        found = self._specs.get(location.node)
        if found is None:
            spec = self.program.nodes[location.node].meta["spec"]
            assert isinstance(spec, TensorSpec)
            found = self._specs[location.node] = spec.at(self.sizes)
        return found

    def move(self, places: Places, sizes: Mapping[str, int] | None = None) -> None:
        """Go on over another program of the same model: one in which something has been opened."""
        self.sizes = self.body.sizes = self.sizes if sizes is None else sizes
        self.places, self.program, self._specs = places, places.program, places.specs(self.sizes)

    def resize(self) -> None:
        """After a move to other sizes, and to other places: shapes as they are now."""
        reads = {state.read: self._spec(state.location) for state in self._states.values()}
        resize(self.body.graph, reads, self.places.rules, self.body.fake, self.body.mode)
        for cell in self._cells:
            spec = cell.node.meta["spec"]
            if isinstance(spec, TensorSpec) and spec.shape != cell.spec.shape:
                cell.spec, cell.known_fake = spec, None

    def looked_at(self) -> list[tuple[str, tuple[int | None, ...]]]:
        """The shapes that the body has looked at: the user's line, and the sizes, None for those not looked at."""
        return [(origin_of(node).user, looked_sizes(node, dims)) for node, dims in self.body.shapes.items()]

    def relocate(self, find: Callable[[Location], Location]) -> None:
        """After a move to a program with other calls: the same locations there."""
        for state in self._states.values():
            state.location = find(state.location)
        self._states = {state.location.key: state for state in self._states.values()}

    def _state(self, location: Location, line: str = "") -> State:
        state = self._states.get(location.key)
        if state is None:
            node = self.body.graph.placeholder(f"read_{len(self._states)}")
            node.meta.update(spec=self._spec(location), origin=Origin(user=line or self.line(), made_by="body"))
            state = self._states[location.key] = State(location, node, node.name)
        if not self.in_dead_branch and self.rows not in state.used:
            state.used.append(self.rows)
        return state

    @property
    def used(self) -> list[Location]:
        """What has been read or written so far for rows of those that are read and written now."""
        return [s.location for s in self._states.values() if any(overlap(rows, self.rows) for rows in s.used)]

    def layout(self, value: torch.Tensor) -> bool:
        """Whether a tensor or value lies row by row in memory."""
        return value.cell.fake.is_contiguous() if isinstance(value, Value) else value.is_contiguous()

    def dress(self, structure: Any, address: Address) -> Any:
        """A dict, list, model output or dataclass of the model in a body: with ``.save()``, and watched for assignments
        to its members."""
        object.__setattr__(structure, "save", partial(self._keep_structure, structure))
        self._dressed.append((structure, list(flatten(structure)[0]), address))
        return structure

    def _keep_structure(self, structure: Any) -> Any:
        self.keep(structure)
        return structure

    def adopt(self, made: Any, structure: Any, leaves: list[Any]) -> None:
        """Watch a structure of the body's instead of one that was made now; ``leaves``: as it was."""
        self._dressed = [(structure, leaves, a) if s is made else (s, old, a) for s, old, a in self._dressed]

    # -- writes ------------------------------------------------------------------------------------------------------

    def is_current(self, location: Location, value: Any) -> bool:
        """Whether the value is what the location has already (``m.output *= 2`` writes it back)."""
        if not isinstance(value, Value) or value.cell.recorder is not self:
            return False
        state, cell, dim = self._state(location), value.cell, self.row_dim(location)
        if dim is not None and self.rows is not None:  # then it is current when it is these rows of the whole
            if cell.base is None or cell.step is None or cell.step[1][1:] != (dim, self.rows.start, self.rows.count):
                return False
            cell = cell.base
        return self.body.current(cell) is state.node

    def assign(self, location: Location, value: torch.Tensor) -> None:
        """The location gets the value; only there. Shapes have been checked (``write``)."""
        if self.is_current(location, value):
            return
        written = value if self.rows is None else self._scattered(location, value, self.rows)
        node, state = self.body.node_of(written), self._state(location)
        state.node = state.assigned = node
        state.version = next(self._versions)
        state.line = self.line()
        if isinstance(written, Value) and written.cell.base is None and written.cell.recorder is self:
            self.body.remember(written.cell.root)
            written.cell.root.handles.append((state, state.version))

    def _scattered(self, location: Location, value: torch.Tensor, rows: Rows) -> Any:
        """The whole batch with other rows."""
        dim = self.row_dim(location)
        if dim is None:
            raise self._shared(location)
        whole = self._whole(location)
        return self.call(torch.slice_scatter, (whole, value, dim, rows.start, rows.stop), {})

    def _shared(self, location: Location) -> WriteError:
        return WriteError(
            f"{location.address} has no row for each prompt: all invokes share it; write it outside the invokes"
        )

    def writes(self) -> tuple[Write, ...]:
        """All writes so far, one or two for each written location."""
        found: list[Write] = []
        for state in self._states.values():
            if state.in_place is not None:
                found.append(Write(state.location, state.in_place.name, True, state.in_place_line))
            if state.assigned is not None:
                found.append(Write(state.location, state.assigned.name, False, state.line))
        return tuple(found)

    def _edited(self, root: Cell) -> None:
        """An in-place change of a handle edits its location; of a stale one, it warns."""
        for number, (state, version) in enumerate(root.handles):
            if isinstance(state, Update):
                self.body.updates[state.number] = root.node
                continue
            if state.version != version:
                self.has_warned = True
                stale_edit(state.what if isinstance(state, Arrival) else state.location.address, self.line())
                continue
            if isinstance(state, Arrival):
                state.edited(root.node, self.line())
                root.handles[number] = (state, state.version)
                continue
            if self.rows is not None and self.row_dim(state.location) is None:
                raise self._shared(state.location)
            self._changed(state, root.node)
            root.handles[number] = (state, state.version)
            self.on_edit(state.location, root.node)

    def _changed(self, state: State, node: fx.Node) -> None:
        """What a location has is another value from here on, in the same memory."""
        state.node, state.version = node, next(self._versions)
        if state.assigned is not None:
            state.assigned, state.line = node, self.line()
        else:
            state.in_place, state.in_place_line = node, self.line()

    def change(self, location: Location, value: Value) -> None:
        """The location gets the value in place, for all who share its memory; of the shape and dtype it has.

        Raises: CausalityError.
        """
        state, node = self._state(location), self.body.node_of(value)
        self._changed(state, node)
        self.on_edit(location, node)

    # -- a branch not taken ------------------------------------------------------------------------------------------

    def enter_branch(self) -> Callable[[], None]:
        """What follows is written down and forgotten: nothing of it is done.  Returns: ends the branch."""
        states = {key: replace(state) for key, state in self._states.items()}
        saved, updates, mutated = len(self.saved), dict(self.body.updates), len(self.body.mutated)
        before = set(self.body.graph.nodes)
        self._branch, self.body.journal = [], []
        forget = self.body.gradients.freeze()

        def leave() -> None:
            forget()
            for cell, kept in reversed(self.body.journal or []):
                vars(cell).update(kept)
            for key, state in self._states.items():
                old = states.get(key, State(state.location, self.body.named(state.read), state.read))
                vars(state).update(vars(old))
            del self.saved[saved:], self.body.mutated[mutated:]
            self.body.updates = updates
            self.body.seen |= set(self.body.graph.nodes) - before
            why = "belongs to a branch whose condition was false"
            self._unset.update(dict.fromkeys(self._branch or [], why))
            self._branch = self.body.journal = None

        return leave

    @property
    def in_dead_branch(self) -> bool:
        """Whether what is written now is forgotten."""
        return self._branch is not None

    def why_unset(self, cell: Cell) -> str:
        """Why a value has no number though it was saved; empty when there is no reason known."""
        return self._unset.get(cell, "") or self.unreached

    # -- the end -----------------------------------------------------------------------------------------------------

    def keep(self, value: Any) -> None:
        """Mark a structured value as saved.

        Raises: TraceError where nothing is computed.
        """
        if self.why_no_save:
            raise TraceError(f"{self.line()}: {self.why_no_save}")
        self.saved.append(value)

    def stop(self, cell: Cell) -> None:
        """The forward ends where this value is there: of two stops the earlier."""
        if self.in_dead_branch:
            return
        self.on_stop()
        times = [state.location.since for state, _ in cell.root.handles if isinstance(state, State)]
        time = max([*times, *self.needed_times(self.body.current(cell))], default=0.0)
        self.body.seen.add(cell.node)
        if self._stop is None or time < self._stop.time:
            self._stop = Stop(time, str(cell.what), self.line())

    def why_unreached(self, time: float) -> str:
        """Why the forward does not come to what is there at a time; empty when it does."""
        stop = self._stop
        return "" if stop is None or time <= stop.time else f"comes later than {stop.what}, {stop.where}"

    def finish(self) -> None:
        """The block has ended.

        Raises: InputError when a tensor of the user's was changed after the body had used it.
        """
        undress(self._dressed)
        self.body.gradients.finish()
        self.saved = [thaw(value) for value in self.saved]

    def asked(self, wanted: Iterable[Value], kept: Sequence[Save] = ()) -> Intervention:
        """The whole intervention: what was saved, some values besides, and what caches keep."""
        extra = [self.save_of([self.body.node_of(value)]) for value in wanted]
        return self.intervention((*(self._save(value) for value in self.saved), *extra, *kept))

    def demanded(self, nodes: Sequence[fx.Node]) -> Intervention:
        """What is asked for so far, for the values of some nodes: no tensor gets a ``.grad`` yet."""
        asked = self.intervention((self.save_of(nodes),))
        return replace(asked, backwards=tuple(replace(one, leaves=()) for one in asked.backwards))

    def results(self, wanted: Iterable[Value]) -> list[Value]:
        """The values that the results of ``asked`` belong to, in order."""
        leaves = [leaf for value in self.saved for leaf in flatten(value)[0]]
        return [*(x for x in leaves if self._is_result(x)), *wanted]

    def _is_result(self, leaf: Any) -> bool:
        if not isinstance(leaf, Value) or leaf.cell.recorder is not self:
            return False
        stop = self._stop
        if stop is None or max(self.needed_times(self.body.node_of(leaf)), default=0.0) <= stop.time:
            return True
        self._unset[leaf.cell] = f"is computed later than {stop.what}, {stop.where}"
        return False

    def _save(self, value: Any) -> Save:
        leaves, tree = flatten(value)
        return Save(tree, tuple(self.body.node_of(x).name if self._is_result(x) else fixed(x) for x in leaves))

    def intervention(self, saves: tuple[Save, ...]) -> Intervention:
        """What has been asked for so far."""
        body = self.body
        reads = tuple(Read(state.read, state.location) for state in self._states.values())
        looked = tuple((s, self.sizes[s]) for s in sorted(body.looked | body.fitted) if s in self.sizes)
        weights = tuple(body.weight_names.items())
        updates = tuple((number, node.name) for number, node in body.updates.items())
        constants = body.constant_specs()
        asked = Intervention(body.graph, reads, constants, weights, self.writes(), saves, updates, looked)
        if body.gradients.is_empty:
            return asked
        given = self._given()
        learned = tuple(name for name, tensor in given.items() if tensor.requires_grad)
        first = {id(tensor): name for name, tensor in reversed(given.items())}
        shared = tuple((name, first[id(tensor)]) for name, tensor in given.items() if first[id(tensor)] != name)
        passes, marked = body.gradients.passes(), body.gradients.marked
        return replace(asked, backwards=passes, learned=learned, shared=shared, marked=marked)

    @property
    def teaches(self) -> bool:
        """Whether its run gives tensors a ``.grad``."""
        given = self._given().values() if not self.body.gradients.is_empty else ()
        return any(one.leaves != () for one in self.body.gradients.passes()) and any(x.requires_grad for x in given)

    def _given(self) -> dict[str, torch.Tensor]:
        """The tensors that a program of this body is given, by what they are bound to."""
        weights = [str(b.key) for b in self.program.bindings.values() if b.kind == "weight"]
        given: list[tuple[Binding, Any]] = [(Binding("input", i), x) for i, x in enumerate(self.given())]
        given += [(Binding("weight", w), self.lookup(w)) for w in (*weights, *self.body.weight_names.values())]
        given += [(Binding("constant", i), x) for i, x in enumerate(self.body.constants)]
        return {str(b): x for b, x in given if isinstance(x, torch.Tensor) and type(x) is not Value}

    @property
    def constants(self) -> list[torch.Tensor]:
        """The tensors of the user's that the body uses, by number; values of earlier blocks are computed for it."""
        for constant in self.body.constants:
            if isinstance(constant, Value):
                constant.cell.recorder.force()
        return self.body.constants

    def weight(self, name: str) -> Any:
        """A parameter or buffer of the model by name."""
        return self.lookup(name)

    def needed_times(self, node: fx.Node) -> list[float]:
        """When the locations are there that a node needs."""
        times = {state.read: state.location.since for state in self._states.values()}
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            at = stack.pop()
            if at not in seen:
                seen.add(at)
                stack += at.all_input_nodes
        return [times[n.name] for n in seen if n.name in times]

    def trial(self, write: Write) -> Intervention:
        """What has been asked for so far, and one more write."""
        asked = self.intervention(())
        others = tuple(w for w in asked.writes if w.location.key != write.location.key or w.in_place)
        if all(r.location.key != write.location.key for r in asked.reads):
            self._state(write.location)
            asked = self.intervention(())
        return replace(asked, writes=(*others, write))

    def save_of(self, nodes: Sequence[fx.Node]) -> Save:
        """A save of some nodes, as a tuple."""
        return Save(Tree("tuple", "", tuple(range(len(nodes))), (LEAF,) * len(nodes)), tuple(n.name for n in nodes))


def fixed(value: Any) -> Fixed:
    """A leaf of a save that is not computed."""
    return Fixed(
        value if value is None or isinstance(value, (bool, int, float, str)) else f"<{type(value).__qualname__}>"
    )
