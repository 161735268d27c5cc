"""What the nodes of a program carry, and how to read it: binding, origin, spec.

All of it lives in ``node.meta`` of ordinary ``fx`` nodes: "spec", "origin" and, on placeholders, "binding".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from fxsight.spec import SizeSpec, Spec, TensorSpec

BindingKind = Literal["weight", "input", "constant", "literal"]


@dataclass(frozen=True)
class Binding:
    """What a placeholder stands for.

    weight: a parameter or buffer, ``key`` is its name in the module, looked up at each run.
    input: leaf number ``key`` of ``(args, kwargs)``.  constant: tensor number ``key`` of the user's.
    literal: a tensor made in the model's own code, kept with the program under ``key``.
    """

    kind: BindingKind
    key: str | int

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"


@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    call: the innermost call of the book it was made in; -1 for none.  time: on the book's clock.
    line: the model's line, ``file:line``.  user: the user's line that asked for it.  made_by: the pass, or "capture".
    was: of an opened operator and its members, the call that it was, as text.  part_of: of its parts, its node.
    """

    call: int = -1
    time: float = -1
    line: str = ""
    user: str = ""
    made_by: str = "capture"
    was: str = ""
    part_of: str = ""


@dataclass(frozen=True)
class Fixed:
    """An input or output that is not a tensor: part of what was captured."""

    value: Any


@dataclass(frozen=True)
class Size:
    """A named size and the values it may have; ``high`` None means no bound."""

    name: str
    low: int = 0
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.name} >= {self.low}" if self.high is None else f"{self.low} <= {self.name} <= {self.high}"


InputLeaf = TensorSpec | SizeSpec | Fixed  # a size: the count of a cache
OutputLeaf = Fixed | None


def spec_of_node(node: fx.Node) -> Spec:
    """Dtype and symbolic shape of the node's value."""
    return node.meta.get("spec")


def tensor_spec(node: fx.Node) -> TensorSpec:
    """The same where the node is known to be a tensor."""
    spec = node.meta.get("spec")
    assert isinstance(spec, TensorSpec), f"{node.name} is not a tensor: {spec}"
    return spec


def origin_of(node: fx.Node) -> Origin:
    """Where the node comes from."""
    origin = node.meta.get("origin", _NOWHERE)
    assert isinstance(origin, Origin)
    return origin


def binding_of(node: fx.Node) -> Binding:
    """What the placeholder stands for."""
    binding = node.meta["binding"]
    assert isinstance(binding, Binding)
    return binding


def output_node(graph: fx.Graph) -> fx.Node:
    """The last node."""
    node: fx.Node = next(iter(reversed(graph.nodes)))
    return node


def is_tensor(node: fx.Node) -> bool:
    """Whether its value is one tensor."""
    return isinstance(node.meta.get("spec"), TensorSpec)


_NOWHERE = Origin()
