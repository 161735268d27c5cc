"""``Weave``: put what a body asked for into the program.

A value is a node at a time (see ``place``). Every use of a node by the model, and every read of the body, is a *site*
with a time of its own. Writes are put in one after the other in the order of their times: an assignment redirects the
sites of its location; an in-place write redirects every later site of the same memory, and where a true view of that
memory is used later, the memory itself is changed. In the end each site knows its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from fxsight.editor import Editor
from fxsight.effects import Cycle, mutated_storages, order, storages
from fxsight.errors import CausalityError
from fxsight.gradient import arrived, backward, gradient
from fxsight.intervention import Intervention, Read, Save, Write
from fxsight.node import Binding, Fixed, Origin, binding_of, origin_of
from fxsight.passes.cancel_stack import cancel_stacks
from fxsight.rewrite import Pass
from fxsight.spec import TensorSpec, renamed
from fxsight.tree import Tree

aten = torch.ops.aten
_SAME = (aten.alias.default, aten.detach.default)  # the same memory, seen the same way


@dataclass(frozen=True)
class Weave(Pass):
    """Put one intervention into the program; return its saves instead of the model's output.

        alias_9 = aten.alias.default(view_7)             # f32[batch, length, 64]  h.0.mlp
        add_4 = aten.add.Tensor(alias_5, alias_9)        # f32[batch, length, 64]  h.0
    with ``h.0.mlp:output <- user_mul`` becomes
        alias_9 = aten.alias.default(view_7)             # f32[batch, length, 64]  h.0.mlp
        user_mul = torch.Tensor.mul(alias_9, 0.5)        # f32[1, 7, 64]
        add_4 = aten.add.Tensor(alias_5, user_mul)       # f32[batch, length, 64]  h.0

    intervention: recorded on this program.
    keeps: whether the caches that the forward is given are returned after the saves and updates, as it leaves them.

    Raises: CausalityError when a written value depends, through the model, on the place it is written to.
    """

    intervention: Intervention = field(repr=False)
    keeps: bool = False

    @property
    def label(self) -> str:
        """Counts only: the nodes say the rest."""
        asked = self.intervention
        return f"Weave(reads={len(asked.reads)}, writes={len(asked.writes)}, saves={len(asked.saves)})"

    def rewrite(self, editor: Editor) -> None:
        """Inline the body, settle every site, return the saves."""
        asked = self.intervention
        body = _inline(editor, asked)
        left = _Loom(editor, asked, body).weave(editor.program.book.left if self.keeps else ())
        tree, leaves, nodes = _results(asked.saves, body)
        nodes += [body[value] for _, value in asked.updates]
        nodes += _backwards(editor, asked, body)
        nodes += left
        editor.returns(nodes, outputs=tree, output_leaves=leaves)
        _settle_reads(editor, body, asked.reads)
        cancel_stacks(editor)
        _check_order(editor, asked)


def _inline(editor: Editor, asked: Intervention) -> dict[str, fx.Node]:
    """The body's nodes in the editor's graph; reads are placeholders for now."""
    constants = {name: i for i, (name, _) in enumerate(asked.constants)}
    weights = dict(asked.weights)
    bound = {binding_of(n): n for n in editor.graph.nodes if n.op == "placeholder"}
    made: dict[str, fx.Node] = {}
    for node in asked.graph.nodes:
        spec, origin = node.meta["spec"], node.meta["origin"]
        if node.op == "placeholder":
            key = weights.get(node.name)
            binding = Binding("weight", key) if key else Binding("constant", constants.get(node.name, -1))
            made[node.name] = bound.get(binding) or editor.placeholder(node.name, binding, _own(spec, node.name))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: made[n.name])
            made[node.name] = editor.call(
                node.target, args, kwargs, spec=_own(spec, node.name), name=node.name, origin=origin
            )
    return made


def _backwards(editor: Editor, asked: Intervention, body: Mapping[str, fx.Node]) -> list[fx.Node]:
    """A node for each backward pass; gradients come after the losses they are of."""
    wanted: set[int] = set()
    for node in body.values():
        count = 2 if node.target is gradient else 3
        if node.target in (gradient, arrived) and 0 <= int(node.args[count - 1]) < len(asked.backwards):  # type: ignore[arg-type]
            wanted.add(int(node.args[count - 1]))  # type: ignore[arg-type]
            losses: Any = asked.backwards[int(node.args[count - 1])].losses  # type: ignore[arg-type]
            node.args = (*node.args[:count], *(body[loss] for loss in losses))
    learned = tuple(n for n in editor.graph.nodes if n.op == "placeholder" and str(binding_of(n)) in asked.learned)
    marked = tuple(body[name] for name in asked.marked)
    made: list[fx.Node] = []
    for number, one in enumerate(asked.backwards):
        losses, seeds = tuple(body[x] for x in one.losses), tuple(body[x] if x else None for x in one.seeds)
        edits = tuple((body[arrives], body[new]) for arrives, new in one.edits)
        leaves = None if one.leaves is None else tuple(body[x] for x in one.leaves)
        # A gradient that nothing uses may be dropped before it is written out.
        flags = (one.retain, one.create, one.unused, *(["wanted"] if number in wanted else []))
        functions = tuple(_named(body, x) for x in one.functions)
        args = (number, losses, seeds, edits, leaves, flags, learned, marked, functions)
        made.append(editor.call(backward, args, spec=None, name="backward", origin=Origin(user=one.line)))
    return made


def _named(body: Mapping[str, fx.Node], names: Any) -> Any:
    """Nodes by their names, in tuples."""
    return tuple(_named(body, x) for x in names) if isinstance(names, tuple) else names and body[names]


def _own(spec: Any, name: str) -> Any:
    """A body's value counts as memory of its own: nothing changes it in place."""
    if isinstance(spec, tuple):
        return tuple(_own(part, f"{name}[{i}]") for i, part in enumerate(spec))
    return replace(spec, storage=name) if isinstance(spec, TensorSpec) else spec


def _results(
    saves: tuple[Save, ...], body: Mapping[str, fx.Node]
) -> tuple[Tree, tuple[Fixed | None, ...], list[fx.Node]]:
    tree = Tree("tuple", "", tuple(range(len(saves))), tuple(save.tree for save in saves))
    leaves = [leaf for save in saves for leaf in save.leaves]
    return (
        tree,
        tuple(x if isinstance(x, Fixed) else None for x in leaves),
        [body[x] for x in leaves if isinstance(x, str)],
    )


def _settle_reads(editor: Editor, body: Mapping[str, fx.Node], reads: tuple[Read, ...]) -> None:
    """Each read's placeholder has been given its value in ``meta``; use that and drop the placeholder."""
    values = {body[read.name]: body[read.name].meta["value"] for read in reads}
    for read in reads:  # a gradient is of what the model has, not of a copy of it
        live = body[read.name].meta["live"]
        editor.replace(body[read.name], live, [n for n in body[read.name].users if n.target is gradient])

    def settled(node: fx.Node) -> fx.Node:
        while node in values:
            node = values[node]
        return node

    for read in reads:
        editor.replace(body[read.name], settled(body[read.name]))
        editor.erase(body[read.name])


@dataclass(eq=False)
class Site:
    """One use: ``user`` uses ``source`` at ``time``; ``value`` is what it gets."""

    user: fx.Node
    source: fx.Node
    time: float
    value: fx.Node


class _Loom:
    """Settles the sites of one program."""

    def __init__(self, editor: Editor, asked: Intervention, body: Mapping[str, fx.Node]) -> None:
        self.editor, self.asked, self.body = editor, asked, body
        self.own = {n for n in body.values() if n.op != "placeholder" or binding_of(n).kind == "constant"}
        self.model = [n for n in editor.graph.nodes if n not in self.own]
        self.sites: list[Site] = []
        self.uses: dict[tuple[fx.Node, fx.Node], Site] = {}
        self.by_source: dict[fx.Node, list[Site]] = {}
        self.changed = set(mutated_storages(self.model))
        self.waiting: list[tuple[Write, Site]] = []  # in-place writes that are still to come

    def weave(self, left: Sequence[str]) -> list[fx.Node]:
        """Put all writes in, then redirect the uses.  Returns: what some nodes are in the end."""
        self._find_sites()
        last = [self._add_site(self.editor.output, self._node(name), float("inf")) for name in left]
        reads = [
            self._add_site(self.body[r.name], self._node(r.location.node), r.location.since) for r in self.asked.reads
        ]
        writes = [
            (w, self._add_site(self.editor.output, self._node(w.location.node), w.location.since))
            for w in self.asked.writes
        ]
        for write, here in sorted(writes, key=lambda pair: (pair[0].location.since, not pair[0].in_place)):
            self.waiting = [(w, h) for w, h in writes if w.in_place and w.location.since > write.location.since]
            (self._in_place if write.in_place else self._assign)(write, here)
        for site in reads:
            site.user.meta.update(value=self._snapshot(site), live=site.value)
        self._redirect({site for _, site in writes} | set(reads) | set(last))
        return [site.value for site in last]

    # -- sites -------------------------------------------------------------------------------------------------------

    def _find_sites(self) -> None:
        for user in self.model:
            time = float("inf") if user.op == "output" else float(origin_of(user).time)
            for source in user.all_input_nodes:
                site = self._add_site(user, source, time)
                self.uses[user, source] = site

    def _add_site(self, user: fx.Node, source: fx.Node, time: float) -> Site:
        site = Site(user, source, time, source)
        self.sites.append(site)
        self.by_source.setdefault(source, []).append(site)
        return site

    def _node(self, name: str) -> fx.Node:
        return self.editor.nodes[name]

    def _now(self, user: fx.Node, source: fx.Node) -> fx.Node:
        """What ``user`` gets for ``source`` as things stand."""
        site = self.uses.get((user, source))
        return source if site is None else site.value

    def _same(self, node: fx.Node) -> fx.Node:
        """The first node that is the same memory seen the same way."""
        while node.op == "call_function" and node.target in _SAME and node not in self.own:
            node = self._now(node, node.all_input_nodes[0])
        return node

    def _memory(self, node: fx.Node) -> fx.Node:
        """The node whose memory this is a view of, as things stand; itself when its memory is its own."""
        while True:
            mine = storages(node)
            base = next((a for a in node.all_input_nodes if storages(a) & mine and node.name not in mine), None)
            if base is None or node in self.own:
                return node
            node = self._now(node, base)

    # -- writes ------------------------------------------------------------------------------------------------------

    def _assign(self, write: Write, here: Site) -> None:
        value = self._value(write, self._memory(here.value))
        for site in self.by_source[here.source]:
            if write.location.since < site.time <= write.location.until:
                site.value = value

    def _in_place(self, write: Write, here: Site) -> None:
        same, memory = self._same(here.value), self._memory(here.value)
        value = self._value(write, memory)
        later = [s for s in self.sites if s.time > write.location.since and s is not here]
        alike = {s: s.value for s in later if self._is_before(s.value, write) and self._same(s.value) is same}
        for site in alike:
            site.value = value
        if not any(self._memory(s.value) is memory for s in later):
            return
        again = any(storages(site.source) & storages(here.source) for _, site in self.waiting)
        if again or self._is_changed(memory):  # views and all else that shares the memory must go on sharing it
            for site, before in alike.items():
                site.value = before
        self._change_memory(memory, here, value, write)

    def _is_before(self, node: fx.Node, write: Write) -> bool:
        """Whether the node is there before the write: later ones get the written value through their own inputs."""
        return node in self.own or node.op == "placeholder" or origin_of(node).time <= write.location.since

    def _value(self, write: Write, memory: fx.Node) -> fx.Node:
        """The written value; a copy of its own where the model goes on to change that memory in place."""
        value = self.body[write.value]
        if not self._is_changed(memory):
            return value
        copy = self._copy(value, "copy", Origin(user=write.line))
        self.changed |= storages(copy)
        return copy

    def _is_changed(self, memory: fx.Node) -> bool:
        """Whether it is changed in place; of several tensors in one value, whether one of them is."""
        return not storages(memory).isdisjoint(self.changed)

    def _change_memory(self, memory: fx.Node, here: Site, value: fx.Node, write: Write) -> None:
        """Views of the memory are used later: change it, as the same statement on the tensor would."""
        self.changed |= storages(memory)
        if memory.op == "placeholder" or memory in self.own:  # never a weight, an input, a value the user holds
            copy = self._copy(memory, "copy", Origin(user=write.line))
            copy.meta["spec"] = memory.meta["spec"]  # it stands for that memory from the start, views included
            for site in [s for s in self.sites if s.value is memory]:
                site.value = copy
        origin = Origin(origin_of(here.source).call, write.location.since + 0.4, "", write.line)
        spec = here.value.meta["spec"]
        self.editor.call(aten.copy_.default, (here.value, value), spec=spec, name="change", origin=origin)

    def _copy(self, value: fx.Node, name: str, origin: Origin) -> fx.Node:
        copy = self.editor.call(aten.clone.default, (value,), spec=value.meta["spec"], name=name, origin=origin)
        copy.meta["spec"] = _own(value.meta["spec"], copy.name)
        return copy

    def _snapshot(self, site: Site) -> fx.Node:
        """What a read gets: a copy when the memory is changed later."""
        memory = self._memory(site.value)
        if not self._is_changed(memory) or not isinstance(site.value.meta["spec"], TensorSpec):
            return site.value
        return self._copy(
            site.value, "snapshot", Origin(origin_of(site.source).call, site.time + 0.25, origin_of(site.source).line)
        )

    # -- the result --------------------------------------------------------------------------------------------------

    def _redirect(self, not_uses: set[Site]) -> None:
        changes: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
        for site in self.sites:
            if site.value is not site.source and site not in not_uses:
                changes.setdefault(site.user, {})[site.source] = site.value
        for user, values in changes.items():
            moved = partial(_moved, values)
            user.args, user.kwargs = fx.map_arg(user.args, moved), fx.map_arg(user.kwargs, moved)
        self._share(changes)

    def _share(self, changes: Mapping[fx.Node, Mapping[fx.Node, fx.Node]]) -> None:
        """Views of what is another value now share its memory."""
        before = {node: storages(node) for node in self.model}
        for node in self.model:
            new = changes.get(node, {})
            old = {value: source for source, value in new.items()}
            for value in node.all_input_nodes:
                was, now = before.get(old.get(value, value), frozenset()), storages(value)
                if len(was) == len(now) == 1 and was != now and was <= before[node]:
                    node.meta["spec"] = renamed(node.meta["spec"], dict(zip(was, now, strict=True)))


def _moved(values: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return values.get(node, node)


def _check_order(editor: Editor, asked: Intervention) -> None:
    try:
        order(editor.graph.nodes)
    except Cycle as cycle:
        raise _causality_error(asked, {n.name for n in cycle.nodes}) from None


def _causality_error(asked: Intervention, stuck: set[str]) -> CausalityError:
    """The error for a body whose values need each other: which write, and through which reads."""
    if not asked.writes:
        return CausalityError(f"{asked.backwards[-1].line}: the loss depends on its own gradients")
    write = next((w for w in reversed(asked.writes) if w.value in stuck), asked.writes[-1])
    needed, nodes = {write.value}, list(asked.graph.nodes)
    for node in reversed(nodes):
        needed |= {a.name for a in node.all_input_nodes} if node.name in needed else set()
    later = [r.location for r in asked.reads if r.name in needed and r.location.since > write.location.since]
    through = " -> ".join(
        [str(write.location.address), *(str(r.address) for r in sorted(later, key=lambda r: r.since))]
    )
    return CausalityError(
        f"{write.line}: what is written to {write.location.address} depends on what lies downstream of it:\n"
        f"  {through} -> {write.location.address}\n"
        "  read it in a first trace and write it in a second: with model.session(): with model.trace(x): v = ...save()"
    )
