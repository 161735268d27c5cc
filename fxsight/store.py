"""Captured programs on disk, so that what one process has captured the next one reads.

    FXSIGHT_CACHE_DIR, else the platform's cache folder
    └── 5d3c…-91ab….zip      identity, content; one program: entry.json, program.txt, book.json, bytes of its literals

A file is data only: the program's text, its address book, the bytes of its literals; nothing in it is executed, and
nothing is pickled. ``identity.py`` says for which module and inputs it holds; what has no identity is captured anew in
each process. Files appear whole (``os.replace``), so that processes may share a folder; one that cannot be read is
removed; a folder that cannot be written costs a warning.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxsight.book import Book, Call, CustomFunction, Structure
from fxsight.errors import FxsightError
from fxsight.folder import LIMIT, Folder, cache_folder, remove
from fxsight.identity import Local, check_current, contents, file_hash, identity, layout, library_versions
from fxsight.parse import parse_program
from fxsight.program import Program

FORMAT = 2
_TORCH = os.path.dirname(torch.__file__) + os.sep


class Store:
    """Captured programs in a cache folder.

    folder: see ``cache_folder``.  limit: bytes kept.  versions: instead of those of the libraries loaded here.
    """

    def __init__(
        self, folder: Path | None = None, limit: int = LIMIT, versions: Mapping[str, str] | None = None
    ) -> None:
        self.folder = cache_folder() if folder is None else folder
        self._files = Folder(self.folder, ".zip", "captured programs", limit)
        self._versions = versions
        self._asked: dict[Any, str | None] = {}

    def programs(self, module: nn.Module, key: Any) -> Iterator[Program]:
        """The programs kept for a signature (``Captures.find``), last used first."""
        name = self._asked[key] = identity(module, key, self._versions or library_versions())
        for path, data in () if name is None else self._files.read(name):
            try:
                program = decode(data, str(name))
            except Exception:  # whatever a foreign file makes zipfile, json, torch or the parser raise
                remove(path)
                continue
            self._files.used(path)
            yield program

    def keep(self, module: nn.Module, key: Any, program: Program) -> None:
        """Keep a program under the identity its module had before it was captured: capturing may change a module.

        Nothing is kept, without a word, of what could not be read back; a folder that cannot be written warns once.
        """
        if key not in self._asked:
            self._asked[key] = identity(module, key, self._versions or library_versions())
        name = self._asked[key]
        try:
            data = None if name is None else encode(program, name)
        except (Local, FxsightError, TypeError, ValueError):
            return
        if name is not None and data is not None:
            self._files.write(name, data)


# ------------------------------------------------------------------------------------------------------ one file


def encode(program: Program, name: str, of_code: bool = True) -> bytes:
    """The file of a program that holds for the identity ``name``.

    of_code: whether it holds for the model's code as it is now, and for no other.

    Raises: TextError, TypeError, ValueError, or an error of ours, for what cannot be read back.
    """
    sources = {os.path.abspath(call.body[0]) for call in program.book.calls if call.body}
    sources = {file for file in sources if of_code and not file.startswith(_TORCH)}
    check_current(program.book, sources)
    if of_code:
        _check_own_literals(program)
    entry = {
        "format": FORMAT,
        "identity": name,
        "sources": {file: file_hash(file) for file in sorted(sources)},
        "literals": {key: layout(tensor) for key, tensor in program.literals.items()},
        "names": None if program.book.names is None else sorted(program.book.names),
        "functions": [vars(function) for function in program.book.functions],
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_member("entry.json"), json.dumps(entry))
        archive.writestr(_member("program.txt"), program.text)
        archive.writestr(_member("book.json"), json.dumps([call.to_json() for call in program.book.calls]))
        if program.book.after is not None:
            archive.writestr(_member("after.json"), json.dumps(program.book.after.to_json()))
        for key, tensor in program.literals.items():
            archive.writestr(_member(f"literals/{key}"), contents(tensor))
    return buffer.getvalue()


def decode(data: bytes, name: str) -> Program:
    """The program in a file.

    Raises: anything, when the file is damaged, foreign, or of code that has changed.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = json.loads(archive.read("entry.json"))
        if entry["format"] != FORMAT or entry["identity"] != name:
            raise ValueError("the file of another program")
        if any(file_hash(file) != was for file, was in entry["sources"].items()):
            raise ValueError("the model's code has changed")
        names = None if entry["names"] is None else frozenset(entry["names"])
        after = (
            Structure.from_json(json.loads(archive.read("after.json"))) if "after.json" in archive.namelist() else None
        )
        functions = tuple(CustomFunction(**each) for each in entry["functions"])
        book = Book(tuple(map(Call.from_json, json.loads(archive.read("book.json")))), names, after, functions)
        layouts = entry["literals"].items()
        literals = {key: _tensor(archive.read(f"literals/{key}"), like) for key, like in layouts}
        return parse_program(archive.read("program.txt").decode(), book, literals)


def _member(name: str) -> zipfile.ZipInfo:
    """Without the time: equal programs are equal files."""
    member = zipfile.ZipInfo(name)
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


def _check_own_literals(program: Program) -> None:
    """That the forward made each literal: ``torch.tensor`` leaves these operators, a tensor someone holds does not."""
    made = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default)
    literals = [program.nodes[name] for name, binding in program.bindings.items() if binding.kind == "literal"]
    for node in literals:
        if any(user.target not in made for user in node.users):
            raise Local(f"{node.name} is a tensor made outside the forward")


def _tensor(data: bytes, like: Mapping[str, Any]) -> torch.Tensor:
    """The inverse of ``contents`` and ``layout``; no two elements of a literal share memory."""
    dtype = getattr(torch, like["dtype"])
    plain = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    result = torch.empty_strided(like["shape"], like["stride"], dtype=dtype, device=like["device"])
    return result if result.is_meta else result.copy_(plain.view(like["shape"]))
