"""A body's torch calls, written down: each becomes one node, after it has run on fake tensors.

A wrong index or shape raises torch's own error at the user's line. Nothing is computed here, but where a call needs
numbers.

    Body        torch calls, one node each        (this file)
    InPlace     what the body changes in place    (``inplace``)
    Arguments   what calls are given, as nodes    (``arguments``)
    Given       tensors that it does not make     (``given``)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxsight.backward import Gradients, about_gradients
from fxsight.cell import Cell, Recording
from fxsight.containers import savable
from fxsight.errors import TraceError
from fxsight.inplace import InPlace
from fxsight.item import check_none
from fxsight.looked import looked_dimensions
from fxsight.mutate import SELF, ViewStep
from fxsight.rules import Rule, Table, rule_for
from fxsight.spec import TensorSpec
from fxsight.targets import target_name
from fxsight.tree import Tree, flatten, map_leaves
from fxsight.value import NUMBERS, Value, values_in

Demand = Callable[[Sequence[fx.Node]], list[torch.Tensor]]

_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
_SIZES = frozenset(
    ("size", "stride", "numel", "nelement", "dim", "__len__", "is_contiguous", "element_size", "storage_offset")
)


class _Result:
    """Names the result of a function in messages; the text is made when it is needed."""

    def __init__(self, func: Any) -> None:
        self.func = func

    def __str__(self) -> str:
        return f"the result of {target_name(self.func)}"


class Body(InPlace):
    """The graph of one body, and the calls that write it.

    demand: computes nodes at once, for bodies that need a number.  rules: what calls do to shapes, shared by bodies.
    The rest as for ``Given`` and ``InPlace``.
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
        super().__init__(owner, weights, sizes, edited)
        self.looked: set[str] = set()
        self.shapes: dict[fx.Node, set[int]] = {}  # dimensions that the body has looked at
        self._demand, self._rules = demand, rules
        self.gradients = Gradients(owner, self)

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
        if name in _SIZES:
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


def _fake(leaf: Any) -> Any:
    return leaf.cell.fake if isinstance(leaf, Value) else leaf


def _own_copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _attribute_name(func: Any) -> str:
    return getattr(getattr(func, "__self__", None), "__name__", getattr(func, "__name__", str(func)))
