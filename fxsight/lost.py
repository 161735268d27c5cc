"""What a body asks for and nothing can see: said in a warning at the user's line."""

from __future__ import annotations

import operator
import warnings

from torch import fx

from fxsight.arguments import QUIET
from fxsight.body import Body
from fxsight.errors import LostEditWarning
from fxsight.intervention import Intervention
from fxsight.mutate import mutate
from fxsight.node import origin_of
from fxsight.targets import target_name


def lost_edit(message: str, line: str) -> None:
    """Warn at a line."""
    file, _, number = line.rpartition(":")
    warnings.warn_explicit(f"{line}: {message}", LostEditWarning, file or "<body>", int(number or 0))


def stale_edit(address: object, line: str) -> None:
    """An in-place edit, at a line, of a value that its location has no longer."""
    lost_edit(
        f"this in-place edit changes a value read before {address} was written again; it has no effect on the model: "
        "read the location anew and edit that",
        line,
    )


def warn_of_lost_edits(body: Body, asked: Intervention) -> bool:
    """In-place edits of copies and of results that nothing uses afterwards.  Returns: whether there are any."""
    used, said = _names(body, asked), False
    for root in body.mutated:
        if not root.handles and not root.node.users and root.node.name not in used:
            said = True
            lost_edit(
                f"this in-place edit is of {root.what}, which nothing reads afterwards; it has no effect on the model: "
                "edit the output itself, or write the copy to it",
                origin_of(root.node).user,
            )
    return said


def warn_of_unused_results(body: Body, asked: Intervention) -> bool:
    """Values that were computed (``h = h * 0``) and that nothing uses.  Returns: whether there are any."""
    used, said = _names(body, asked), False
    for node in asked.graph.nodes:
        is_users = (
            node.op == "call_function" and node.target not in (mutate, operator.getitem) and QUIET not in node.meta
        )
        if is_users and not _is_used(node, used):
            said = True
            lost_edit(
                f"nothing uses the result of {target_name(node.target)}; it has no effect on the model: write it where "
                "it is to be (model.layer.output = ...), or keep it with .save()",
                origin_of(node).user,
            )
    return said


def _names(body: Body, asked: Intervention) -> set[str]:
    """Nodes whose values are written, saved or looked at."""
    used = {w.value for w in asked.writes} | {x for s in asked.saves for x in s.leaves if isinstance(x, str)}
    used |= {new for one in asked.backwards for _, new in one.edits}
    used |= {x for one in asked.backwards for _, _, found in one.functions for x in found if x is not None}
    used |= {seed for one in asked.backwards for seed in one.seeds if seed is not None}
    return used | {name for _, name in asked.updates} | {node.name for node in body.seen}


def _is_used(node: fx.Node, used: set[str]) -> bool:
    """Whether something takes the result, or a member of it."""
    return node.name in used or any(u.target is not operator.getitem or _is_used(u, used) for u in node.users)
