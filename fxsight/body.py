"""A body's torch calls, written down: each becomes one node, after it has run on fake tensors.

A wrong index or shape raises torch's own error at the user's line. In-place calls are recorded as new values
(``mutate``); views follow their base as they do in torch. Nothing is computed here.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.backward import Gradients, about_gradients
from fxsight.containers import savable
from fxsight.errors import TextError, TraceError
from fxsight.item import check_none
from fxsight.lent import check_unchanged, place_in, sealed, share_memory
from fxsight.looked import looked_dimensions
from fxsight.mutate import SELF, ViewStep, mutate
from fxsight.node import Origin
from fxsight.rules import Rule, Table, rule_for
from fxsight.spec import TensorSpec
from fxsight.targets import argument_text, find_target, target_name
from fxsight.tree import Tree, flatten, map_leaves
from fxsight.value import NUMBERS, Cell, Recording, Value, fake_mode, values_in

QUIET = "quiet"  # in the meta of nodes that are not statements of the user's: rows of an invoke, views taken again

Demand = Callable[[Sequence[fx.Node]], list[torch.Tensor]]

_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))


class _Result:
    """Names the result of a function in messages; the text is made when it is needed."""

    def __init__(self, func: Any) -> None:
        self.func = func

    def __str__(self) -> str:
        return f"the result of {target_name(self.func)}"


class Update:
    """A plain tensor of the user's that a body changes in place: its number among the constants."""

    def __init__(self, number: int) -> None:
        self.number = number


class Body:
    """The graph of one body, and the calls that write it.

    owner: the recorder, which values belong to.  weights: asked, once, for the names of the model's parameters and
    buffers by ``id``.
    demand: computes nodes at once, for bodies that need a number.  sizes: of the inputs, by name.
    edited: told of every value that an in-place call has changed.  rules: what calls do to shapes, shared by bodies.
    """

    def __init__(
        self,
        owner: Recording,
        weights: Callable[[], Mapping[int, str]],
        demand: Demand,
        sizes: Mapping[str, int],
        edited: Callable[[Cell], None],
        rules: Table,
    ) -> None:
        self.graph = fx.Graph()
        self.constants: list[torch.Tensor] = []
        self.weight_names: dict[str, str] = {}
        self.updates: dict[int, fx.Node] = {}
        self.looked: set[str] = set()
        self.fitted: set[str] = set()  # sizes that a tensor of the user's has, too
        self.shapes: dict[fx.Node, set[int]] = {}  # dimensions that the body has looked at
        self.mutated: list[Cell] = []
        self.seen: set[fx.Node] = set()  # values of which more than the operations after them has made use
        self._owner, self._weights, self._demand, self._edited = owner, weights, demand, edited
        self.sizes = sizes
        self._given: dict[int, tuple[fx.Node, torch.Tensor]] = {}
        self._versions: list[int | None] = []
        self._clock = itertools.count(1)
        self.journal: list[tuple[Cell, dict[str, Any]]] | None = None  # of a branch not taken: how cells were
        self._rules = rules
        self.gradients = Gradients(owner, self)

    @cached_property
    def mode(self) -> Any:
        """In which tensors are shapes."""
        return fake_mode()

    @cached_property
    def _names(self) -> Mapping[int, str]:
        return self._weights()

    def fake(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data, in memory of its own."""
        with self.mode:
            return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)  # type: ignore[arg-type]

    # -- torch calls -------------------------------------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one torch call on shapes and write it down.

        Raises: what torch raises on these shapes; TraceError for calls that cannot be part of a program.
        """
        self.gradients.functions.adopt()
        name = getattr(func, "__name__", "")
        asked = about_gradients(func, name)
        if asked:
            return self.gradients.call(asked, args, kwargs)
        if name == "__get__":
            return self._attribute(func, args)
        if name == "__set__":
            raise TraceError(f"{_attribute_name(func)} of a traced value cannot be assigned")
        if name.startswith("_foreach"):
            raise TraceError(f"{name} changes several tensors in place; write one call for each")
        if name == "__array_wrap__":  # what numpy has made of a value
            return self._with_numbers(func, args, kwargs)
        if name in NUMBERS:
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
            self._look(args, looked_dimensions(name, args, kwargs))
            return func(*map_leaves(_fake, args), **kwargs)
        return self.operation(func, args, kwargs)

    def numbers(self, arguments: Any) -> Any:
        """The arguments with real tensors for values: computed now."""
        for value in values_in(arguments):
            if not self.is_own(value):
                value.cell.recorder.force()
        values = list(values_in(arguments))
        nodes = [self.node_of(v) for v in values]
        self.seen.update(nodes)
        real = dict(zip(map(id, values), self._demand(nodes), strict=True))
        return map_leaves(lambda x: real[id(x)] if isinstance(x, Value) else x, arguments)

    def _attribute(self, func: Any, args: Any) -> Any:
        name = _attribute_name(func)
        if name in _ATTRIBUTES:
            return self.operation(getattr, (args[0], name), {})
        if name == "data":
            return self.operation(torch.Tensor.detach, args, {})
        if name == "requires_grad" and self.gradients.requires(args[0]):
            return True
        if name == "shape":
            self._look(args)
        self.seen.add(args[0].cell.node)
        spec = args[0].cell.spec
        if name == "shape":
            return torch.Size(spec.shape)
        return spec.dtype if name == "dtype" else getattr(args[0].cell.fake, name)

    def _look(self, args: Any, dims: tuple[int, ...] | None = None) -> None:
        """A body that looks at a free size holds for that size alone.  dims: looked at; None for all."""
        for value in filter(self.is_own, values_in(args)):
            shape = value.cell.spec.numbers
            asked = (
                range(len(shape)) if dims is None else [d % len(shape) for d in dims if -len(shape) <= d < len(shape)]
            )
            self.seen.add(value.cell.node)
            self.shapes.setdefault(value.cell.node, set()).update(asked)
            self.looked |= set(self.sizes) if any(shape[d] in self.sizes.values() for d in asked) else set()

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that computes something, written down.

        Raises: as ``call``.
        """
        leaves, tree = flatten((args, kwargs))
        for leaf in leaves:
            check_none(leaf)
        specs = [self._spec_of(leaf) for leaf in leaves]
        rule = rule_for(
            self._rules, func, specs, tree, lambda: [self._fake_of(leaf) for leaf in leaves], lambda: self.mode
        )
        if rule.needs_data:
            return self._with_numbers(func, args, kwargs)
        if rule.changed is not None:
            return self._mutation(func, leaves, tree, rule)
        if not rule.has_tensors:
            return rule.tree.build(rule.leaves)
        node_args, node_kwargs = tree.build([self._argument(leaf) for leaf in leaves])
        made = self._wrap(rule, self._add(func, node_args, node_kwargs, rule.spec), leaves, (func, tree))
        if self.gradients.is_off:
            return made if func is torch.Tensor.detach else map_leaves(self._still, made)
        return made

    def _still(self, leaf: Any) -> Any:
        """A result of a call under ``torch.no_grad()``: no gradient flows through it."""
        if not self.is_own(leaf):
            return leaf
        leaf.cell.is_still = True
        value: Value = self.operation(torch.Tensor.detach, (leaf,), {})
        self.gradients.functions.see(value)
        return value

    def _with_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A result whose shape depends on numbers: computed now, and a constant from here on."""
        return map_leaves(
            lambda x: self._constant_value(x) if isinstance(x, torch.Tensor) else x,
            func(*self.numbers(args), **self.numbers(kwargs)),
        )

    def apply(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Any function on copies of the numbers, now; its tensors are values from here on."""
        args, kwargs = map_leaves(_own_copy, self.numbers((tuple(args), dict(kwargs))))
        result = function(*args, **kwargs)
        leaves, tree = flatten(result)
        if tree.kind == "leaf" and not isinstance(result, torch.Tensor):
            return savable(result)
        return tree.build([self._constant_value(x) if isinstance(x, torch.Tensor) else x for x in leaves])

    def _constant_value(self, tensor: torch.Tensor) -> Value:
        return self._owner.value(
            self._fresh_cell(self._spec_of(tensor), self._argument(tensor), "a value computed inside the body")
        )

    def _fresh_cell(self, spec: TensorSpec, node: fx.Node, what: object) -> Cell:
        return Cell(self._owner, spec, node, what, self._owner.line())

    def _name(self, func: Any) -> str:
        try:
            return target_name(func)
        except TextError as error:
            raise TraceError(str(error)) from None

    def _add(self, func: Any, args: Any, kwargs: Any, spec: Any) -> fx.Node:
        try:
            label = target_name(func).rpartition(".")[2].strip("_")
            for argument in (*args, *kwargs.values()):
                argument_text(argument)
        except TextError as error:
            raise TraceError(str(error)) from None
        node = self.graph.create_node("call_function", func, tuple(args), dict(kwargs), f"user_{label}")
        node.meta.update(spec=spec, origin=Origin(user=self._owner.line(), made_by="body"))
        return node

    def _wrap(self, rule: Rule, node: fx.Node, leaves: list[Any], made: tuple[Any, Tree]) -> Any:
        """Results as values; a result that shares memory with an argument is a view of it."""
        wrapped: list[Any] = []
        if any(viewed is not None for viewed in rule.views):  # a part that is read, and perhaps used after the block
            self.seen.add(node)
        for spec, viewed, path in zip(rule.leaves, rule.views, rule.tree.paths(), strict=True):
            if not isinstance(spec, TensorSpec):
                wrapped.append(spec)
                continue
            member = node
            for key in path:
                member = self.graph.call_function(operator.getitem, (member, key))
                member.meta.update(spec=spec, origin=node.meta["origin"])
            cell = self._fresh_cell(spec, member, _Result(made[0]))
            if viewed is not None and self.is_own(leaves[viewed]):
                cell.base, cell.seen = leaves[viewed].cell, leaves[viewed].cell.root.version
                cell.step = self._step(leaves, viewed, path, made)
            wrapped.append(self._owner.value(cell))
        return rule.tree.build(wrapped)

    def _step(self, leaves: list[Any], viewed: int, path: Any, made: tuple[Any, Tree]) -> ViewStep:
        """How a view was taken."""
        args, kwargs = made[1].build([SELF if i == viewed else self._argument(x) for i, x in enumerate(leaves)])
        return (target_name(made[0]), tuple(args), dict(kwargs), tuple(path))

    # -- in-place calls ----------------------------------------------------------------------------------------------

    def _mutation(self, func: Any, leaves: list[Any], tree: Tree, rule: Rule) -> Any:
        """Write an in-place call down as a new value of the base of what it changes."""
        assert rule.changed is not None
        changed = leaves[rule.changed]
        if func is torch.Tensor.__setitem__ and self._is_itself(changed, leaves, tree):
            return None
        cell = changed.cell if self.is_own(changed) else self._update_cell(changed)
        args, kwargs = tree.build([SELF if x is changed else self._argument(x) for x in leaves])
        root = cell.root
        views: list[ViewStep] = []
        while cell.base is not None and cell.step is not None:
            views.insert(0, cell.step)
            cell = cell.base
        before = self.current(root)
        asked = (before, tuple(views), self._name(func), tuple(args), dict(kwargs))
        node = self._add(mutate, asked, {}, before.meta["spec"])
        if self.gradients.is_off and root.is_still:
            node = self._add(torch.Tensor.detach, (node,), {}, before.meta["spec"])
        elif self.gradients.is_off:
            self.gradients.unseen = self._owner.line()
        self.remember(root)
        root.version = root.seen = next(self._clock)
        root.node = node
        self.mutated.append(root)
        self._edited(root)
        return changed if rule.returns_changed else rule.tree.build(rule.leaves)

    def _is_itself(self, changed: Any, leaves: list[Any], tree: Tree) -> bool:
        """Whether a part is given what it is already: the end of ``h[:, 0] += 1``, in Python's reading of it."""
        value = leaves[-1]
        if len(list(filter(_is_tensor, leaves))) != 2 or not (self.is_own(changed) and self.is_own(value)):
            return False
        key = tree.build([SELF if x is changed else x for x in leaves])[0][1]
        is_taken_so = value.cell.step == ("torch.Tensor.__getitem__", (SELF, key), {}, ())
        return value.cell.base is changed.cell and is_taken_so

    def remember(self, cell: Cell) -> None:
        """In a branch not taken: keep what the cell was."""
        if self.journal is not None:
            self.journal.append((cell, {**vars(cell), "handles": list(cell.handles)}))

    def forget(self) -> None:
        """Keep no tensor of the user's alive."""
        self.constants, self._versions = [], []
        self._given.clear()
        self.updates.clear()

    def named(self, name: str) -> fx.Node:
        """The node of that name."""
        found: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return found

    def _update_cell(self, tensor: torch.Tensor) -> Cell:
        """A plain tensor of the user's changed in place by a value: updated after the run.

        Raises: TraceError for a weight of the model.
        """
        part = self._part(tensor)
        if part is not None:
            return part.cell
        node, number = self._given_tensor(tensor), self._number(tensor)
        if number < 0:
            raise TraceError(
                f"{self._owner.line()}: {self.weight_names[node.name]} is a parameter or buffer of the model, which a "
                "block does not change in place; use a copy: t.clone()"
            )
        cell = self._fresh_cell(self._spec_of(tensor), self.updates.get(number, node), "a tensor of yours")
        cell.handles.append((Update(number), 0))
        return cell

    def _part(self, tensor: torch.Tensor) -> Value | None:
        """The tensor as a part of another of the user's that this body has changed; None where none shares its memory.

        Raises: TraceError where it is no part of that.
        """
        for number in self.updates:
            changed = self.constants[number]
            if type(changed) is Value or type(tensor) is Value or not share_memory(changed, tensor):
                continue
            if changed is tensor:
                return None
            start = place_in(changed, tensor)
            if start is None:
                raise TraceError(
                    f"{self._owner.line()}: a tensor {list(tensor.shape)} of yours shares memory with another that "
                    "this block has changed in place; use that one here too, or this one in a trace of its own"
                )
            whole = Value.of(self._update_cell(changed))
            part: Value = self.operation(torch.Tensor.as_strided, (whole, tensor.shape, tensor.stride(), start), {})
            return part
        return None

    # -- arguments ---------------------------------------------------------------------------------------------------

    def current(self, cell: Cell) -> fx.Node:
        """The node of a cell's present value: of a view whose base has changed, the view taken again."""
        self.gradients.functions.adopt()
        if cell.base is not None and cell.step is not None and cell.seen != cell.root.version:
            base = self.current(cell.base)
            name, args, kwargs, path = cell.step
            put = lambda x: base if isinstance(x, str) and x == SELF else x  # noqa: E731
            node = self._add(find_target(name), map_leaves(put, args), map_leaves(put, kwargs), cell.node.meta["spec"])
            node.meta[QUIET] = True
            for key in path:
                node = self.graph.call_function(operator.getitem, (node, key))
                node.meta.update(cell.node.meta)
            cell.node, cell.seen = node, cell.root.version
        return cell.node

    def node_of(self, value: Any) -> fx.Node:
        node = self._argument(value)
        assert isinstance(node, fx.Node)
        return node

    def _argument(self, leaf: Any) -> Any:
        """A leaf of the arguments as it stands in the graph."""
        if self.is_own(leaf):
            return self.current(leaf.cell)
        if isinstance(leaf, torch.Tensor):
            part = self._part(leaf) if self.updates else None
            if part is not None:
                return self.current(part.cell)
            return self.updates.get(self._number(leaf), self._given_tensor(leaf))
        if isinstance(leaf, slice) and any(values_in(leaf)):
            return slice(
                *(self.numbers(x).item() if isinstance(x, Value) else x for x in (leaf.start, leaf.stop, leaf.step))
            )
        if isinstance(leaf, torch.nn.Module):
            raise TraceError(
                f"a {type(leaf).__name__} cannot be an argument of a recorded call; call the module itself on the value"
            )
        plain: Any = leaf
        return (
            plain.item() if type(plain).__module__ == "numpy" and hasattr(plain, "item") and not plain.shape else plain
        )

    def _spec_of(self, leaf: Any) -> Any:
        """The spec of a tensor or value; any other leaf itself."""
        if isinstance(leaf, Value):
            return leaf.cell.spec
        if isinstance(leaf, torch.Tensor):
            return TensorSpec(leaf.dtype, tuple(leaf.shape), tuple(leaf.stride()), str(leaf.device))
        return leaf

    def is_own(self, leaf: Any) -> bool:
        """Whether it is a value of this body; one of an earlier block of the session is like a tensor of the user's."""
        return isinstance(leaf, Value) and leaf.cell.recorder is self._owner

    def _fake_of(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return leaf.cell.fake if self.is_own(leaf) else self.fake(leaf.cell.spec)
        return _torch.fake_of(self.mode, leaf.detach()) if isinstance(leaf, torch.Tensor) else leaf

    def _given_tensor(self, tensor: torch.Tensor) -> fx.Node:
        """The placeholder of a tensor of the user's or of the model's."""
        known = self._given.get(id(tensor))
        if known is None:
            self.gradients.functions.check_given(tensor, self._owner.line())
            weight = self._names.get(id(tensor))
            label = f"weight_{len(self.weight_names)}" if weight is not None else f"constant_{len(self.constants)}"
            node = self.graph.placeholder(label)
            spec = replace(self._spec_of(tensor), storage=node.name)
            node.meta.update(spec=spec, origin=Origin(user=self._owner.line(), made_by="body"))
            if weight is not None:
                self.weight_names[node.name] = weight
            else:
                self.constants.append(tensor)
                # A tensor with as many rows as the batch has now: it would not fit another batch.
                self.fitted |= {name for name, size in self.sizes.items() if size > 1 and size in spec.shape}
                self._versions.append(None if isinstance(tensor, Value) else _torch.version(tensor))
            known = self._given[id(tensor)] = (node, tensor)
        return known[0]

    @property
    def changes_given(self) -> bool:
        """Whether it changes a plain tensor of the user's in place: not a value of an earlier block."""
        return any(type(self.constants[number]) is not Value for number in self.updates)

    def seal(self) -> None:
        """The user's code has had its time: from here on, tensors of the user's change by blocks that run before."""
        self._versions = sealed(self.constants, self._versions)

    @property
    def given(self) -> list[torch.Tensor]:
        """The plain tensors that it uses."""
        return [tensor for _, tensor in self._given.values()]

    def _number(self, tensor: torch.Tensor) -> int:
        """The number of a constant; -1 for what is none."""
        return next((i for i, constant in enumerate(self.constants) if constant is tensor), -1)

    def constant_specs(self) -> tuple[tuple[str, TensorSpec], ...]:
        """Placeholder and spec of each constant, by number.

        Raises: InputError when a tensor of the user's was changed after the body had used it.
        """
        check_unchanged(self.constants, self._versions)
        nodes = [self._given[id(tensor)][0] for tensor in self.constants]
        return tuple((node.name, node.meta["spec"]) for node in nodes)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _fake(leaf: Any) -> Any:
    return leaf.cell.fake if isinstance(leaf, Value) else leaf


def _own_copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _attribute_name(func: Any) -> str:
    return getattr(getattr(func, "__self__", None), "__name__", getattr(func, "__name__", str(func)))
