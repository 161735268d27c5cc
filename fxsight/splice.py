"""The parts of an operator put in its place: nodes, result, and the calls of the formula in the address book.

All around stays as it is. The node of the operator keeps its name, its memory layout and, under ``was``, the call that
it was; so its addresses, and those of all other nodes, mean the same value before and after.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxsight.book import Call, Leaf, Opaque, Ref, SizeRef, Structure, Weight
from fxsight.clock import TAG
from fxsight.decompose import Parts, with_values
from fxsight.editor import Editor
from fxsight.example_sizes import size_number
from fxsight.node import Origin, binding_of, origin_of, spec_of_node, tensor_spec
from fxsight.spec import Dim, Spec, TensorSpec, contiguous_stride, parse_dims, spec_of, symbol
from fxsight.text import node_line
from fxsight.tree import flatten

_aten = torch.ops.aten


class Splice:
    """Puts the parts of an operator into its place.

    The node of the operator stays, as an alias of the result: it has the name that others know the value by. One that
    returns several values stays as it is, and its members become aliases. Times of what is inside are fractions between
    the one before the operator and its own.

    call: whose body the parts are; not yet in the book when its ``id`` is the next one.
    """

    def __init__(self, editor: Editor, node: fx.Node, call: Call, parts: Parts) -> None:
        self.editor, self.node, self.call, self.parts = editor, node, call, parts
        self.book = editor.program.book
        self.is_new = call.id == len(self.book.calls)
        self.was = node_line(node).partition(" = ")[2]
        self.origin = origin_of(node)
        self.inputs = tuple(node.all_input_nodes)
        pairs = [(key, n) for key, n in zip(parts.storages, self.inputs, strict=True) if key is not None]
        self.storages = {key: tensor_spec(n).storage for key, n in pairs}
        self.made: dict[fx.Node, fx.Node] = {}
        self.by_tag: dict[int, fx.Node] = {}
        clock = [self._tag(n)[0] for n in parts.graph.nodes] + [c.end for c in parts.calls]
        self._ticks = max(*clock, len(parts.graph.nodes)) + 4  # the last ones for the layout of the result
        self._begin = self._time_before()

    def splice(self) -> None:
        """Nodes, result, calls, and the conditions under which the parts are the operator."""
        places = [n for n in self.parts.graph.nodes if n.op == "placeholder"]
        for place, node in zip(places, self.inputs, strict=True):
            self._known(place, node)
        for number, node in enumerate(n for n in self.parts.graph.nodes if n.op == "call_function"):
            self._copy(node, number + 1)
        returned = with_values(self.parts.graph.output_node().args[0], self.made)
        self._return([r if isinstance(r, fx.Node) else None for r in flatten(returned)[0]])
        self._extend_book()
        if self.parts.conditions:
            self.editor.changes["guards"] = (*self.editor.program.guards, *self.parts.conditions)
        self.editor.touched = True

    # -- times -------------------------------------------------------------------------------------------------------

    def _time_before(self) -> float:
        """The last thing on the clock before the operator, at most half a tick away."""
        program, now = self.editor.program, self.origin.time
        times: list[float] = [origin_of(n).time for n in program.graph.nodes]
        times += [t for c in self.book.calls for t in (c.start, c.end)]
        return max((t for t in times if now - 0.5 < t < now), default=now - 0.5)

    def _time(self, tick: float) -> float:
        return self._begin + (self.origin.time - self._begin) * tick / self._ticks

    def _tag(self, node: fx.Node) -> tuple[int, int]:
        """When and in which call of the formula a node was made."""
        time, call = (node.meta.get("custom") or {}).get(TAG, (0, -1))
        return int(time), int(call)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _known(self, inner: fx.Node, outer: fx.Node) -> None:
        self.made[inner] = outer
        self.by_tag[self._tag(inner)[0]] = outer

    def _copy(self, node: fx.Node, number: int) -> None:
        tick, call = self._tag(node) if self.parts.calls else (number, 0)
        if node.target is _aten.alias.default and call == 0:  # the border of the formula
            return self._known(node, self.made[node.all_input_nodes[0]])
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.made.__getitem__)
        new = self._add(node.target, args, kwargs, node.name, tick, call)
        new.meta["spec"] = spec_of(node.meta.get("val"), self.parts.names, self.storages, new.name)
        self._known(node, new)

    def _add(self, target: Any, args: Any, kwargs: Any, name: str, tick: float, call: int = 0) -> fx.Node:
        line = self.parts.calls[call].line if call > 0 else self.origin.line
        origin = Origin(self._call_id(call), self._time(tick), line, self.origin.user, part_of=self.node.name)
        return self.editor.call(target, tuple(args), kwargs, spec=None, name=name, before=self.node, origin=origin)

    def _call_id(self, call: int) -> int:
        """The number in the book of a call of the formula; the formula itself is the body of ``call``."""
        return len(self.book.calls) + self.is_new + call - 1 if call > 0 else self.call.id

    # -- the result --------------------------------------------------------------------------------------------------

    def _return(self, results: list[fx.Node | None]) -> None:
        """The operator's node, or the members taken out of its result, become aliases of what was computed."""
        if isinstance(spec_of_node(self.node), TensorSpec):
            return self._become(self.node, results[0])
        for user in list(self.node.users):
            assert user.target is operator.getitem, f"{user.name} uses a tuple as a whole"
            self._become(user, results[int(user.args[1])])  # type: ignore[arg-type]
        self.node.meta["origin"] = replace(self.origin, was=self.was)

    def _become(self, node: fx.Node, result: fx.Node | None) -> None:
        """Let a node be an alias of the result, in the layout that its users were captured with."""
        assert result is not None, "what is used of an operator's result is a tensor"
        was = node_line(node).partition(" = ")[2]
        old, new = tensor_spec(node), tensor_spec(result)
        order = None if self._numbers(new.stride) == self._numbers(old.stride) else self._layout(old)
        if order is None:
            node.target, node.args, node.kwargs = _aten.alias.default, (result,), {}
        else:
            result = self._laid_out(result, new, order)
            back = [order.index(i) for i in range(len(order))]
            node.target, node.args, node.kwargs = _aten.permute.default, (result, back), {}
        node.meta["origin"] = replace(origin_of(node), made_by=self.editor.made_by, was=was)
        if old.storage.partition("[")[0] in (node.name, self.node.name):  # memory of its own: now the result's
            _rename_storage(self.editor.graph, old.storage, tensor_spec(result).storage)

    def _laid_out(self, result: fx.Node, spec: TensorSpec, order: list[int]) -> fx.Node:
        """A copy of the result whose dimensions are in the given order, contiguous."""
        shape, stride = tuple(spec.shape[i] for i in order), tuple(spec.stride[i] for i in order)
        turned = self._add(_aten.permute.default, (result, order), {}, "permute", self._ticks - 3)
        turned.meta["spec"] = replace(spec, shape=shape, stride=stride)
        kwargs = {"memory_format": torch.contiguous_format}
        copy = self._add(_aten.clone.default, (turned,), kwargs, "clone", self._ticks - 2)
        copy.meta["spec"] = replace(spec, shape=shape, stride=contiguous_stride(shape), storage=copy.name)
        return copy

    def _layout(self, spec: TensorSpec) -> list[int] | None:
        """The dimensions from the outermost in memory to the innermost; None when the memory has holes or overlaps."""
        shape, stride = self._numbers(spec.shape), self._numbers(spec.stride)
        order = sorted(range(len(shape)), key=lambda i: (stride[i], shape[i] > 1), reverse=True)
        dense = contiguous_stride([shape[i] for i in order])
        fits = all(shape[i] == 1 or stride[i] == step for i, step in zip(order, dense, strict=True))
        return order if fits else None

    def _numbers(self, dims: Sequence[Dim]) -> tuple[int, ...]:
        return tuple(size_number(d, self.parts.numbers) for d in dims)

    # -- the book ----------------------------------------------------------------------------------------------------

    def _extend_book(self) -> None:
        opened, inner = self.call, list[Call]()
        if self.parts.calls:
            formula, *inner = [c.close() for c in self.parts.calls]
            opened = replace(opened, body=formula.body, ran=formula.ran)
        made = (opened,) if self.is_new else ()
        kept = {} if self.is_new else {opened.id: opened}
        self.editor.changes["book"] = self.book.extended((*made, *map(self._moved, inner)), kept)

    def _moved(self, inner: Call) -> Call:
        changes: dict[str, Any] = {
            "id": self._call_id(inner.id),
            "parent": self._call_id(inner.parent or 0),
            "module": self.call.module,
            "module_call": self.call.module_call,
            "start": self._time(inner.start),
            "end": self._time(inner.end),
            "inputs": self._structure(inner.inputs),
            "output": self._structure(inner.output),
        }
        return replace(inner, **changes)

    def _structure(self, structure: Structure) -> Structure:
        return replace(structure, leaves=tuple(map(self._leaf, structure.leaves)))

    def _leaf(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, SizeRef):
            renamed = {symbol(str(inner)): name for inner, name in self.parts.names.items()}
            expr = parse_dims(leaf.expr)[0]
            return SizeRef(str(expr if isinstance(expr, int) else expr.xreplace(renamed)))
        if not isinstance(leaf, Ref):
            return leaf
        node = self.by_tag.get(int(leaf.node))
        if node is None:
            return Opaque("unused tensor")
        is_weight = node.op == "placeholder" and binding_of(node).kind == "weight"
        return Weight(str(binding_of(node).key)) if is_weight else Ref(node.name)


def _rename_storage(graph: fx.Graph, old: str, new: str) -> None:
    """What shared the memory of the operator's result shares that of the new one."""
    for node in graph.nodes:
        if "spec" in node.meta:
            node.meta["spec"] = _renamed(node.meta["spec"], old, new)


def _renamed(spec: Spec, old: str, new: str) -> Spec:
    if isinstance(spec, tuple):
        return tuple(_renamed(part, old, new) for part in spec)
    return replace(spec, storage=new) if isinstance(spec, TensorSpec) and spec.storage == old else spec
