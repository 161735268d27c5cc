"""Reports as a page."""

from __future__ import annotations

from typing import Any


def table(reports: list[dict[str, Any]]) -> str:
    """The page."""
    return str(reports)
