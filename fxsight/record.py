"""The recorder: runs a body once on shapes, and writes down what it asks for as an ``Intervention``.

Here are the locations: what was read, what was written to them, in which order. The torch calls between are ``body``'s.
Nothing is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from fxsight.address import Address
from fxsight.body import Body, Demand, Update
from fxsight.errors import LostEditWarning, WriteError
from fxsight.intervention import Intervention, Read, Save, Write
from fxsight.lines import user_line
from fxsight.node import Fixed, Origin, origin_of
from fxsight.place import Location, Places
from fxsight.spec import TensorSpec
from fxsight.tree import LEAF, Tree, flatten
from fxsight.value import Cell, Value


@dataclass(eq=False)
class State:
    """What a body has made of one location: the node of its present value, and how it got there.

    read: the placeholder of the value before any write.  version: how often it was written.
    """

    location: Location
    node: fx.Node
    read: str
    version: int = 0
    in_place: fx.Node | None = None
    assigned: fx.Node | None = None
    in_place_line: str = ""
    line: str = ""


class Recorder:
    """Records one body over one program, for inputs of given sizes.

    weights: asked for the names of the model's parameters and buffers by ``id``.  demand: computes nodes at once, for
    bodies that
    need a number.
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
        self.is_open = True
        self.on_edit: Callable[[Location, fx.Node], None] = lambda location, node: None
        self._states: dict[tuple[str, str, int], State] = {}
        self._saved: list[Any] = []
        self._dressed: list[tuple[Any, list[Any], Address]] = []

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One torch call on values: see ``body``."""
        return self.body.call(func, args, kwargs)

    def fake(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data, in memory of its own."""
        return self.body.fake(spec)

    # -- locations ---------------------------------------------------------------------------------------------------

    def read(self, location: Location) -> Value:
        """The present value at a location: a snapshot of its own, and a handle for in-place edits."""
        state = self._state(location)
        what, spec = location.address, self.spec(location)
        return Value.of(Cell(self, spec, state.node, what, user_line(), handles=[(state, state.version)]))

    def move(self, places: Places) -> None:
        """Go on over another program of the same model: one in which something has been opened."""
        self.places, self.program, self._specs = places, places.program, places.specs(self.sizes)

    def spec(self, location: Location) -> TensorSpec:
        """Dtype, shape (numbers) and strides of a location for the present inputs."""
        found = self._specs.get(location.node)
        if found is None:
            spec = self.program.nodes[location.node].meta["spec"]
            assert isinstance(spec, TensorSpec)
            found = self._specs[location.node] = spec.at(self.sizes)
        return found

    def _state(self, location: Location) -> State:
        state = self._states.get(location.key)
        if state is None:
            node = self.body.graph.placeholder(f"read_{len(self._states)}")
            node.meta.update(spec=self.spec(location), origin=Origin(user=user_line(), made_by="body"))
            state = self._states[location.key] = State(location, node, node.name)
        return state

    def layout(self, value: torch.Tensor) -> bool:
        """Whether a tensor or value lies row by row in memory."""
        return value.cell.fake.is_contiguous() if isinstance(value, Value) else value.is_contiguous()

    def dress(self, structure: Any, address: Address) -> Any:
        """A model output or dataclass inside the body: with ``.save()``, and watched for assignments to its members."""
        object.__setattr__(structure, "save", partial(self._keep_structure, structure))
        self._dressed.append((structure, list(flatten(structure)[0]), address))
        return structure

    def _keep_structure(self, structure: Any) -> Any:
        self.keep(structure)
        return structure

    def undress(self) -> None:
        """Take the ``.save`` of model outputs away again.

        Raises: WriteError when a member was assigned, which the model cannot see.
        """
        for structure, leaves, address in self._dressed:
            vars(structure).pop("save", None)
            now = flatten(structure)[0]
            if len(now) != len(leaves) or any(a is not b for a, b in zip(now, leaves, strict=True)):
                raise WriteError(
                    f"a member of {address}:output was assigned, which the model does not see; change it in place "
                    "(out.logits[:] = ...) or write the whole (model.output = ...)"
                )

    def is_current(self, location: Location, value: Any) -> bool:
        """Whether the value is what the location has already (``m.output *= 2`` writes it back)."""
        return isinstance(value, Value) and self.body.node_of(value) is self._state(location).node

    def assign(self, location: Location, value: torch.Tensor) -> None:
        """The location gets the value; only there. Shapes have been checked (``writes``)."""
        if self.is_current(location, value):
            return
        node, state = self.body.node_of(value), self._state(location)
        state.node = state.assigned = node
        state.version += 1
        state.line = user_line()
        if isinstance(value, Value) and value.cell.base is None:
            value.cell.root.handles.append((state, state.version))

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
                lost_edit(
                    f"{user_line()}: this in-place edit changes a value read before {state.location.address} was "
                    "written again; it has no effect on the model: read the location anew and edit that"
                )
                continue
            state.node = root.node
            state.version += 1
            root.handles[number] = (state, state.version)
            if state.assigned is not None:
                state.assigned, state.line = root.node, user_line()
            else:
                state.in_place, state.in_place_line = root.node, user_line()
            self.on_edit(state.location, root.node)

    # -- the end -----------------------------------------------------------------------------------------------------

    def keep(self, value: Any) -> None:
        """Mark a structured value as saved."""
        self._saved.append(value)

    def finish(self) -> tuple[Intervention, list[Any]]:
        """The intervention, and the saved objects in order of their saves.

        Raises: InputError when a tensor of the user's was changed after the body had used it.
        """
        self.undress()
        saves = tuple(self._save(value) for value in self._saved)
        asked = self.intervention(saves)
        self._warn_of_lost_edits(asked)
        return asked, self._saved

    def _warn_of_lost_edits(self, asked: Intervention) -> None:
        """An in-place edit of a copy, or of a result, that nothing uses afterwards."""
        used = {w.value for w in asked.writes} | {x for s in asked.saves for x in s.leaves if isinstance(x, str)}
        used |= {name for _, name in asked.updates}
        for root in self.body.mutated:
            if not root.handles and not root.node.users and root.node.name not in used:
                lost_edit(
                    f"{origin_of(root.node).user}: this in-place edit is of {root.what}, which nothing reads "
                    "afterwards; it has no effect on the model: edit the output itself, or write the copy to it"
                )

    def intervention(self, saves: tuple[Save, ...]) -> Intervention:
        """What has been asked for so far."""
        body = self.body
        reads = tuple(Read(state.read, state.location) for state in self._states.values())
        looked = tuple((s, self.sizes[s]) for s in sorted(body.looked) if s in self.sizes)
        weights = tuple(body.weight_names.items())
        updates = tuple((number, node.name) for number, node in body.updates.items())
        return Intervention(body.graph, reads, body.constant_specs(), weights, self.writes(), saves, updates, looked)

    def node_of(self, value: Value) -> fx.Node:
        """The node of a value as it is now."""
        return self.body.node_of(value)

    @property
    def constants(self) -> list[torch.Tensor]:
        """The tensors of the user's that the body uses, by number."""
        return self.body.constants

    def weight(self, name: str) -> Any:
        """A parameter or buffer of the model by name."""
        return self.lookup(name)

    def read_times(self) -> Mapping[str, float]:
        """When each location that was read is there, by placeholder."""
        return {state.read: state.location.since for state in self._states.values()}

    def trial(self, write: Write) -> Intervention:
        """What has been asked for so far, and one more write."""
        asked = self.intervention(())
        others = tuple(w for w in asked.writes if w.location.key != write.location.key or w.in_place)
        if all(r.location.key != write.location.key for r in asked.reads):
            self._state(write.location)
            asked = self.intervention(())
        return replace(asked, writes=(*others, write))

    def _save(self, value: Any) -> Save:
        leaves, tree = flatten(value)
        return Save(tree, tuple(self.body.node_of(x).name if isinstance(x, Value) else _plain(x) for x in leaves))

    def save_of(self, nodes: Sequence[fx.Node]) -> Save:
        """A save of some nodes, as a tuple."""
        return Save(Tree("tuple", "", tuple(range(len(nodes))), (LEAF,) * len(nodes)), tuple(n.name for n in nodes))


def lost_edit(message: str) -> None:
    """Warn at the user's line."""
    file, _, line = user_line().rpartition(":")
    warnings.warn_explicit(message, LostEditWarning, file or "<body>", int(line or 0))


def _plain(value: Any) -> Fixed:
    return Fixed(
        value if value is None or isinstance(value, (bool, int, float, str)) else f"<{type(value).__qualname__}>"
    )
