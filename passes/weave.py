"""``Weave``: put what a body asked for into the program.

The body's nodes come into the graph, then each use of a value is settled (``loom``), and the saves are what the program
returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxsight.editor import Editor
from fxsight.effects import Cycle, order
from fxsight.errors import CausalityError
from fxsight.gradient import arrived, backward, gradient
from fxsight.intervention import Intervention, Read, Save
from fxsight.loom import Loom, with_own_memory
from fxsight.node import Binding, Fixed, Origin, binding_of
from fxsight.passes.cancel_stack import cancel_stacks
from fxsight.rewrite import Pass
from fxsight.tree import Tree


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
        left = Loom(editor, asked, body).weave(editor.program.book.left if self.keeps else ())
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
            own = with_own_memory(spec, node.name)
            made[node.name] = bound.get(binding) or editor.placeholder(node.name, binding, own)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: made[n.name])
            made[node.name] = editor.call(
                node.target, args, kwargs, spec=with_own_memory(spec, node.name), name=node.name, origin=origin
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
