"""The locations that a body reads and writes: what is there now, and how it got there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from fxsight.effects import first_same, is_in
from fxsight.errors import TraceError
from fxsight.intervention import Read, Write
from fxsight.node import Origin
from fxsight.place import Location, Places
from fxsight.program import Program
from fxsight.rows import Rows, overlap
from fxsight.spec import TensorSpec


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


class Locations:
    """What a body has made of the locations of a program, for inputs of given sizes.

    graph: of the body, in which each location has a placeholder for its value before any write.
    """

    def __init__(self, graph: fx.Graph, places: Places, sizes: Mapping[str, int]) -> None:
        self._graph = graph
        self._states: dict[tuple[str, str, int], State] = {}
        self._versions = itertools.count(1)
        self.move(places, sizes)

    def move(self, places: Places, sizes: Mapping[str, int]) -> None:
        """Go on over another program of the same model, or at other sizes."""
        self._program: Program = places.program
        self._specs, self._sizes = places.specs(sizes), sizes

    def relocate(self, find: Callable[[Location], Location]) -> None:
        """After a move to a program with other calls: the same locations there."""
        for state in self._states.values():
            state.location = find(state.location)
        self._states = {state.location.key: state for state in self._states.values()}

    def state(self, location: Location, line: Callable[[], str]) -> State:
        """What has been made of a location; ``line``: asked for the user's line when it is the first time."""
        state = self._states.get(location.key)
        if state is None:
            node = self._graph.placeholder(f"read_{len(self._states)}")
            node.meta.update(spec=self.spec(location), origin=Origin(user=line(), made_by="body"))
            state = self._states[location.key] = State(location, node, node.name)
        return state

    def present(self, state: State, rows: Rows | None) -> State:
        """Whose value a location has now: its own, or that of one that is the same tensor, changed in place before.

        rows: of what is asked for.
        """
        others = self._changed_beside(state, rows)
        return next((o for o in others if o.assigned is None and self._first(o) is self._first(state)), state)

    def check_alone(self, state: State, rows: Rows | None) -> None:
        """Raises: TraceError where some of its memory has been changed under another name since it was read."""
        mine = self._program.nodes[state.location.node]
        for other in self._changed_beside(state, rows):
            theirs = self._first(other)
            if is_in(mine, theirs) or is_in(theirs, mine):
                here, there = state.location.address, other.location.address
                raise TraceError(
                    f"{here} is in the memory of {there}, which has been changed in place ({other.in_place_line}): "
                    f"change {here} before that, or change the same numbers in {there}"
                )

    def _changed_beside(self, state: State, rows: Rows | None) -> Iterator[State]:
        """The other locations of the same time that have been changed in place, where this one has not been written."""
        if state.assigned is None and state.in_place is None:
            for other in self._states.values():
                is_changed = other.in_place is not None and other.location.since == state.location.since
                if is_changed and any(overlap(used, rows) for used in other.used):
                    yield other

    def _first(self, state: State) -> fx.Node:
        return first_same(self._program.nodes[state.location.node])

    def spec(self, location: Location) -> TensorSpec:
        """Dtype, shape (numbers) and strides of a location, of all rows."""
        found = self._specs.get(location.node)
        if found is None:
            spec = self._program.nodes[location.node].meta["spec"]
            assert isinstance(spec, TensorSpec)
            found = self._specs[location.node] = spec.at(self._sizes)
        return found

    def row_dim(self, location: Location, rows: Rows | None) -> int | None:
        """The dimension of a location that counts the rows of the batch; None where all rows share it.

        Raises: TraceError where the batch is folded into another dimension.
        """
        if rows is None:
            return None
        spec = self._program.nodes[location.node].meta["spec"]
        try:
            return rows.dim_of(spec)
        except TraceError as error:
            raise TraceError(f"{location.address} inside an invoke: {error}") from None

    # -- writes ------------------------------------------------------------------------------------------------------

    def assign(self, state: State, node: fx.Node, line: str) -> None:
        """A location has another value from here on."""
        state.node = state.assigned = node
        state.version = next(self._versions)
        state.line = line

    def change(self, state: State, node: fx.Node, line: str) -> None:
        """What a location has is another value from here on, in the same memory."""
        state.node, state.version = node, next(self._versions)
        if state.assigned is not None:
            state.assigned, state.line = node, line
        else:
            state.in_place, state.in_place_line = node, line

    def snapshot(self) -> Callable[[Callable[[str], fx.Node]], None]:
        """How all locations are now.

        Returns: makes them so again, given what finds a node by name; what has been read since is unchanged then.
        """
        before = {key: replace(state) for key, state in self._states.items()}

        def restore(named: Callable[[str], fx.Node]) -> None:
            for key, state in self._states.items():
                old = before.get(key, State(state.location, named(state.read), state.read))
                vars(state).update(vars(old))

        return restore

    # -- what has been asked for -------------------------------------------------------------------------------------

    def used(self, rows: Rows | None) -> list[Location]:
        """What has been read or written so far for some of these rows."""
        return [s.location for s in self._states.values() if any(overlap(used, rows) for used in s.used)]

    def reads(self) -> tuple[Read, ...]:
        """All reads so far, one for each location."""
        return tuple(Read(state.read, state.location) for state in self._states.values())

    def read_specs(self) -> dict[str, TensorSpec]:
        """The spec of each read, by its name."""
        return {state.read: self.spec(state.location) for state in self._states.values()}

    def writes(self) -> tuple[Write, ...]:
        """All writes so far, one or two for each written location."""
        found: list[Write] = []
        for state in self._states.values():
            if state.in_place is not None:
                found.append(Write(state.location, state.in_place.name, True, state.in_place_line))
            if state.assigned is not None:
                found.append(Write(state.location, state.assigned.name, False, state.line))
        return tuple(found)

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
