"""The caches that a call is given end as the module would leave them: the same objects, grown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxsight.book import Const, Ref, SizeRef
from fxsight.errors import TraceError
from fxsight.past import pasts_in, restore
from fxsight.program import Program
from fxsight.sizes import bind_sizes
from fxsight.spec import number, parse_dims


def leave_pasts(program: Program, call: Any, leaves: Sequence[Any], left: Sequence[torch.Tensor]) -> None:
    """Let the caches among the arguments of a call be as the program says.

    leaves: of the call.  left: the tensors in the caches afterwards (``Book.left``).
    """
    for past, now in zip(pasts_in(call), pasts_after(program, leaves, left), strict=True):
        restore(past, now)


def pasts_after(program: Program, leaves: Sequence[Any], left: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The caches that a call is given, as it leaves them."""
    after, tensors = program.book.after, iter(left)
    assert after is not None
    sizes = None
    members: list[Any] = []
    for leaf in after.leaves:
        if isinstance(leaf, SizeRef) and sizes is None:
            sizes = bind_sizes(program, leaves)
        match leaf:
            case Ref():
                members.append(next(tensors))
            case Const(value):
                members.append(value)
            case SizeRef(expr):
                members.append(number(parse_dims(expr)[0], sizes or {}))
            case _:
                raise TraceError(f"the forward leaves {leaf} in a cache, and a program cannot make that")
    found: tuple[Any, ...] = after.tree.build(members)
    return found
