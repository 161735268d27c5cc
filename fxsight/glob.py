"""Patterns of dotted names: ``*`` is anything within one part, ``**`` anything, ``?`` one character of a part.

A pattern is tried in one go over the name, in time that grows with their lengths alone: a set of places in the pattern
is a number, one bit for each.
"""

from __future__ import annotations

import re


def fits(pattern: str, name: str) -> bool:
    """Whether the whole name fits the pattern."""
    parts = _parts(pattern)
    stars = sum(1 << i for i, part in enumerate(parts) if part in ("*", "**"))
    at = _past_stars(1, stars)
    for character in name:
        stay = step = 0
        for i, part in enumerate(parts):
            if part == "**" or (part == "*" and character != "."):
                stay |= 1 << i
            elif part == character or (part == "?" and character != "."):
                step |= 1 << i
        at = _past_stars((at & stay) | (at & step) << 1, stars)
        if not at:
            return False
    return bool(at >> len(parts) & 1)


def _parts(pattern: str) -> list[str]:
    """Characters and stars, no two stars side by side."""
    runs = re.findall(r"\*+|[^*]", pattern, re.DOTALL)
    return ["**" if len(run) > 1 else run for run in runs]


def _past_stars(at: int, stars: int) -> int:
    """A star may stand for nothing."""
    return at | (at & stars) << 1
