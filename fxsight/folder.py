"""A cache folder: files named for what they are and for their contents, shared by processes.

Files appear whole (``os.replace``); one whose contents are not those it is named for is removed; what was used least
recently goes first when the folder is full; a folder that cannot be written costs one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from fxsight.errors import FxsightWarning

LIMIT = 1 << 30  # bytes in a folder; beyond, what was used least recently is removed


def cache_folder() -> Path:
    """``FXSIGHT_CACHE_DIR``, else the platform's folder for caches (``~/.cache/fxsight`` on Linux)."""
    return Path(os.environ.get("FXSIGHT_CACHE_DIR") or platformdirs.user_cache_dir("fxsight", appauthor=False))


def digest(data: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class Folder:
    """Files of one kind in a folder.

    suffix: of the files, with its dot.  what: is kept here, for the warning.  limit: bytes kept.
    """

    def __init__(self, path: Path, suffix: str, what: str, limit: int = LIMIT) -> None:
        self.path = path
        self._suffix, self._what, self._limit = suffix, what, limit
        self._warned = False

    def read(self, name: str) -> Iterator[tuple[Path, bytes]]:
        """The undamaged files of that name, last used first; a damaged one is removed."""
        for path in self._entries(f"{name}-*{self._suffix}"):
            try:
                data = path.read_bytes()
            except OSError:
                continue  # removed by another process, or not ours to read
            if path.stem.endswith(f"-{digest(data)[:16]}"):
                yield path, data
            else:
                remove(path)

    def used(self, path: Path) -> None:
        """A file was of use: it is removed later than others."""
        with contextlib.suppress(OSError):  # a folder that can only be read has no order of use
            os.utime(path)

    def write(self, name: str, data: bytes) -> None:
        """Keep a file; a folder that cannot be written warns once."""
        path, temporary = self.path / f"{name}-{digest(data)[:16]}{self._suffix}", None
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(".tmp", "", self.path)
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
            self._prune(path)
        except OSError as error:
            if temporary is not None:
                remove(Path(temporary))
            self._warn(error)

    def _entries(self, pattern: str) -> list[Path]:
        """Files of that name, last used first."""
        try:
            used = [(stat.st_mtime, path) for path in self.path.glob(pattern) if (stat := _stat(path))]
        except OSError:
            return []  # a folder that cannot be read
        return [path for _, path in sorted(used, reverse=True)]

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            why = f"{self._what} are not kept: {error}; set FXSIGHT_CACHE_DIR to a folder that can be written"
            warnings.warn(why, FxsightWarning, stacklevel=2)

    def _prune(self, newest: Path) -> None:
        """Remove what was used least recently, and what interrupted writers left."""
        total = 0
        for path in [newest, *(path for path in self._entries(f"*-*{self._suffix}") if path != newest)]:
            stat = _stat(path)
            total += 0 if stat is None else stat.st_size
            if total > self._limit and path != newest:
                remove(path)
        for path in self.path.glob("*.tmp"):
            stat = _stat(path)
            if stat is not None and stat.st_mtime < time.time() - 3600:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, if it is there and ours to remove."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
