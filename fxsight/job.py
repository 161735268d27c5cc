"""One compilation as a file: what is compiled and for which arguments, to be done by another process.

    a line of JSON: layouts of the arguments, fixed sizes, folder, settings of torch
    the program, as ``store`` writes it

No weight is written: what is compiled depends on shapes, strides, dtypes and devices alone, and on numbers that vary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsight.artifacts import Artifacts, environment
from fxsight.errors import FxsightError
from fxsight.identity import Local
from fxsight.program import Program
from fxsight.store import decode, encode
from fxsight.varying import compile_for

_NAME = "job"


class Unwritable(Exception):
    """A program that no file can hold."""


@dataclass(frozen=True, eq=False)
class Job:
    """A program to be compiled.

    arguments: one run's placeholders; their numbers do not matter, except those of Python.  fixed: sizes that the
    program holds for alone.  is_whole: in one piece, not by regions.  folder: where the artifacts are kept.
    """

    program: Program
    arguments: Sequence[Any]
    fixed: Mapping[str, int]
    is_whole: bool
    folder: Path

    def do(self, artifacts: Artifacts | None = None) -> None:
        """Compile it: whatever is not in the folder yet is there afterwards.

        artifacts: instead of those of the folder.
        Raises: what torch and Inductor raise.
        """
        compile_for(self.program, self.arguments, self.fixed, artifacts or Artifacts(self.folder), self.is_whole)

    def write(self, path: Path) -> None:
        """Write the file.

        Raises: Unwritable.
        """
        try:
            program = encode(self.program, _NAME, of_code=False)
            head = {
                "arguments": list(map(_layout, self.arguments)),
                "fixed": dict(self.fixed),
                "is_whole": self.is_whole,
                "folder": str(self.folder.absolute()),
                "environment": environment(),
                "settings": _settings(),
            }
            path.write_bytes(json.dumps(head).encode() + b"\n" + program)
        except (Local, FxsightError, TypeError, ValueError) as error:
            raise Unwritable(f"the program cannot be written: {error}") from None


def read_job(path: Path) -> Job:
    """The job in a file; torch has the settings of the process that wrote it from now on.

    Raises: ValueError where this process would compile for something else; anything for damaged files.
    """
    line, _, program = path.read_bytes().partition(b"\n")
    head = json.loads(line)
    _set(head["settings"])
    now = environment()
    others = [name for name, value in head["environment"].items() if now[name] != value]
    if others:
        raise ValueError(f"a new process compiles for something else: {', '.join(others)}")
    pools: dict[Any, torch.Tensor] = {}
    arguments = [_argument(told, pools) for told in head["arguments"]]
    return Job(decode(program, _NAME), arguments, head["fixed"], head["is_whole"], Path(head["folder"]))


def _layout(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    shape, stride = list(argument.shape), list(argument.stride())
    return {"dtype": str(argument.dtype)[6:], "shape": shape, "stride": stride, "device": str(argument.device)}


def _argument(told: Any, pools: dict[Any, torch.Tensor]) -> Any:
    """An argument laid out as told; all of one dtype share the memory of the largest."""
    if not isinstance(told, dict):
        return told
    shape, stride = told["shape"], told["stride"]
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if all(shape) else 0
    key = (told["dtype"], told["device"])
    if key not in pools or pools[key].numel() < size:
        pools[key] = torch.empty(size, dtype=getattr(torch, told["dtype"]), device=told["device"])
    return pools[key].as_strided(shape, stride)


def _settings() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "dtype": str(torch.get_default_dtype())[6:],
    }


def _set(settings: Mapping[str, Any]) -> None:
    torch.set_num_threads(settings["threads"])
    torch.use_deterministic_algorithms(settings["deterministic"], warn_only=settings["warn_only"])
    torch.set_float32_matmul_precision(settings["precision"])
    torch.backends.mkldnn.enabled = settings["mkldnn"]
    torch.set_default_dtype(getattr(torch, settings["dtype"]))
