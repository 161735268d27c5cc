"""Captured programs on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fxsight.program import Program


class Store:
    """Captured programs in the cache folder."""

    def programs(self, module: nn.Module, key: Any) -> Iterator[Program]:
        yield from ()

    def keep(self, module: nn.Module, key: Any, program: Program) -> None:
        pass
