"""A function that is written out for one shape of its arguments, so that calling it asks no questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any


def written(lines: Sequence[str], title: str, known: Mapping[str, Any]) -> Any:
    """The function of some lines of Python, the first of which is its ``def``.

    title: in tracebacks, in the place of a file.  known: what its names stand for.
    """
    names = dict(known)
    exec(compile("\n".join(lines), f"<{title}>", "exec"), names)
    return names[lines[0].removeprefix("def ").partition("(")[0]]


def titled(function: Callable[..., Any], title: str) -> Callable[..., Any]:
    """A function that has been written out, under another title."""
    assert isinstance(function, FunctionType)
    code: CodeType = function.__code__
    return FunctionType(code.replace(co_filename=f"<{title}>"), function.__globals__, function.__name__)
