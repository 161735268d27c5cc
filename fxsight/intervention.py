"""What one ``with`` body asked for, as data: a small functional graph between reads and writes.

    reads       value at a location (before any write of this body there)   → placeholder "input"-like
    constants   tensors of the user's                                       → placeholder, never baked in
    operations  torch calls on them, functional                             → call_function nodes
    writes      location ← value, by assignment or in place
    saves       structured values wanted after the block

It is the thing that is woven, cached by, printed, kept by edits and sent: there is no Python code in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxsight.gradient import Backward
from fxsight.node import Fixed
from fxsight.place import Location
from fxsight.spec import SizeSpec, TensorSpec
from fxsight.targets import argument_text, target_name
from fxsight.text import spec_text
from fxsight.tree import Tree


@dataclass(frozen=True)
class Read:
    """The value at a location, as the placeholder ``name`` of the graph."""

    name: str
    location: Location
    line: str = ""


@dataclass(frozen=True)
class Write:
    """A location gets the value of the node ``value``: only there, or in place, for all who share its memory."""

    location: Location
    value: str
    in_place: bool
    line: str = ""


@dataclass(frozen=True)
class Save:
    """A structured value wanted after the block: per leaf the name of a node, or a fixed value."""

    tree: Tree
    leaves: tuple[str | Fixed, ...]


@dataclass(frozen=True, eq=False)
class Intervention:
    """One body. ``graph`` has no output node; ``constants`` and ``weights`` map placeholders to their tensors.

    updates: constants that the body changed in place, with the node of the new value.
    sizes: names of the sizes that the body looked at: it holds for these alone.
    backwards: the backward passes, in order.  learned: what requires gradients among what a program is given, as
    ``str`` of bindings.  shared: of those that are one tensor, all but the first, and the first.  marked: values that
    the body has made require them.
    """

    graph: fx.Graph
    reads: tuple[Read, ...]
    constants: tuple[tuple[str, TensorSpec | SizeSpec], ...]
    weights: tuple[tuple[str, str], ...]
    writes: tuple[Write, ...]
    saves: tuple[Save, ...]
    updates: tuple[tuple[int, str], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    backwards: tuple[Backward, ...] = ()
    learned: tuple[str, ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    marked: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Equal for interventions that become the same program: everything but the sizes it was recorded at."""
        given = [f"constant {number}: {spec_text(spec)}" for number, (_, spec) in enumerate(self.constants)]
        return "\n".join([*(line.partition("    # ")[0] for line in str(self).splitlines()), *given])

    def __str__(self) -> str:
        """One line per read, operation, write and save, with the shapes it was recorded at."""
        return self.text(lambda node: (node.args, node.kwargs))

    def text(self, arguments: Callable[[fx.Node], tuple[Any, Any]]) -> str:
        """The same with other arguments for the operations."""
        names = {name: f"constant {i}" for i, (name, _) in enumerate(self.constants)}
        names |= {name: f"weight {weight}" for name, weight in self.weights}
        names |= {read.name: f"read {read.location.address}" for read in self.reads}
        lines = [
            f"{n.name} = {_row(n, names, arguments)}    # {spec_text(n.meta.get('spec'))}" for n in self.graph.nodes
        ]
        lines += [f"{w.location.address} {'<<' if w.in_place else '<-'} {w.value}" for w in self.writes]
        lines += [f"constant {number} << {value}" for number, value in self.updates]
        lines += [str(backward) for backward in self.backwards]
        lines += [f"learned {', '.join(self.learned)}"] if self.learned else []
        lines += [f"{one} is {first}" for one, first in self.shared]
        lines += [f"marked {', '.join(self.marked)}"] if self.marked else []
        lines += [
            f"save {s.tree.to_json()} {[x if isinstance(x, str) else x.value for x in s.leaves]}" for s in self.saves
        ]
        return "\n".join([*lines, *(f"for {name} = {value}" for name, value in self.sizes)])


def _row(node: fx.Node, names: Mapping[str, str], arguments: Callable[[fx.Node], tuple[Any, Any]]) -> str:
    if node.op == "placeholder":
        return names[node.name]
    args, kwargs = arguments(node)
    shown = [argument_text(a) for a in args] + [f"{k}={argument_text(v)}" for k, v in kwargs.items()]
    return f"{target_name(node.target)}({', '.join(shown)})"
