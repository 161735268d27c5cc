"""Whose code a file holds, and the lines of code in which export made a node."""

from __future__ import annotations

import inspect
import os
import re
import sys
import sysconfig

import torch


class Libraries:
    """Tells the model's files from those of Python, torch and fxsight, and shortens paths."""

    def __init__(self) -> None:
        tools = ("torch", "sympy", "mpmath", "typing_extensions")  # torch computes sizes with sympy
        loaded = [inspect.getfile(sys.modules[name]) for name in tools if name in sys.modules]
        self._torch = tuple(file.removesuffix("__init__.py") for file in loaded)
        self._here = os.path.dirname(__file__) + os.sep
        self._python = tuple({sysconfig.get_path(p) for p in ("stdlib", "platstdlib")})

    def is_model_code(self, file: str) -> bool:
        """Whether a file can hold model code."""
        if file.startswith(("<frozen", "<string", *self._torch, self._here)):
            return False
        return "site-packages" in file or not file.startswith(self._python)

    def short(self, file: str) -> str:
        """The path below the folder it is imported from: the same on every machine."""
        if file.startswith(self._here):
            return "fxsight/" + file.removeprefix(self._here)
        folder = os.path.dirname(file)
        while os.path.exists(os.path.join(folder, "__init__.py")):
            folder = os.path.dirname(folder)
        return os.path.relpath(file, folder) if os.path.isabs(file) else file


def stack_lines(node: torch.fx.Node) -> list[tuple[str, int, str]]:
    """File, line number and code of each Python call in which export made a node, outermost first."""
    trace = str(node.meta.get("stack_trace") or "")
    found = re.finditer(r'^ *File "(.+)", line (\d+).*\n?(.*)', trace, re.MULTILINE)
    return [(match[1], int(match[2]), match[3].strip()) for match in found]
