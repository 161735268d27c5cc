"""The arguments of a body's calls, as nodes: what a value is now, and a tensor of the user's that has been changed.

A view whose base has changed in place is taken again, as torch would show it.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.cell import Cell, Recording
from fxsight.errors import TextError, TraceError
from fxsight.given import Given
from fxsight.lent import place_in, share_memory
from fxsight.mutate import SELF
from fxsight.node import Origin
from fxsight.spec import TensorSpec
from fxsight.targets import argument_text, find_target, target_name
from fxsight.tree import map_leaves
from fxsight.value import Value, fake_mode, values_in

QUIET = "quiet"  # in the meta of nodes that are not statements of the user's: rows of an invoke, views taken again


class Update:
    """A plain tensor of the user's that a body changes in place: its number among the constants."""

    def __init__(self, number: int) -> None:
        self.number = number


class Arguments(Given, ABC):
    """The values that a body makes, and the arguments of its calls as they stand in the graph."""

    def __init__(self, owner: Recording, weights: Callable[[], Mapping[int, str]], sizes: Mapping[str, int]) -> None:
        super().__init__(owner, weights, sizes)
        self.seen: set[fx.Node] = set()  # values of which more than the operations after them has made use

    @abstractmethod
    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that computes something, written down."""

    @abstractmethod
    def numbers(self, arguments: Any) -> Any:
        """The arguments with real tensors for values: computed now."""

    @cached_property
    def mode(self) -> Any:
        """In which tensors are shapes."""
        return fake_mode()

    def fake(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor without data, in memory of its own."""
        with self.mode:
            return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)  # type: ignore[arg-type]

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

    def is_own(self, leaf: Any) -> bool:
        """Whether it is a value of this body; one of an earlier block of the session is like a tensor of the user's."""
        return isinstance(leaf, Value) and leaf.cell.recorder is self._owner

    def _fake_of(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return leaf.cell.fake if self.is_own(leaf) else self.fake(leaf.cell.spec)
        return _torch.fake_of(self.mode, leaf.detach()) if isinstance(leaf, torch.Tensor) else leaf

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

    def named(self, name: str) -> fx.Node:
        """The node of that name."""
        found: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return found

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
