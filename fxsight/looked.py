"""Sizes that a body looks at: a program holds for these, and is free in the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import fx


def looked_dimensions(name: str, args: Any, kwargs: Any) -> tuple[int, ...] | None:
    """Which dimensions a question about a shape is about; None for all."""
    if name in ("dim", "element_size"):
        return ()
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    if name == "size" and type(given) is int:
        return (given,)
    return (0,) if name == "__len__" else None


def looked_sizes(node: fx.Node, dims: Collection[int]) -> tuple[int | None, ...]:
    """The sizes of a value that a body has looked at; None for the dimensions that it has not."""
    return tuple(size if dim in dims else None for dim, size in enumerate(node.meta["spec"].numbers))


def sizes_text(sizes: Sequence[int | None]) -> str:
    """Such sizes for messages: ``[any, 5]``."""
    return str(list(sizes)).replace("None", "any")
