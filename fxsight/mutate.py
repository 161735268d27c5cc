"""In-place operations as values: ``mutate`` is the function that an in-place call is.

    h[:, 0].mul_(2)
is recorded as
    h_1 = mutate(h, ((getitem, (SELF, (slice(None), 0)), {}),), mul_, (SELF, 2), {})

and means: a copy of ``h``, on which the views are taken and the call is made. ``expand_mutations`` turns it into plain
nodes (clone, views, call) once the program is final, and leaves out the clone where nobody else sees the memory.
"""

from __future__ import annotations

from typing import Any

import torch

from fxsight.functions import find_function
from fxsight.tree import map_leaves

SELF = "%self"  # stands for the value being viewed or changed in the arguments of ``mutate``

ViewStep = tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]


def mutate(base: torch.Tensor, views: tuple[ViewStep, ...], target: str, args: Any, kwargs: Any) -> torch.Tensor:
    """A copy of ``base`` after ``target(*args, **kwargs)`` has changed a view of it.

    views: from the base to the tensor that changes: (function, args, kwargs, way to the member of its result).
    Returns: a tensor of the shape, strides, dtype and device of ``base``.
    """
    result = base.clone()
    find_function(target)(*fill(args, view(result, views)), **fill(kwargs, view(result, views)))
    return result


def view(base: Any, views: tuple[ViewStep, ...]) -> Any:
    """The view of ``base`` that the steps lead to."""
    for name, args, kwargs, path in views:
        base = find_function(name)(*fill(args, base), **fill(kwargs, base))
        for key in path:
            base = base[key]
    return base


def fill(arguments: Any, value: Any) -> Any:
    """The arguments with ``value`` where ``SELF`` stands."""
    return map_leaves(lambda leaf: value if isinstance(leaf, str) and leaf == SELF else leaf, arguments)
