"""The tensors that a body uses and does not make: the user's, and the model's parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.backward import Gradients
from fxsight.cell import Recording
from fxsight.lent import check_unchanged, sealed
from fxsight.node import Origin
from fxsight.spec import TensorSpec
from fxsight.value import Value, given_spec


class Given:
    """The placeholders of a body's graph, one for each tensor; none is read or written.

    owner: the recorder, which values belong to.  weights: asked, once, for the names of the model's parameters and
    buffers by ``id``.  sizes: of the inputs, by name.
    constants: the user's tensors, by number.  updates: those of them that the body has changed in place, as they are
    now.
    """

    gradients: Gradients

    def __init__(self, owner: Recording, weights: Callable[[], Mapping[int, str]], sizes: Mapping[str, int]) -> None:
        self.graph = fx.Graph()
        self.sizes = sizes
        self.constants: list[torch.Tensor] = []
        self.weight_names: dict[str, str] = {}
        self.updates: dict[int, fx.Node] = {}
        self.fitted: set[str] = set()  # sizes that a tensor of the user's has, too
        self._owner, self._weights = owner, weights
        self._given: dict[int, tuple[fx.Node, torch.Tensor]] = {}
        self._versions: list[int | None] = []

    @cached_property
    def _names(self) -> Mapping[int, str]:
        return self._weights()

    def _given_tensor(self, tensor: torch.Tensor) -> fx.Node:
        """The placeholder of a tensor of the user's or of the model's."""
        known = self._given.get(id(tensor))
        if known is None:
            self.gradients.functions.check_given(tensor, self._owner.line())
            weight = self._names.get(id(tensor))
            label = f"weight_{len(self.weight_names)}" if weight is not None else f"constant_{len(self.constants)}"
            node = self.graph.placeholder(label)
            spec = replace(given_spec(tensor), storage=node.name)
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

    def _spec_of(self, leaf: Any) -> Any:
        """The spec of a tensor or value; any other leaf itself."""
        return given_spec(leaf) if isinstance(leaf, torch.Tensor) else leaf

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

    def forget(self) -> None:
        """Keep no tensor of the user's alive."""
        self.constants, self._versions = [], []
        self._given.clear()
        self.updates.clear()
