"""Programs for many cells with few nodes: what lies between the places that cells touch is stages.

A captured program is cut where its blocks end and where any of the cells reads or writes. Each piece is one stage, the
same object in all cells, so a cell's program has as many nodes as the model has blocks, and not as it has operators.
A piece that a cell touches inside keeps its operators.

    before: embedding, add            → stage before
    h.0: layer_norm, ..., add_2       → stage h.0
    h.1: layer_norm, ..., mul, ...    → layer_norm, ..., mul, ...     where the cell changes mul
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from fxsight.effects import is_random, mutated_storages, storages
from fxsight.intervention import Intervention
from fxsight.node import Origin, binding_of, origin_of
from fxsight.numbering import Numbering, formula
from fxsight.place import Location
from fxsight.program import Program
from fxsight.regions import cut
from fxsight.run import Weights
from fxsight.spec import TensorSpec, renamed
from fxsight.stage import STAGED, Stage, Table
from fxsight.straight import straight
from fxsight.tree import Tree
from fxsight.written import titled

_BORDER = torch.ops.aten.alias.default


class Stages:
    """The stages of many programs of one module: equal operators on equal weights are one stage."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: dict[Hashable, Stage] = {}
        self._functions: dict[Hashable, Callable[..., list[Any]]] = {}
        self.table = Table(self._find)

    def _find(self) -> Mapping[Stage, Sequence[Any]]:
        stages = list(self._known.values())
        names = dict.fromkeys(name for stage in stages for name in stage.weights)
        weights = dict(zip(names, Weights(self._module, list(names))(), strict=True))
        return {s: [*(weights[name] for name in s.weights), *s.literals.values()] for s in stages}

    def of(self, title: str, program: Program, call: _Call) -> Stage:
        """The stage that does what some nodes of a program do."""
        weights = tuple(str(binding_of(n).key) for n in call.fixed if binding_of(n).kind == "weight")
        literals = {k: program.literals[k] for k in (str(binding_of(n).key) for n in call.fixed[len(weights) :])}
        formulas = _formulas(call)
        key = (formulas, weights, tuple(map(id, literals.values())))
        if key not in self._known:
            make = partial(_graph, call)
            if formulas not in self._functions:
                self._functions[formulas] = straight(make(), title or "stage")
            run = titled(self._functions[formulas], title or "stage")
            self._known[key] = Stage(title, make, run, weights, literals)
        return self._known[key]


@dataclass(frozen=True, eq=False)
class _Call:
    """Some nodes of a program that one stage does.

    inside: all nodes of its piece.  fixed: weights, then literals.  inputs, outputs: values.
    """

    nodes: tuple[fx.Node, ...]
    inside: Set[fx.Node]
    fixed: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def _call(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], inside: Set[fx.Node]) -> _Call:
    """What the outputs need of the nodes, and of others; borders of modules are nothing of their own."""
    needed = {behind(node, inside) for node in outputs}
    for node in reversed(nodes):
        if node in needed:
            needed |= {behind(a, inside) for a in node.all_input_nodes}
    kept = {node: None for node in nodes if node in needed}
    given = dict.fromkeys(b for n in kept for a in n.all_input_nodes if (b := behind(a, inside)) not in kept)
    fixed = sorted((a for a in given if is_fixed(a)), key=lambda a: binding_of(a).kind == "literal")
    return _Call(tuple(kept), inside, tuple(fixed), tuple(a for a in given if not is_fixed(a)), tuple(outputs))


def is_fixed(node: fx.Node) -> bool:
    """Whether a stage finds it in the table."""
    return node.op == "placeholder" and binding_of(node).kind in ("weight", "literal")


def behind(node: fx.Node, inside: Set[fx.Node]) -> fx.Node:
    """The value that a border of modules passes on; borders that are outside are left alone."""
    while node.target is _BORDER and node in inside:
        node = node.all_input_nodes[0]
    return node


def _graph(call: _Call) -> fx.Graph:
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*call.fixed, *call.inputs):
        made[node] = graph.create_node("placeholder", node.name, (), {}, node.name)
        made[node].meta = dict(node.meta)
    for node in call.nodes:
        made[node] = graph.node_copy(node, lambda a: made[behind(a, call.inside)])
    graph.output(tuple(made[behind(node, call.inside)] for node in call.outputs))
    return graph


def _formulas(call: _Call) -> Hashable:
    """Equal for calls that do the same on values of the same shapes, and with the same memory in common."""
    numbers, memory = dict[fx.Node, int](), Numbering()
    rows: list[Any] = []

    def number(node: fx.Node) -> int:
        return numbers[node if node in numbers else behind(node, call.inside)]

    for node in (*call.fixed, *call.inputs):
        rows.append(_about(node.meta.get("spec"), memory))
        numbers[node] = len(rows)
    for node in call.nodes:
        rows.append((formula(node, number), _about(node.meta.get("spec"), memory)))
        numbers[node] = len(rows)
    return len(call.fixed), tuple(rows), tuple(map(number, call.outputs))


def _about(spec: Any, memory: Numbering) -> Hashable:
    if isinstance(spec, tuple):
        return tuple(_about(part, memory) for part in spec)
    if isinstance(spec, TensorSpec):
        return spec.dtype, spec.shape, spec.stride, spec.device, memory.of(spec.storage)
    return str(spec)


# -- pieces ----------------------------------------------------------------------------------------------------------


class _Piece:
    """Consecutive operators of a program, which are one stage where a cell does not touch them inside.

    outputs: values that later operators, or cells, use.  passed: those that are borders of values from outside.
    """

    def __init__(self, title: str, nodes: Sequence[fx.Node], wanted: set[fx.Node], changed: frozenset[str]) -> None:
        self.title, self.nodes = title, tuple(nodes)
        self._inside = inside = set(nodes)
        used = [n for n in nodes if n in wanted or any(u not in inside and u.op != "output" for u in n.users)]
        self.outputs = tuple(n for n in used if behind(n, inside) in inside)
        self.passed = {n: behind(n, inside) for n in used if behind(n, inside) not in inside}
        times = [origin_of(n).time for n in nodes]
        self.first, self.last = min(times), max(times)
        self.is_valid = self.first >= 0 and self._is_whole() and not self._acts(changed)
        self._calls: dict[frozenset[fx.Node], Sequence[tuple[Stage, _Call]]] = {}

    def _is_whole(self) -> bool:
        """Whether each output has memory of its own, made here."""
        made, seen = {n.name for n in self.nodes}, set[str]()
        for storage in (s for node in self.outputs for s in storages(node)):
            if storage.partition("[")[0] not in made or storage in seen:
                return False
            seen.add(storage)
        return True

    def _acts(self, changed: frozenset[str]) -> bool:
        """Whether it does more than make its outputs, or memory of its is changed."""
        return any(is_random(n) or storages(n) & changed for n in self.nodes)

    @cached_property
    def inputs(self) -> Mapping[fx.Node, frozenset[fx.Node]]:
        """For each node the values from outside that it depends on."""
        found: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.nodes:
            found[node] = frozenset[fx.Node]().union(*(found.get(a, _own(a)) for a in node.all_input_nodes))
        return found

    @cached_property
    def given(self) -> frozenset[fx.Node]:
        """All values from outside."""
        return frozenset[fx.Node]().union(*self.inputs.values())

    @cached_property
    def memory(self) -> frozenset[str]:
        """The memory that it is given."""
        return frozenset[str]().union(*map(storages, self.given))

    @cached_property
    def seen(self) -> Mapping[fx.Node, frozenset[str]]:
        """What others see of it, and its memory."""
        return {node: storages(node) for node in (*self.outputs, *self.passed)}

    @cached_property
    def seen_memory(self) -> frozenset[str]:
        """The memory of all that."""
        return frozenset[str]().union(*self.seen.values())

    def changes(self, changed: Set[fx.Node], written: frozenset[str]) -> Iterator[fx.Node]:
        """What others see of it that is another value where some values, and some memory, are changed."""
        if changed & self.given or written & self.seen_memory:
            yield from (n for n, memory in self.seen.items() if memory & written or self.inputs[n] & changed)

    def calls(self, changed: Set[fx.Node], program: Program, stages: Stages) -> Sequence[tuple[Stage, _Call]]:
        """The stages that do it: what does not depend on changed values has one of its own."""
        varies = self.given & changed
        if varies not in self._calls:
            self._calls[varies] = [(stages.of(self.title, program, call), call) for call in self._cut(varies)]
        return self._calls[varies]

    def _cut(self, varies: frozenset[fx.Node]) -> list[_Call]:
        first = [n for n in self.nodes if not self.inputs[n] & varies]
        given = frozenset[str]().union(*(storages(a) for n in first for a in n.all_input_nodes if a not in self.inputs))
        if not varies or not any(_makes(n, given) for n in first):
            return [_call(self.nodes, self.outputs, self._inside)]
        early = set(first)
        main = _call(
            [n for n in self.nodes if n not in early], [n for n in self.outputs if n not in early], self._inside
        )
        passed = [n for n in main.inputs if n in early] + [n for n in self.outputs if n in early]
        return [_call(first, list(dict.fromkeys(passed)), self._inside), main]


def _own(node: fx.Node) -> frozenset[fx.Node]:
    return frozenset() if is_fixed(node) else frozenset([node])


def _makes(node: fx.Node, given: frozenset[str]) -> bool:
    """Whether it computes numbers, and is not a view of what there is."""
    spec = node.meta.get("spec")
    return isinstance(spec, TensorSpec) and 0 not in spec.shape and spec.storage not in given


# -- the program of one cell -----------------------------------------------------------------------------------------


class Staging:
    """A captured program, cut for some cells.

    asked: what all of them ask for.
    """

    def __init__(self, program: Program, asked: Iterable[Intervention], stages: Stages) -> None:
        self.program, self.stages = program, stages
        spots = [spot for one in asked for spot in _spots(one)]
        self._last = _last_uses(program)
        self._fixed = frozenset(s for n in program.graph.nodes if is_fixed(n) for s in storages(n))
        self.changed = mutated_storages(program.graph.nodes)
        wanted = {program.nodes[spot.node] for spot in spots}
        ends = {end for spot in spots for end in self._ends(spot)}
        self.pieces = [
            p for region in cut(program) for p in self._pieces(region.place, region.nodes, sorted(ends), wanted)
        ]
        self._made_in = {node: piece for piece in self.pieces for node in piece.nodes}
        self._no_stages = frozenset(piece for piece in self.pieces if not piece.is_valid)
        self.placeholders = {n: is_fixed(n) for n in program.graph.nodes if n.op == "placeholder"}
        self._given: dict[str, list[fx.Node]] = {}
        for node in self.placeholders:
            for storage in storages(node):
                self._given.setdefault(storage, []).append(node)

    def _pieces(
        self, title: str, nodes: Sequence[fx.Node], ends: Sequence[float], wanted: set[fx.Node]
    ) -> list[_Piece]:
        times = [origin_of(n).time for n in nodes]
        at = {next((i for i, t in enumerate(times) if t > end), 0) for end in ends if times[0] <= end < times[-1]}
        cuts = sorted(at - {0}) if times == sorted(times) else []
        found: list[_Piece] = []
        start = 0
        for _, end in pairwise([0, *cuts, len(nodes)]):
            piece = _Piece(title, nodes[start:end], wanted, self.changed)
            if piece.is_valid or end == len(nodes):
                found.append(piece)
                start = end
        return found

    def _ends(self, spot: Location) -> list[float]:
        """The times at which a place begins and ends; where it is not used later, its end does not matter."""
        node = self.program.nodes[spot.node]
        is_used_later = any(self._last.get(storage, spot.until) > spot.until for storage in storages(node))
        return [origin_of(node).time, spot.since, *([spot.until] if is_used_later else [])]

    def of(self, asked: Intervention) -> Program:
        """The program with all but what is touched as stages; itself where that cannot be."""
        nodes = self.program.nodes
        written = frozenset(s for w in asked.writes for s in storages(nodes[w.location.node]))
        flat = self._no_stages.union(*map(self._touched, _spots(asked)))
        if len(flat) == len(self.pieces) or written & self._fixed:
            return self.program
        build = _Build(self, flat, {nodes[spot.node] for spot in _spots(asked)})
        changed = {n for storage in written for n in self._given.get(storage, ())}
        for piece in self.pieces:
            if piece in flat:
                build.operators(piece.nodes)
                for node in piece.nodes:
                    if storages(node) & written or any(a in changed for a in node.all_input_nodes):
                        changed.add(node)
            else:
                build.stages(piece, piece.calls(changed, self.program, self.stages))
                changed.update(piece.changes(changed, written))
        return build.finish()

    def _touched(self, spot: Location) -> Iterator[_Piece]:
        """The pieces that a place is inside of, so that their operators must be seen."""
        node = self.program.nodes[spot.node]
        made_in = self._made_in.get(node)
        if made_in is not None and not (node in made_in.outputs and made_in.last <= spot.since):
            yield made_in
        ends, memory = self._ends(spot)[1:], storages(node)
        for piece in self.pieces:
            if any(piece.first <= end < piece.last for end in ends) and memory & piece.memory:
                yield piece


def _last_uses(program: Program) -> Mapping[str, float]:
    """For each memory the time at which something uses it last."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return {s: origin_of(n).time for n in nodes for a in n.all_input_nodes for s in storages(a)}


def _spots(asked: Intervention) -> list[Location]:
    return [*(read.location for read in asked.reads), *(write.location for write in asked.writes)]


class _Build:
    """The graph of one cell while it is made.

    wanted: nodes that stay, borders of modules, too.
    """

    def __init__(self, staging: Staging, flat: Set[_Piece], wanted: set[fx.Node]) -> None:
        self.staging, self.graph = staging, fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._names: dict[str, str] = {}  # memory that is made in a stage: its first value that is seen
        self._wanted = wanted
        used = {a for piece in flat for node in piece.nodes for a in node.all_input_nodes} | wanted
        for node, fixed in staging.placeholders.items():
            if not fixed or node in used:
                self._made[node] = self.graph.node_copy(node)
        self._table = self._node(staging.stages.table, (), "table", (), 0.0)

    def _node(self, target: Any, args: tuple[Any, ...], name: str, spec: Any, time: float, call: int = -1) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, {}, name)
        node.meta.update(spec=spec, origin=Origin(call, time, made_by="staged"))
        return node

    def operators(self, nodes: Sequence[fx.Node]) -> None:
        """Some as they are."""
        for node in nodes:
            made = self._made[node] = self.graph.node_copy(node, self._made.__getitem__)
            if self._names and storages(node) & self._names.keys():
                made.meta["spec"] = renamed(node.meta["spec"], self._names)

    def stages(self, piece: _Piece, calls: Sequence[tuple[Stage, _Call]]) -> None:
        """One piece by its stages."""
        for node in piece.passed:
            self._made[node] = self._made[piece.passed[node]]
        for stage, call in calls:
            args = (self._table, *(self._made[a] for a in call.inputs))
            if not call.outputs:
                continue
            if len(call.outputs) == 1:
                self._seen(call.outputs[0], stage, args, piece.first)
                continue
            whole = self._node(stage, args, f"{call.outputs[0].name}_stage", (), piece.first)
            for number, node in enumerate(call.outputs):
                self._seen(node, operator.getitem, (whole, number), piece.first)

    def _seen(self, node: fx.Node, target: Any, args: tuple[Any, ...], time: float) -> None:
        is_free = node in self._wanted or node.target is _BORDER  # of others the name is that of an operator inside
        name = node.name if is_free else f"{node.name}{STAGED}"
        made = self._node(target, args, name, None, time, origin_of(node).call)
        self._names |= dict.fromkeys(storages(node), made.name)
        made.meta["spec"] = renamed(node.meta["spec"], self._names)
        self._made[node] = made

    def finish(self) -> Program:
        """A program that returns nothing yet."""
        self.graph.output(())
        nothing = Tree("tuple", "", (), ())
        return self.staging.program.with_graph(self.graph, "staged", outputs=nothing, output_leaves=())
