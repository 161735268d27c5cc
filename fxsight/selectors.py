"""Many places with one expression: ``model.select("class:Linear and path:h.*.mlp.* and not layer:0")``.

    class:GPT2Block, class:*Attention    modules of a class, or of one derived from it
    path:transformer.h.*.mlp             modules whose path fits; ``*`` is within a part, ``**`` across parts
    layer:3, layer:0,4-7                 modules in the blocks of these numbers: the first number in their paths
    op:relu, op:aten.softmax.*           operations by what they call, or by an operator that this made

A text has ``and``, ``or``, ``not`` and parentheses (see ``selector_text``). The same in Python is combined with ``&``,
``|`` and ``~``: ``of(nn.Linear) & path("h.*.mlp.*") & ~layers(0)``, and ``calls(torch.relu)``. ``str`` of a selector is
its text. Of an operation, class, path and layer are those of the module in whose forward it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fxsight import _torch
from fxsight.conditions import Calls, Candidate, Layers, Of, PathPattern, Selector, selector_of
from fxsight.errors import SelectionError
from fxsight.targets import target_name

MOST = 100_000  # blocks are numbered below it


def of(cls: type[nn.Module] | str) -> Selector:
    """Modules of a class, given as itself or by a pattern of its name, or of one derived from it.

    Raises: SelectionError for anything else.
    """
    given: Any = cls
    if not isinstance(given, str) and not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise SelectionError(f"of({cls!r}): give a class of modules, or its name")
    return Of(cls)


def path(pattern: str) -> Selector:
    """Modules by path: ``*`` stands for anything within one part of it, ``**`` for any parts.

    Raises: SelectionError for what is no text.
    """
    given: Any = pattern
    if not isinstance(given, str):
        raise SelectionError(f"path({pattern!r}): give a pattern, such as 'h.*.mlp'")
    return PathPattern(pattern)


def layers(*numbers: int | Iterable[int]) -> Selector:
    """The blocks of these numbers and what is in them; the number of a place is the first in its path.

    Raises: SelectionError for none, and for what is no number of a block.
    """
    found: set[int] = set()
    for each in numbers:
        for number in [each] if isinstance(each, int) else each:
            given: Any = number
            if type(given) is not int or not 0 <= given < MOST:
                raise SelectionError(f"layers{numbers!r}: give numbers of blocks, 0 to {MOST - 1}, not {number!r}")
            found.add(given)
    if not found:
        raise SelectionError(f"layers{numbers!r}: give numbers of blocks, from 0: layers(3) or layers(range(4, 8))")
    return Layers(frozenset(found))


def calls(target: str | Callable[..., Any]) -> Selector:
    """Operations that call a function, operator or module class, given as itself or by a pattern of its name.

    Raises: SelectionError for anything else.
    """
    if isinstance(target, str):
        return Calls(target)
    name = target_name(target) if isinstance(target, _torch.OpOverload) else getattr(target, "__name__", None)
    if not isinstance(name, str):
        raise SelectionError(f"calls({target!r}): give a function, or a pattern such as 'relu'")
    return Calls(name.strip("_"))


def chosen(selector: Selector | str, candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that a selector selects, in order.

    Raises: SelectionError when there are none, with what comes nearest.
    """
    known, wanted = list(candidates), selector_of(selector)
    found = [at for at in known if wanted.holds(at)]
    if not found:
        raise SelectionError(f"{wanted} selects nothing; {wanted.nearest(known)}")
    return found
