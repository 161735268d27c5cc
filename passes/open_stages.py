"""``OpenStages``: the operators of a stage, where it is not enough that it is one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxsight.columns import few_columns
from fxsight.editor import Editor
from fxsight.node import Binding, binding_of
from fxsight.numbering import Depends, dependence
from fxsight.passes.narrow_reads import read_in_part
from fxsight.rewrite import Pass
from fxsight.spec import renamed
from fxsight.stage import Stage


@dataclass(frozen=True)
class OpenStages(Pass):
    """Put the operators of a stage into its place, where only some rows or columns of its results are read.

        stage = after(table, x)                                        # f32[batch, length, 96]
        last = torch.Tensor.__getitem__(stage, (slice(None), -1))      # f32[batch, 96]
    becomes
        norm = aten.layer_norm.default(x, [8])                         # f32[batch, length, 8]
        logits = aten.linear.default(norm, weight)                     # f32[batch, length, 96]
        last = torch.Tensor.__getitem__(logits, (slice(None), -1))     # f32[batch, 96]

    everywhere: where all is read, too.  varies: instead, where a result depends on one of these constants of the body.

    Safe: a stage is nothing but these operators in this order.
    """

    everywhere: bool = False
    varies: Depends = frozenset()

    def rewrite(self, editor: Editor) -> None:
        """The last first: when it is open, it may be seen that the one before it is read in part, too."""
        editor.keeps_order = True
        depends = dependence(editor.graph, self.varies) if self.varies else {}
        for stage in [node for node in editor.calls() if isinstance(node.target, Stage) and depends.get(node)]:
            _open(editor, stage)
        while not self.varies and (stages := list(self._wanted(editor))):
            for stage in stages:
                _open(editor, stage)

    def _wanted(self, editor: Editor) -> Iterator[fx.Node]:
        stages = [node for node in editor.calls() if isinstance(node.target, Stage)]
        if self.everywhere:
            return iter(stages)
        values = {value: stage for stage in stages for value in _values(stage)}
        few = [value for value in values if few_columns(value)]
        return iter(dict.fromkeys(values[value] for value in (*read_in_part(editor.graph, values), *few)))


def _values(stage: fx.Node) -> Iterable[fx.Node]:
    """What a stage gives."""
    return list(stage.users) if stage.meta["spec"] == () else [stage]


def _open(editor: Editor, node: fx.Node) -> None:
    stage: Any = node.target
    values: list[Any] = list(node.args)
    table = values.pop(0)
    places = [inner for inner in stage.graph.nodes if inner.op == "placeholder"]
    known = {binding_of(n): n for n in editor.graph.find_nodes(op="placeholder")} if stage.given else {}
    made: dict[fx.Node, Any] = {place: _fixed(editor, place, known) for place in places[: stage.given]}
    made |= dict(zip(places[stage.given :], values, strict=True))
    names = {s: t for place, value in made.items() for s, t in _pairs(place, value)}
    outer = {user.args[1]: user for user in node.users} if node.meta["spec"] == () else {0: node}
    names |= {s: t for number, value in outer.items() for s, t in _pairs(stage.results[number], value)}
    with editor.graph.inserting_before(node):
        for inner in stage.graph.nodes:
            if inner.op == "call_function":
                made[inner] = editor.adopt(inner, made.__getitem__)
                names.setdefault(inner.name, made[inner].name)
                made[inner].meta["spec"] = renamed(inner.meta["spec"], names)
    for number, value in outer.items():
        editor.replace(value, made[stage.results[number]])
        if value is not node:
            editor.erase(value)
    editor.erase(node)
    if not table.users:
        editor.erase(table)


def _fixed(editor: Editor, place: fx.Node, known: Mapping[Binding, fx.Node]) -> fx.Node:
    """The placeholder of a weight or a literal."""
    binding = binding_of(place)
    return known.get(binding) or editor.placeholder(place.name, binding, place.meta["spec"])


def _pairs(one: fx.Node, other: Any) -> Iterable[tuple[str, str]]:
    """The names of the same memory: as a stage says it, and as the program does."""
    specs = one.meta.get("spec"), other.meta.get("spec") if isinstance(other, fx.Node) else None
    storages = [getattr(spec, "storage", None) for spec in specs]
    return [] if None in storages else [tuple(storages)]  # type: ignore[list-item]
