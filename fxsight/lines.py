"""The user's line, for messages only: nothing depends on it."""

from __future__ import annotations

import inspect
import os
from types import FrameType

import torch

_OURS = os.path.dirname(__file__) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep


def user_line() -> str:
    """``file:line`` of the innermost frame outside fxsight and torch; empty when there is none."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith((_OURS, _TORCH)):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
