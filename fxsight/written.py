"""A function that is written out for one shape of its arguments, so that calling it asks no questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def written(lines: Sequence[str], title: str, known: Mapping[str, Any]) -> Any:
    """The function of some lines of Python, the first of which is its ``def``.

    title: in tracebacks, in the place of a file.  known: what its names stand for.
    """
    names = dict(known)
    exec(compile("\n".join(lines), f"<{title}>", "exec"), names)
    return names[lines[0].removeprefix("def ").partition("(")[0]]
