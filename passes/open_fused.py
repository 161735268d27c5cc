"""``OpenFused``."""

from __future__ import annotations

from dataclasses import dataclass

from fxsight.editor import Editor
from fxsight.rewrite import Pass


@dataclass(frozen=True)
class OpenFused(Pass):
    """Open."""

    at: str = ""

    def rewrite(self, editor: Editor) -> None:
        """Open."""
