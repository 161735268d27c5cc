"""What each use of a value gets, when the writes of a body are put in.

A value is a node at a time (see ``place``). Every use of a node by the model, and every read of the body, is a *site*
with a time of its own. Writes are put in one after the other in the order of their times: an assignment redirects the
sites of its location; an in-place write redirects every later site of the same memory, and where a true view of that
memory is used later, the memory itself is changed. In the end each site knows its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from fxsight.editor import Editor
from fxsight.effects import SAME, base_of, mutated_storages, storages
from fxsight.intervention import Intervention, Write
from fxsight.node import Origin, binding_of, origin_of
from fxsight.spec import TensorSpec, renamed

aten = torch.ops.aten


@dataclass(eq=False)
class Site:
    """One use: ``user`` uses ``source`` at ``time``; ``value`` is what it gets."""

    user: fx.Node
    source: fx.Node
    time: float
    value: fx.Node


class Loom:
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
        while node.op == "call_function" and node.target in SAME and node not in self.own:
            node = self._now(node, node.all_input_nodes[0])
        return node

    def _memory(self, node: fx.Node) -> fx.Node:
        """The node whose memory this is a view of, as things stand; itself when its memory is its own."""
        while True:
            base = base_of(node)
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
        copy.meta["spec"] = with_own_memory(value.meta["spec"], copy.name)
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


def with_own_memory(spec: Any, name: str) -> Any:
    """A body's value counts as memory of its own: nothing changes it in place."""
    if isinstance(spec, tuple):
        return tuple(with_own_memory(part, f"{name}[{i}]") for i, part in enumerate(spec))
    return replace(spec, storage=name) if isinstance(spec, TensorSpec) else spec
