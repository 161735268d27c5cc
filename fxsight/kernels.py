"""What Inductor makes of a plain graph, taken apart: the text of one function, and the kernels that it calls.

A compiled graph is a Python function that allocates memory and calls kernels, inside of what AOTAutograd puts around
it: for inputs that are changed, results that share memory with them, gradients. Where a graph has none of these, the
function is all there is to it. It then needs neither Inductor nor a compiler to be read: its text is run, and its
kernels are shared libraries that are loaded. That takes milliseconds instead of seconds, and each call has less to do.

    def call(args):
        s95, s72, arg2_1 = args
        buf0 = empty_strided_cpu((s95, s72), (s72, 1), torch.float32)
        cpp_fused_add_0(arg2_1, buf0, s95, s72)            # a shared library
        return (buf0, )
"""

from __future__ import annotations

import ast
import builtins
import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsight import _torch
from fxsight.folder import digest

_TEXT = "call.py"
_MADE = (1980, 1, 1, 0, 0, 0)  # the time of every member of an archive: equal parts are equal bytes


@dataclass(frozen=True)
class Parts:
    """text: of the function ``call``, of a list of arguments.  libraries: of each kernel in it, by name."""

    text: str
    libraries: Mapping[str, bytes]

    def to_bytes(self) -> bytes:
        """As one file."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in ((_TEXT, self.text.encode()), *self.libraries.items()):
                archive.writestr(zipfile.ZipInfo(name, _MADE), data, zipfile.ZIP_DEFLATED, 1)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Parts:
        """The inverse of ``to_bytes``.

        Raises: anything, for other bytes.
        """
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        return Parts(files.pop(_TEXT).decode(), files)


def take_apart(compiled: Any) -> Parts | None:
    """The parts of what ``_torch.compile_graph`` made; None where they would not be all of it."""
    found = _torch.plain_code(compiled)
    if found is None:
        return None
    source, kernels = found
    call = _call_of(ast.parse(source))
    if call is None or not _known(call, {*kernels, *_names()}):
        return None
    used = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
    libraries = {name: Path(file).read_bytes() for name, file in kernels.items() if name in used}
    return Parts(ast.unparse(call), libraries)


def put_together(parts: Parts) -> Callable[..., Sequence[Any]]:
    """The compiled graph again: a function of its inputs.

    Raises: anything, for libraries that this machine cannot load; it runs code in them.
    """
    names = _names()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, data in parts.libraries.items():
            path = Path(folder) / f"{name}.so"
            path.write_bytes(data)
            names[name] = _torch.load_kernel(f"fxsight_{digest(data)[:16]}", str(path))
    exec(compile(parts.text, "<compiled region>", "exec"), names)
    call: Callable[[list[Any]], Sequence[Any]] = names["call"]

    def run(*arguments: Any) -> Sequence[Any]:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return run(*arguments)
        if not torch.is_grad_enabled():
            return call(list(arguments))
        with torch.no_grad():
            return call(list(arguments))

    return run


def _names() -> dict[str, Any]:
    """What the function may call beside its kernels; its products of matrices are torch's own."""
    return {"torch": torch, "aten": torch.ops.aten, "extern_kernels": torch, **_torch.memory_functions()}


def _call_of(module: ast.Module) -> ast.FunctionDef | None:
    """The function of the arguments; None where there are several, which call one another."""
    found = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    if len(found) != 1:
        return None
    (call,) = found
    if [a.arg for a in call.args.args] == ["self", "args"]:
        del call.args.args[0]
    return call if [a.arg for a in call.args.args] == ["args"] else None


def _known(call: ast.FunctionDef, names: set[str]) -> bool:
    """Whether a function uses nothing but these names, torch's own functions and its variables."""
    given = {"args"} | {n.id for n in ast.walk(call) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    loaded = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)} - given
    inner = any(isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)) for n in ast.walk(call) if n is not call)
    all_known = all(name in names or hasattr(builtins, name) for name in loaded)
    return not inner and all_known and all(map(_is_own, _ways(call)))


def _ways(call: ast.FunctionDef) -> Iterator[str]:
    """The dotted names in a function: ``torch.ops.aten.mm.default``."""
    for node in ast.walk(call):
        if isinstance(node, ast.Attribute):
            steps: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                steps.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([inner.id, *reversed(steps)])


def _is_own(way: str) -> bool:
    """Whether a dotted name means the same here as in Inductor's module: ATen's operators, torch's public names."""
    root, *steps = way.split(".")
    if root == "torch":
        return not steps[0].startswith("_") and (steps[0] != "ops" or len(steps) < 2 or steps[1] == "aten")
    return root != "extern_kernels" or (len(steps) == 1 and _torch.is_own_kernel(steps[0]))
