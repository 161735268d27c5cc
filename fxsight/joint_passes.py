"""The backward passes of a woven program, as the nodes of its graph say them."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxsight.effects import storages
from fxsight.errors import TraceError
from fxsight.gradient import arrived, backward, gradient
from fxsight.node import origin_of

NUMBERED = {gradient: 1, arrived: 2}  # which of their arguments is the number of their pass


@dataclass(eq=False)
class Pass:
    """One backward pass of a woven program.

    arrivals: by value, the nodes of its gradients: those of later places first, where the gradient comes first.
    is_wanted: whether gradients have been asked for; where all of them are unused, nothing is computed.
    edits: by such a node, the gradient that goes on.  functions: by a ``custom_function``, the nodes of the gradients
    that arrive at its results, and of those that go on from its inputs.
    """

    number: int
    node: fx.Node
    losses: tuple[fx.Node, ...]
    seeds: tuple[fx.Node | None, ...]
    leaves: tuple[fx.Node, ...]
    retain: bool
    create: bool
    zeros: bool
    is_wanted: bool
    edits: dict[fx.Node, fx.Node]
    functions: dict[fx.Node, tuple[tuple[fx.Node, ...], tuple[fx.Node | None, ...]]]
    arrivals: dict[fx.Node, list[fx.Node]] = field(default_factory=dict[fx.Node, list[fx.Node]])


def passes_of(nodes: Sequence[fx.Node], tensor: Callable[[fx.Node], fx.Node]) -> list[Pass]:
    """The passes of a woven program, in order.  tensor: the node that first is the tensor that a node is."""
    found: list[Pass] = []
    for node in nodes:
        if node.target is backward:
            given: tuple[Any, ...] = node.args
            number, losses, seeds, edits, leaves, (retain, create, unused, *wanted), learned, _, functions = given
            custom = {function: (arrivals, goes_on) for function, arrivals, goes_on in functions}
            firsts = tuple(dict.fromkeys(map(tensor, learned if leaves is None else leaves)))
            zeros = unused == "zeros"
            is_wanted = bool(wanted) or leaves is not None
            found.append(
                Pass(number, node, losses, seeds, firsts, retain, create, zeros, is_wanted, dict(edits), custom)
            )
    found.sort(key=lambda one: one.number)
    order = {node: number for number, node in enumerate(nodes)}
    places: list[Any] = [n for n in nodes if n.target is gradient]
    for place in sorted(places, key=lambda n: -order[n.args[0]]):
        found[place.args[1]].arrivals.setdefault(tensor(place.args[0]), []).append(place)
    return found


def levels_of(nodes: Sequence[fx.Node], changed: Set[str]) -> dict[fx.Node, int]:
    """After how many passes each operator can run.  changed: memory that something changes in place.

    Raises: TraceError for one that uses such memory and a gradient.
    """
    levels: dict[fx.Node, int] = {}

    def after(node: Any) -> int:
        number = NUMBERED.get(node.target)
        return levels.get(node, 0) if number is None else int(node.args[number]) + 1

    for node in nodes:
        if node.op == "call_function" and node.target not in (*NUMBERED, backward):
            levels[node] = max(map(after, node.all_input_nodes), default=0)
    late = [n for n, level in levels.items() if level and storages(n) & changed]
    if late:
        raise TraceError(
            f"{late[0].name} uses a gradient and memory that the model changes in place; this is not "
            "supported: use two traces"
        )
    return levels


def no_path(place: fx.Node) -> TraceError:
    """The error for a gradient that is asked for and does not exist."""
    return TraceError(
        f"{origin_of(place).user}: this gradient does not exist: the loss does not depend on the value "
        f"({place.meta['spec']})"
    )
