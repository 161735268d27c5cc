"""The nnsight side: a process of its own environment that times what it is asked to, one batch at a time."""

import json
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


class Worker:
    """A running ``tests.bench.worker`` under another Python; a context manager.

    Raises: RuntimeError when it ends or answers with an error.
    """

    def __init__(self, python: Path, threads: int, quick: bool, cpu: bool) -> None:
        self._folder = TemporaryDirectory(prefix="fxsight-bench-")
        settings = [str(threads), str(int(quick)), str(int(cpu))]
        command = [str(python), "-m", "tests.bench.worker", self._folder.name, *settings]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment(threads), text=True, stdin=-1, stdout=-1)
        self.about: dict[str, str] = self.ask(do="about")

    def ask(self, **message: Any) -> Any:
        """One question, one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the worker ended when asked {message}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
        self._folder.cleanup()


class Remote:
    """One job of the worker's, as a clock."""

    def __init__(self, worker: Worker, name: str) -> None:
        self._worker, self._name = worker, name

    def result(self) -> list[Tensor]:
        path = self._worker.ask(do="result", job=self._name)
        found: list[Tensor] = torch.load(path, weights_only=True)
        return found

    def time(self, calls: int) -> float:
        return float(self._worker.ask(do="time", job=self._name, calls=calls))


def environment(threads: int, **more: str) -> dict[str, str]:
    """For a measured process: no network, that many threads, and byte code kept, as installed packages have it."""
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    fixed["PYTHONDONTWRITEBYTECODE"] = ""
    return {**os.environ, **fixed, **more}
