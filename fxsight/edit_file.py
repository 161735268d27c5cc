"""Files of edits: a readable JSON file, and beside it a safetensors file with the tensors. Nothing in them is executed.

steer.json          {"format": "fxsight edits", "version": 1, "edits": [{"body": [...], "writes": [...]}], ...}
steer.safetensors   the tensors by name; the JSON file has its SHA-256
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import torch

from fxsight.edit import Edit
from fxsight.edit_text import edits_data, edits_of
from fxsight.errors import EditFileError
from fxsight.folder import digest
from fxsight.identity import library_versions
from fxsight.version import __version__

FORMAT, VERSION = "fxsight edits", 1
_FIELDS: frozenset[str] = frozenset(("format", "version", "model", "made_by", "tensors", "edits"))


def edits_folder() -> Path:
    """``FXSIGHT_EDITS_DIR``, else the platform's folder for data (``~/.local/share/fxsight/edits`` on Linux)."""
    default = Path(platformdirs.user_data_dir("fxsight", appauthor=False)) / "edits"
    return Path(os.environ.get("FXSIGHT_EDITS_DIR") or default)


def export_path(name: str, folder: str | Path | None, variant: str) -> Path:
    """Where the edits of a name and a variant are kept.

    Raises: EditFileError for what cannot be a file's name.
    """
    for part in (name, variant):
        if not part or part in (".", "..") or any(c in part for c in "/\\\0"):
            raise EditFileError(f"a name of edits is a plain file name, not {part!r}")
    return (edits_folder() if folder is None else Path(folder)) / name / f"{variant}.json"


# -- writing ---------------------------------------------------------------------------------------------------------


def write_edits(edits: Iterable[Edit], path: str | Path, model: str) -> Path:
    """Write edits to ``path``, and their tensors to a file of the same name that ends in .safetensors.

    model: the class of the model they were written for, for the reader.  Returns: the path of the JSON file.

    Raises: EditFileError without edits, or for one that cannot stand in a file; OSError.
    """
    path = _json_path(path)
    data, tensors = edits_data(edits)
    if not data:
        raise EditFileError("this model has no edits to export: write one with model.edit() before")
    packed = _packed(tensors) if tensors else b""
    beside = path.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    if tensors:
        _write(beside, packed)
    made_by = {**library_versions(), "fxsight": __version__}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "made_by": made_by,
        "tensors": {"file": beside.name, "sha256": digest(packed)} if tensors else None,
        "edits": data,
    }
    _write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


def _json_path(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path.with_name(f"{path.name}.json")


def _write(path: Path, data: bytes) -> None:
    """The file appears whole."""
    handle, temporary = tempfile.mkstemp(".tmp", "", path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _packed(tensors: dict[str, torch.Tensor]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError:
        raise EditFileError("tensors of edits are kept with safetensors: pip install safetensors") from None
    return save(tensors)


# -- reading ---------------------------------------------------------------------------------------------------------


def read_edits(path: str | Path) -> list[Edit]:
    """The edits in a file, their tensors on the CPU.

    Raises: EditFileError, naming the file and what is wrong with it; FileNotFoundError.
    """
    path = _json_path(path)
    try:
        content = _content(path.read_bytes())
        versions = _versions(content["made_by"])
        try:
            edits = edits_of(content["edits"], _tensors(path, content["tensors"]))
        except EditFileError as error:
            raise EditFileError(f"{error}\n{versions}" if versions else str(error)) from None
        return [replace(edit, versions=versions) for edit in edits]
    except EditFileError as error:
        raise EditFileError(f"{path}: {error}") from None


def _versions(made_by: Any) -> str:
    """The libraries that a file was written with, where they differ from those that are here; for messages."""
    here = library_versions()
    known = made_by if isinstance(made_by, dict) else {}
    then = {name: str(known.get(name, ""))[:40] for name in ("torch", "transformers")}
    if not any(then[name] and here[name] and then[name] != here[name] for name in then):
        return ""
    texts = [" and ".join(f"{name} {each[name]}" for name in then if each[name]) for each in (then, here)]
    return f"the file was written with {texts[0]}; here is {texts[1]}"


def _content(data: bytes) -> dict[str, Any]:
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EditFileError(f"not a file of edits: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EditFileError(f'not a file of edits: it does not say \'"format": "{FORMAT}"\'')
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise EditFileError(f"the version of its format is no number: {version!r}")
    if version > VERSION:
        raise EditFileError(
            f"written by a newer fxsight: its format is version {version}, and this fxsight ({__version__}) reads "
            f"{VERSION}; update fxsight"
        )
    if _FIELDS.symmetric_difference(content):
        listed = ", ".join(sorted(_FIELDS.symmetric_difference(content)))
        raise EditFileError(f"damaged: these fields are missing or unknown: {listed}")
    return content


def _tensors(path: Path, given: Any) -> dict[str, torch.Tensor]:
    if given is None:
        return {}
    beside = path.with_suffix(".safetensors")
    is_table = isinstance(given, dict) and all(isinstance(given.get(key), str) for key in ("file", "sha256"))
    if not is_table or len(given) != 2:
        raise EditFileError("damaged: 'tensors' says the file and its sha256")
    if not beside.exists():
        raise EditFileError(f"the file of its tensors is not there: {beside.name}; keep both in one folder")
    data = beside.read_bytes()
    if digest(data) != given["sha256"]:
        raise EditFileError(f"{beside.name} is damaged, or not the one that was written with this file")
    try:
        from safetensors.torch import load

        return load(data)
    except ImportError:
        raise EditFileError("tensors of edits are kept with safetensors: pip install safetensors") from None
    except Exception as error:  # whatever safetensors finds wrong
        raise EditFileError(f"{beside.name}: {error}") from None
