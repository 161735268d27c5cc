"""``JointGradient``: backward passes written out as plain operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxsight.arrange import arranged
from fxsight.editor import Editor
from fxsight.gradient import accumulate, backward
from fxsight.joint import Joint, trace_joint
from fxsight.node import Binding, Origin, origin_of
from fxsight.rewrite import Pass
from fxsight.spec import spec_of

_detach = torch.ops.aten.detach.default


@dataclass(frozen=True)
class JointGradient(Pass):
    """Write forward, losses and gradients out as one flat graph.

        mul = aten.mul.Tensor(x, w)                                   # f32[8]
        user_sum = torch.Tensor.sum(mul)                              # f32[]
        user_grad = gradient(x, 0, user_sum)                          # f32[8]
        backward = backward(0, (user_sum,), (None,), (), (), ...)     # none
        return (user_grad,)
    becomes
        mul = aten.mul.Tensor(x, w)                                   # f32[8]
        user_sum = aten.sum.default(mul)                              # f32[]
        backward = aten.ones_like.default(user_sum)                   # f32[]
        grad_user_sum = aten.expand.default(backward, [8])            # f32[8]
        grad_mul = aten.mul.Tensor(grad_user_sum, w)                  # f32[8]
        return (grad_mul,)

    The program is run once on shapes with autograd itself, hooks where a gradient is edited (``joint``), and what
    reaches ATen is the new program: the kernels and the order of additions are autograd's.
    sizes: an example of each free size; the sizes of the present inputs.  fixed: those that it holds for alone.
    shared: of bindings to one tensor, the first.

    Raises: CausalityError, TraceError for gradients that cannot be; RuntimeError as autograd does.
    """

    sizes: Mapping[str, int]
    fixed: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def label(self) -> str:
        """How many passes there are is what the nodes say."""
        return f"JointGradient({', '.join(f'{k}={v}' for k, v in self.sizes.items())})"

    def rewrite(self, editor: Editor) -> None:
        """Trace, and put the traced operators in the place of all others."""
        if any(n.target is backward for n in editor.graph.nodes):
            joint = trace_joint(editor.graph, self.sizes, self.fixed, self.shared, editor.program.book)
            _Writer(editor, joint).write(arranged(joint, self.sizes))


class _Writer:
    """Puts a joint graph into the place of a program's."""

    def __init__(self, editor: Editor, joint: Joint) -> None:
        self.editor, self.joint = editor, joint
        self.places: list[fx.Node] = []
        self.made: dict[fx.Node, fx.Node] = {}
        self.storages: dict[int, str] = {}
        self.time = 0.0

    def write(self, ordered: Sequence[fx.Node]) -> None:
        """Operators in this order, results, and the gradients that leaves get."""
        editor, joint = self.editor, self.joint
        lines = [origin_of(n) for n in editor.graph.nodes if n.target is backward]
        editor.restart()
        self.places = [n for n in editor.graph.nodes if n.op == "placeholder"]
        inner = [n for n in joint.graph.nodes if n.op == "placeholder"]
        for node, place in zip(inner, self.places, strict=True):
            self.made[node] = place
            spec_of(node.meta["val"], joint.names, self.storages, place.name)
        for node in ordered:
            if node.op == "get_attr" or "val" in node.meta:
                self._copy(node)  # a member that is None has no value
        results = [self.made[n] for n in joint.results]
        for (leaves, gradients), origin in zip(joint.leaves, lines, strict=True):
            if leaves:
                args = (tuple(editor.nodes[x.name] for x in leaves), tuple(self.made[g] for g in gradients))
                results.append(editor.call(accumulate, args, spec=None, name="accumulate", origin=self._now(origin)))
        known = editor.program.guards
        conditions = tuple(c for c in joint.conditions if c not in known)
        editor.returns(results, guards=(*known, *conditions))

    def _copy(self, node: fx.Node) -> None:
        if node.target is _detach:
            self.made[node] = self.made[node.all_input_nodes[0]]
            return
        if node.op == "get_attr":
            self.made[node] = self._literal(str(node.target))
            return
        source, is_backward = self.joint.origins[node]
        name = (
            f"grad_{source.name.removeprefix('grad_')}"
            if is_backward and source.target is not backward
            else source.name
        )
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.made.__getitem__)
        made = self.editor.call(node.target, args, kwargs, spec=None, name=name, origin=self._now(origin_of(source)))  # type: ignore[arg-type]
        made.meta["spec"] = spec_of(node.meta["val"], self.joint.names, self.storages, made.name)
        self.made[node] = made

    def _literal(self, name: str) -> fx.Node:
        """A number that autograd has written into a formula."""
        tensor = self.joint.constants[name].detach()
        literals: dict[str, Any] = self.editor.changes.setdefault("literals", dict(self.editor.program.literals))
        for key, known in literals.items():
            if known.dtype == tensor.dtype and known.shape == tensor.shape and torch.equal(known, tensor):
                place: fx.Node = next(n for n in self.places if n.meta["binding"] == Binding("literal", key))
                return place
        key = next(f"gradient_{i}" for i in range(10**6) if f"gradient_{i}" not in literals)
        literals[key] = tensor
        place = self.editor.placeholder(key, Binding("literal", key), spec_of(tensor, {}, {}, key))
        self.places.append(place)
        return place

    def _now(self, origin: Origin) -> Origin:
        """The origin, later than all before it: the order in which it was traced is that of its effects."""
        self.time = max(self.time + 2**-12, origin.time)
        return Origin(origin.call, self.time, origin.line, origin.user)
