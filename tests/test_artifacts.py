"""Compiled regions on disk: read back, by another process too; what is damaged or foreign is made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxsight import artifacts
from fxsight.artifacts import Artifacts, environment
from fxsight.canonical import Canonical, canonical
from fxsight.folder import digest
from fxsight.regions import cut
from fxsight.testing import program_of

ROOT = Path(__file__).resolve().parents[1]


def region(factor: float = 2.0) -> Canonical:
    """A view and three operators."""
    program = program_of(
        f"""
        x: 'input 0'  # f32[batch, 8]
        half = aten.slice.Tensor(x, 1, 0, 4)  # f32[batch, 4]  {{stride='8, 1', shares='x'}}
        twice = aten.mul.Tensor(half, {factor})  # f32[batch, 4]
        user = torch.Tensor.add_(twice, 1.0)  # none
        end = aten.tanh.default(twice)  # f32[batch, 4]
        return (end,)
        """
    )
    (only,) = cut(program)
    return canonical(only, {node: node.meta["spec"] for node in program.graph.nodes if node.op != "output"}, SIZES, ())


SIZES = {"batch": 5}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
EXPECTED = (X[:, :4] * 2.0 + 1).tanh()


def answer(kept: Artifacts, factor: float = 2.0) -> Tensor:
    (result,) = kept.of(region(factor)).call(len(X), X)
    assert isinstance(result, Tensor)
    return result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of the region, compiled once for this module."""
    folder = tmp_path_factory.mktemp("compiled")
    kept = Artifacts(folder)
    torch.testing.assert_close(answer(kept), EXPECTED)
    assert (kept.made, kept.read) == (1, 0)
    (file,) = folder.iterdir()
    return file.name.encode() + b"\n" + file.read_bytes()


@pytest.fixture
def folder(compiled: bytes, tmp_path: Path) -> Path:
    """A folder with that file."""
    name, _, data = compiled.partition(b"\n")
    (tmp_path / name.decode()).write_bytes(data)
    return tmp_path


def op_by_op(module: fx.GraphModule, example: list[Any]) -> Callable[..., Sequence[Any]]:
    return module.forward


def test_a_region_is_read_back(folder: Path) -> None:
    kept = Artifacts(folder)
    for _ in range(2):
        torch.testing.assert_close(answer(kept), EXPECTED)
    assert (kept.made, kept.read) == (0, 1)
    spec = kept.of(region()).results
    assert [str(s) for s in spec] == ["f32[s0, 4]"]


def test_a_file_says_what_it_is(folder: Path) -> None:
    (file,) = folder.iterdir()
    header = json.loads(file.read_bytes().partition(b"\n")[0])
    assert header["text"] == region().text and header["results"] == ["f32[s0, 4]"]
    assert header["environment"] == environment()
    assert {"torch", "fxsight", "settings", "processor", "capability"} <= set(header["environment"])


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _other(data: bytes) -> bytes:
    head, _, rest = data.partition(b"\n")
    return json.dumps({**json.loads(head), "text": "another"}).encode() + b"\n" + rest


def _results(data: bytes) -> bytes:
    head, _, rest = data.partition(b"\n")
    return json.dumps({**json.loads(head), "results": ["nonsense"]}).encode() + b"\n" + rest


def _nothing(data: bytes) -> bytes:
    return b""


DAMAGES: tuple[Callable[[bytes], bytes], ...] = (_truncated, _other, _results, _nothing)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("is_renamed", [False, True])
def test_what_is_damaged_or_foreign_is_made_again(
    folder: Path, damage: Callable[[bytes], bytes], is_renamed: bool
) -> None:
    """Once with the name of its former contents, once as somebody else would have written it."""
    (file,) = folder.iterdir()
    data = damage(file.read_bytes())
    file.write_bytes(data)
    if is_renamed:
        file = file.rename(folder / f"{file.name[:40]}-{digest(data)[:16]}.region")
    kept = Artifacts(folder, op_by_op)
    torch.testing.assert_close(answer(kept), EXPECTED)
    assert (kept.made, kept.read) == (1, 0) and not file.exists()


@pytest.mark.parametrize("what", ["torch", "fxsight", "python", "settings", "processor", "capability", "devices"])
def test_a_file_of_another_version_is_not_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(artifacts, "environment", lambda: {**environment(), what: "another"})
    kept = Artifacts(folder, op_by_op)
    torch.testing.assert_close(answer(kept), EXPECTED)
    assert (kept.made, kept.read) == (1, 0)


@pytest.mark.parametrize("change", ["threads", "precision", "dtype"])
def test_settings_of_torch_are_told_apart(change: str) -> None:
    kept = Artifacts(compiler=op_by_op)
    answer(kept)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        if change == "threads":
            torch.set_num_threads(threads + 1)
        elif change == "precision":
            torch.set_float32_matmul_precision("medium")
        else:
            torch.set_default_dtype(torch.float64)
        answer(kept)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(torch.float32)
    answer(kept)
    assert kept.made == 2


def test_what_torch_cannot_write_stays_in_memory(tmp_path: Path) -> None:
    class Refuses:
        def __call__(self, size: int, x: Tensor) -> list[Tensor]:
            return [EXPECTED]

        def save(self, path: str, format: str) -> None:
            raise RuntimeError("no artifact to save")

    kept = Artifacts(tmp_path / "new", lambda module, example: Refuses())
    answer(kept), answer(kept)
    assert kept.made == 1 and not (tmp_path / "new").exists()


def test_memory_has_a_limit() -> None:
    kept = Artifacts(compiler=op_by_op, limit=2)
    for factor in (2.0, 3.0, 2.0, 4.0):
        answer(kept, factor)
    assert kept.made == 3
    answer(kept, 2.0)
    assert kept.made == 3, "used after 3.0"
    answer(kept, 3.0)
    assert kept.made == 4


ANOTHER = """
import sys
from pathlib import Path
from tests.test_artifacts import EXPECTED, Artifacts, answer, torch

kept = Artifacts(Path(sys.argv[1]))
torch.testing.assert_close(answer(kept), EXPECTED)
print(kept.made, kept.read)
"""


@pytest.mark.slow
def test_one_process_compiles_and_the_next_one_reads(tmp_path: Path) -> None:
    """Without what Inductor itself has kept."""
    said = []
    for number in range(2):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"inductor{number}"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", ANOTHER, str(tmp_path / "compiled")]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said == [["1", "0"], ["0", "1"]]
