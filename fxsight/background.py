"""Compilation in other processes, while this one runs.

A process gets its job in a file, and leaves what it has compiled in the cache folder; nothing else comes back. It is
ended with what it was started for, and ends itself when this process is gone (``compiling``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fxsight.job import Job

ROOT = Path(__file__).resolve().parents[1]
_GRACE = 5.0  # seconds after which a process that should have ended itself is ended


class Child(Protocol):
    """One compilation, done elsewhere."""

    def poll(self) -> str | None:
        """None while it works, "" when it is done, else why it failed."""
        ...


@dataclass(frozen=True)
class Background:
    """When and how programs of ``backend="auto"`` are compiled.

    after: seconds of runs op by op after which a program is compiled.  whole_after: seconds of compiled runs after
    which a program that was compiled by regions is compiled in one piece, too; None for never.
    seconds: how long one compilation may take.  at_once: compilations at one time, for one model.
    look: seconds of runs between two looks at a compilation.
    start: starts the compilation of a job, which may take so many seconds; raises ``job.Unwritable``.
    """

    after: float = 2.0
    whole_after: float | None = 20.0
    seconds: float = 900.0
    at_once: int = 1
    look: float = 0.01
    start: Callable[[Job, float], Child] | None = None


class Workers:
    """The compilations of one model that are going on."""

    def __init__(self, rule: Background) -> None:
        self.rule = rule
        self._children: list[Child] = []

    def start(self, job: Job) -> Child | None:
        """The compilation of a job; None while there are as many as may be.

        Raises: Unwritable; OSError where no process can be started.
        """
        self._children = [child for child in self._children if child.poll() is None]
        if len(self._children) >= self.rule.at_once:
            return None
        child = (self.rule.start or Process)(job, self.rule.seconds)
        self._children.append(child)
        return child


class Process:
    """A job that a process of its own does.

    Raises: Unwritable; OSError where no process can be started.
    """

    def __init__(self, job: Job, seconds: float) -> None:
        self._folder = tempfile.mkdtemp(prefix="fxsight-job-")
        self._end = time.monotonic() + seconds + _GRACE
        self._seconds = seconds
        self._said: str | None = None
        try:
            path = Path(self._folder) / "job"
            job.write(path)
            self._process = _started(path, seconds)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._stop = weakref.finalize(self, _stop, self._process, self._folder, os.getpid())

    def poll(self) -> str | None:
        """None while it works, "" when it is done, else why it failed."""
        if self._said is None:
            code = self._process.poll()
            if code is not None:
                self._said = self._why(code)
                self._stop()
            elif time.monotonic() > self._end:
                self._said = self._too_long()
                self._stop()
        return self._said

    def stop(self) -> None:
        """End it."""
        self._said = self._said or "it was stopped"
        self._stop()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def _why(self, code: int) -> str:
        if code == 0:
            return ""
        lines = (Path(self._folder) / "said").read_text(errors="replace").strip().splitlines()
        if code < 0:
            is_late = time.monotonic() > self._end - _GRACE
            return self._too_long() if is_late else f"its process was ended by {signal.Signals(-code).name}"
        return lines[-1] if lines else f"its process ended with {code}"

    def _too_long(self) -> str:
        return f"it took longer than {self._seconds:g} seconds"


def _started(path: Path, seconds: float) -> subprocess.Popen[bytes]:
    """The process; what it says goes into a file beside its job."""
    roots = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    command = [sys.executable, "-P", "-m", "fxsight.compiling", str(path), str(os.getpid()), str(seconds)]
    with open(path.parent / "said", "wb") as said:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=env, start_new_session=True
        )


def _stop(process: subprocess.Popen[Any], folder: str, owner: int) -> None:
    """End a process and the compilers it has started, and remove its folder; only its owner does."""
    if os.getpid() != owner:
        return
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
