"""The recorder: runs a body once on shapes, and writes down what it asks for as an ``Intervention``.

Each torch call on values becomes one node, under torch's own name, after it has run on fake tensors: a wrong index or
shape raises torch's own error at the user's line. In-place calls are recorded as new values (``mutate``); views follow
their base as they do in torch. Nothing is computed here.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxsight import _torch
from fxsight.address import Address
from fxsight.errors import InputError, LostEditWarning, TextError, TraceError, WriteError
from fxsight.intervention import Intervention, Read, Save, Write
from fxsight.lines import user_line
from fxsight.mutate import SELF, ViewStep, mutate
from fxsight.node import Fixed, Origin
from fxsight.place import Location, Places
from fxsight.program import Program
from fxsight.spec import TensorSpec, spec_of
from fxsight.targets import argument_text, find_target, target_name
from fxsight.tree import LEAF, Tree, flatten, map_leaves
from fxsight.value import Cell, Value, fake_mode, values_in

Demand = Callable[[Sequence[fx.Node]], list[torch.Tensor]]

_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
_NUMBERS = frozenset(
    [
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "numpy",
        "__array__",
        "__repr__",
        "__str__",
        "__format__",
        "__contains__",
        "is_nonzero",
        "equal",
        "allclose",
        "__reduce_ex__",
        "__deepcopy__",
        "cpu_numpy",
    ]
)
_GRADIENTS = frozenset(["backward", "requires_grad_", "retain_grad", "register_hook"])


@dataclass(eq=False)
class State:
    """What a body has made of one location: the node of its present value, and how it got there."""

    location: Location
    node: fx.Node
    version: int = 0
    in_place: fx.Node | None = None
    assigned: fx.Node | None = None
    in_place_line: str = ""
    line: str = ""


class Recorder:
    """Records one body over one program, for inputs of given sizes.

    weights: names of the model's parameters and buffers by ``id``.  demand: computes nodes at once, for bodies that
    need a number.
    """

    def __init__(
        self,
        places: Places,
        sizes: Mapping[str, int],
        weights: Mapping[int, str],
        demand: Demand,
        lookup: Callable[[str], torch.Tensor],
    ) -> None:
        self.places, self.program, self.sizes, self.lookup = places, places.program, sizes, lookup
        self._specs = places.specs(sizes)
        self.graph = fx.Graph()
        self.mode = fake_mode()
        self.constants: list[torch.Tensor] = []
        self.opened: tuple[str, ...] = ()
        self.is_open = True
        self._weights, self._demand = weights, demand
        self._states: dict[tuple[str, str, int], State] = {}
        self._given: dict[int, tuple[fx.Node, torch.Tensor, torch.Tensor]] = {}
        self._weight_names: dict[str, str] = {}
        self._versions: list[int] = []
        self._updates: dict[int, fx.Node] = {}
        self._saved: list[Any] = []
        self._looked: set[str] = set()
        self._dressed: list[tuple[Any, list[Any], Address]] = []

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

    def fake(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data, in memory of its own."""
        with self.mode:
            return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)  # type: ignore[arg-type]

    def _state(self, location: Location) -> State:
        state = self._states.get(location.key)
        if state is None:
            node = self.graph.placeholder(f"read_{len(self._states)}")
            node.meta.update(spec=self.spec(location), origin=Origin(user=user_line(), made_by="body"))
            state = self._states[location.key] = State(location, node)
        return state

    def layout(self, value: torch.Tensor) -> bool:
        """Whether a tensor or value lies row by row in memory."""
        fake: torch.Tensor = self._fake_of(value)
        return fake.is_contiguous()

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
        return isinstance(value, Value) and self._node(value) is self._state(location).node

    def assign(self, location: Location, value: torch.Tensor) -> None:
        """The location gets the value; only there. Shapes have been checked (``writes``)."""
        if self.is_current(location, value):
            return
        node, state = self._node(value), self._state(location)
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

    # -- torch calls -------------------------------------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one torch call on shapes and write it down.

        Raises: what torch raises on these shapes; TraceError for calls that cannot be part of a program.
        """
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        if name == "__set__" or name in _GRADIENTS:
            raise TraceError(
                f"{_attribute_name(func)} of a traced value: gradients inside a trace are not supported yet"
            )
        if name in _NUMBERS:
            return func(*self.numbers(args), **self.numbers(kwargs))
        if name in (
            "size",
            "stride",
            "numel",
            "dim",
            "__len__",
            "is_contiguous",
            "element_size",
            "storage_offset",
            "nelement",
        ):
            self._look(args)
            return func(*map_leaves(_fake, args), **kwargs)
        return self._operation(func, args, kwargs)

    def numbers(self, arguments: Any) -> Any:
        """The arguments with real tensors for values: computed now."""
        values = list(values_in(arguments))
        real = dict(zip(map(id, values), self._demand([self._node(v) for v in values]), strict=True))
        return map_leaves(lambda x: real[id(x)] if isinstance(x, Value) else x, arguments)

    def _attribute(self, func: Any, args: Any) -> Any:
        name = _attribute_name(func)
        if name in _ATTRIBUTES:
            return self._operation(getattr, (args[0], name), {})
        if name == "data":
            return self._operation(torch.Tensor.detach, args, {})
        if name == "grad":
            raise TraceError(".grad of a traced value: gradients inside a trace are not supported yet")
        if name == "shape":
            self._look(args)
        spec = args[0].cell.spec
        if name == "shape":
            return torch.Size(spec.shape)
        return spec.dtype if name == "dtype" else getattr(args[0].cell.fake, name)

    def _look(self, args: Any) -> None:
        """A body that looks at a free size holds for that size alone."""
        free = {size.name for size in self.program.sizes}
        for value in values_in(args):
            self._looked |= free if any(n in self.sizes.values() for n in value.cell.spec.shape) else set()

    def _operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves, tree = flatten((args, kwargs))
        fakes = [self._fake_of(leaf) for leaf in leaves]
        before = [_torch.version(f) if isinstance(f, torch.Tensor) else 0 for f in fakes]
        fake_args, fake_kwargs = tree.build(fakes)
        try:
            with self.mode, torch.no_grad():
                result = func(*fake_args, **fake_kwargs)
        except _torch.NeedsData:
            return self._with_numbers(func, args, kwargs)
        changed = [i for i, f in enumerate(fakes) if isinstance(f, torch.Tensor) and _torch.version(f) != before[i]]
        if changed:
            return self._mutation(func, leaves, tree, changed[0], fakes, result)
        if not any(isinstance(r, torch.Tensor) for r in flatten(result)[0]):
            return result
        node_args, node_kwargs = tree.build([self._argument(leaf) for leaf in leaves])
        node = self._add(func, node_args, node_kwargs, spec_of(result, {}, {}, ""))
        return self._wrap(result, node, leaves, fakes, (func, tree))

    def _with_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A result whose shape depends on numbers: computed now, and a constant from here on."""
        return map_leaves(
            lambda x: self._constant_value(x) if isinstance(x, torch.Tensor) else x,
            func(*self.numbers(args), **self.numbers(kwargs)),
        )

    def _constant_value(self, tensor: torch.Tensor) -> Value:
        return Value.of(
            self._fresh_cell(self._fake_of(tensor), self._argument(tensor), "a value computed inside the body")
        )

    def _fresh_cell(self, fake: torch.Tensor, node: fx.Node, what: str) -> Cell:
        spec = TensorSpec(fake.dtype, tuple(fake.shape), tuple(fake.stride()), str(fake.device))
        return Cell(self, spec, node, what, user_line(), known_fake=fake)

    def _add(self, func: Any, args: Any, kwargs: Any, spec: Any) -> fx.Node:
        try:
            label = target_name(func).rpartition(".")[2].strip("_")
            for argument in (*args, *kwargs.values()):
                argument_text(argument)
        except TextError as error:
            raise TraceError(str(error)) from None
        node = self.graph.create_node("call_function", func, tuple(args), dict(kwargs), f"user_{label}")
        node.meta.update(spec=spec, origin=Origin(user=user_line(), made_by="body"))
        return node

    def _wrap(self, result: Any, node: fx.Node, leaves: list[Any], fakes: list[Any], made: tuple[Any, Tree]) -> Any:
        """Results as values; a result that shares memory with an argument is a view of it."""
        found, tree = flatten(result)
        wrapped: list[Any] = []
        for fake, path in zip(found, tree.paths(), strict=True):
            if not isinstance(fake, torch.Tensor):
                wrapped.append(fake)
                continue
            member = node
            for key in path:
                member = self.graph.call_function(operator.getitem, (member, key))
                member.meta.update(spec=spec_of(fake, {}, {}, ""), origin=node.meta["origin"])
            wrapped.append(Value.of(self._cell(fake, member, path, leaves, fakes, made)))
        return tree.build(wrapped)

    def _cell(
        self, fake: Any, node: fx.Node, path: Any, leaves: list[Any], fakes: list[Any], made: tuple[Any, Tree]
    ) -> Cell:
        func, tree = made
        what = f"the result of {target_name(func)}"
        for number, (leaf, given) in enumerate(zip(leaves, fakes, strict=True)):
            if isinstance(leaf, Value) and _torch.storage_key(given) == _torch.storage_key(fake):
                filled = [SELF if i == number else self._argument(x) for i, x in enumerate(leaves)]
                args, kwargs = tree.build(filled)
                step = (target_name(func), tuple(args), dict(kwargs), tuple(path))
                cell = self._fresh_cell(fake, node, what)
                cell.base, cell.step, cell.seen = leaf.cell, step, leaf.cell.root.version
                return cell
        return self._fresh_cell(fake, node, what)

    # -- in-place calls ----------------------------------------------------------------------------------------------

    def _mutation(self, func: Any, leaves: list[Any], tree: Tree, number: int, fakes: list[Any], result: Any) -> Any:
        """Write an in-place call down as a new value of the base of what it changes."""
        changed = leaves[number]
        cell = changed.cell if isinstance(changed, Value) else self._update_cell(changed)
        filled = [SELF if i == number else self._argument(x) for i, x in enumerate(leaves)]
        args, kwargs = tree.build(filled)
        root = cell.root
        views: list[ViewStep] = []
        while cell.base is not None and cell.step is not None:
            views.insert(0, cell.step)
            cell = cell.base
        before = self._current(root)
        node = self._add(
            mutate,
            (before, tuple(views), target_name(func), tuple(args), dict(kwargs)),
            {},
            before.meta["spec"],
        )
        root.node, root.version, root.seen = node, root.version + 1, root.version + 1
        self._edit(root)
        return changed if result is fakes[number] else result

    def _edit(self, root: Cell) -> None:
        """An in-place change of a handle edits its location; of a stale one, it warns."""
        for number, (state, version) in enumerate(root.handles):
            if isinstance(state, _Update):
                self._updates[state.number] = root.node
                continue
            if state.version != version:
                warnings.warn(
                    f"{user_line()}: this in-place edit changes a value read before {state.location.address} was written again; "
                    "it has no effect on the model: read the location anew and edit that",
                    LostEditWarning,
                    stacklevel=5,
                )
                continue
            state.node = root.node
            state.version += 1
            root.handles[number] = (state, state.version)
            if state.assigned is not None:
                state.assigned, state.line = root.node, user_line()
            else:
                state.in_place, state.in_place_line = root.node, user_line()

    def _update_cell(self, tensor: torch.Tensor) -> Cell:
        """A plain tensor of the user's changed in place by a value: updated after the run."""
        node = self._argument(tensor)
        number = int(str(node.name).rpartition("_")[2])
        cell = self._fresh_cell(self._fake_of(tensor), self._updates.get(number, node), "a tensor of yours")
        cell.handles.append((_Update(number), 0))
        return cell

    # -- arguments ---------------------------------------------------------------------------------------------------

    def _current(self, cell: Cell) -> fx.Node:
        """The node of a cell's present value: of a view whose base has changed, the view taken again."""
        if cell.base is not None and cell.step is not None and cell.seen != cell.root.version:
            base = self._current(cell.base)
            name, args, kwargs, path = cell.step
            put = lambda x: base if isinstance(x, str) and x == SELF else x  # noqa: E731
            node = self._add(find_target(name), map_leaves(put, args), map_leaves(put, kwargs), cell.node.meta["spec"])
            for key in path:
                node = self.graph.call_function(operator.getitem, (node, key))
                node.meta.update(cell.node.meta)
            cell.node, cell.seen = node, cell.root.version
        return cell.node

    def _node(self, value: Any) -> fx.Node:
        node = self._argument(value)
        assert isinstance(node, fx.Node)
        return node

    def _argument(self, leaf: Any) -> Any:
        """A leaf of the arguments as it stands in the graph."""
        if isinstance(leaf, Value):
            return self._current(leaf.cell)
        if isinstance(leaf, torch.Tensor):
            return self._given_tensor(leaf)[0]
        if isinstance(leaf, slice) and any(values_in(leaf)):
            return slice(
                *(self.numbers(x).item() if isinstance(x, Value) else x for x in (leaf.start, leaf.stop, leaf.step))
            )
        if isinstance(leaf, torch.nn.Module):
            raise TraceError(f"a module cannot be an argument of a recorded call: {type(leaf).__name__}")
        return leaf.item() if type(leaf).__module__ == "numpy" and hasattr(leaf, "item") and not leaf.shape else leaf

    def _fake_of(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return leaf.cell.fake
        return self._given_tensor(leaf)[1] if isinstance(leaf, torch.Tensor) else leaf

    def _given_tensor(self, tensor: torch.Tensor) -> tuple[fx.Node, torch.Tensor]:
        """The placeholder of a tensor of the user's or of the model's, and its fake twin."""
        known = self._given.get(id(tensor))
        if known is None:
            weight = self._weights.get(id(tensor))
            label = f"weight_{len(self._weight_names)}" if weight is not None else f"constant_{len(self.constants)}"
            node, fake = self._placeholder(label, tensor)
            if weight is not None:
                self._weight_names[node.name] = weight
            else:
                self.constants.append(tensor)
                self._versions.append(_torch.version(tensor))
            known = self._given[id(tensor)] = (node, fake, tensor)
        return known[0], known[1]

    def _placeholder(self, label: str, tensor: torch.Tensor) -> tuple[fx.Node, torch.Tensor]:
        node = self.graph.placeholder(label)
        fake = _torch.fake_of(self.mode, tensor.detach() if isinstance(tensor, nn.Parameter) else tensor)
        node.meta.update(spec=spec_of(fake, {}, {}, node.name), origin=Origin(user=user_line(), made_by="body"))
        return node, fake

    # -- the end -----------------------------------------------------------------------------------------------------

    def keep(self, value: Any) -> None:
        """Mark a structured value as saved."""
        self._saved.append(value)

    def finish(self) -> tuple[Intervention, list[Any]]:
        """The intervention, and the saved objects in order of their saves.

        Raises: InputError when a tensor of the user's was changed after the body had used it.
        """
        self.undress()
        for tensor, version in zip(self.constants, self._versions, strict=True):
            if _torch.version(tensor) != version:
                raise InputError(
                    f"a tensor {list(tensor.shape)} used in this body was changed in place afterwards; use a copy: t.clone()"
                )
        saves = tuple(self._save(value) for value in self._saved)
        return self.intervention(saves), self._saved

    def intervention(self, saves: tuple[Save, ...]) -> Intervention:
        """What has been asked for so far."""
        reads = tuple(Read(n, s.location) for s in self._states.values() for n in [self._read_name(s)])
        constants = tuple((self._given[id(t)][0].name, self._given[id(t)][0].meta["spec"]) for t in self.constants)
        looked = tuple((s, self.sizes[s]) for s in sorted(self._looked) if s in self.sizes)
        weights = tuple(self._weight_names.items())
        updates = tuple((number, node.name) for number, node in self._updates.items())
        return Intervention(self.graph, reads, constants, weights, self.writes(), saves, updates, looked, self.opened)

    def node_of(self, value: Value) -> fx.Node:
        """The node of a value as it is now."""
        return self._node(value)

    def weight(self, name: str) -> Any:
        """A parameter or buffer of the model by name."""
        return self.lookup(name)

    def read_times(self) -> Mapping[str, float]:
        """When each location that was read is there, by placeholder."""
        return {self._read_name(state): state.location.since for state in self._states.values()}

    def trial(self, write: Write) -> Intervention:
        """What has been asked for so far, and one more write."""
        asked = self.intervention(())
        others = tuple(w for w in asked.writes if w.location.key != write.location.key or w.in_place)
        if all(r.location.key != write.location.key for r in asked.reads):
            self._state(write.location)
            asked = self.intervention(())
        return replace(asked, writes=(*others, write))

    def _read_name(self, state: State) -> str:
        return f"read_{list(self._states.values()).index(state)}"

    def _save(self, value: Any) -> Save:
        leaves, tree = flatten(value)
        return Save(tree, tuple(self._node(x).name if isinstance(x, Value) else _plain(x) for x in leaves))

    def save_of(self, nodes: Sequence[fx.Node]) -> Save:
        """A save of some nodes, as a tuple."""
        return Save(Tree("tuple", "", tuple(range(len(nodes))), (LEAF,) * len(nodes)), tuple(n.name for n in nodes))


class _Update:
    """Stands where a location's state does, for a plain tensor that a body changes in place."""

    def __init__(self, number: int) -> None:
        self.number = number


def _plain(value: Any) -> Fixed:
    return Fixed(
        value if value is None or isinstance(value, (bool, int, float, str)) else f"<{type(value).__qualname__}>"
    )


def _fake(leaf: Any) -> Any:
    return leaf.cell.fake if isinstance(leaf, Value) else leaf


def _attribute_name(func: Any) -> str:
    return getattr(getattr(func, "__self__", None), "__name__", getattr(func, "__name__", str(func)))
