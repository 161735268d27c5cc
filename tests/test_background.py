"""Compilation in another process: that it is done, that it ends, and that what it leaves is used."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.artifacts import Artifacts, environment
from fxsight.background import ROOT, Background, Child, Process
from fxsight.job import Job, Unwritable, read_job
from fxsight.program import Program
from fxsight.testing import program_of

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def program() -> Program:
    return program_of(
        """
        x: 'input 0'  # f32[batch, 6]
        scale: 'constant 0'  # f32[6]
        twice = aten.mul.Tensor(x, scale)  # f32[batch, 6]
        end = aten.tanh.default(twice)  # f32[batch, 6]
        return (end,)
        """
    )


def job(folder: Path) -> Job:
    return Job(program(), [X, torch.ones(6)], {}, False, folder)


def ended(child: Process) -> str:
    """What it says in the end."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        said = child.poll()
        if said is not None:
            return said
        time.sleep(0.05)
    raise AssertionError("it does not end")


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# -- the file of a job ------------------------------------------------------------------------------------------------


def test_a_job_is_read_back(tmp_path: Path) -> None:
    given = Job(program(), [X.T.contiguous().T, torch.ones(6)], {"length": 3}, True, tmp_path)
    given.write(tmp_path / "job")
    found = read_job(tmp_path / "job")
    assert found.program == given.program and (found.fixed, found.is_whole) == ({"length": 3}, True)
    assert found.folder == tmp_path
    for one, other in zip(found.arguments, given.arguments, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    assert (tmp_path / "job").stat().st_size < 5000, "no weights in it"


def test_numbers_of_a_job_are_kept(tmp_path: Path) -> None:
    Job(program(), [X, 3], {}, False, tmp_path).write(tmp_path / "job")
    assert read_job(tmp_path / "job").arguments[1] == 3


def test_a_process_with_other_settings_refuses_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(tmp_path).write(tmp_path / "job")
    monkeypatch.setattr("fxsight.job.environment", lambda: {**environment(), "settings": "others"})
    with pytest.raises(ValueError, match="a new process compiles for something else: settings"):
        read_job(tmp_path / "job")


def test_settings_of_torch_come_along(tmp_path: Path) -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        job(tmp_path).write(tmp_path / "job")
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        read_job(tmp_path / "job")
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads + 1, "medium")
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_what_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(Unwritable, match="the program cannot be written: Object of type"):
        Job(program(), [X, object()], {}, False, tmp_path).write(tmp_path / "job")


# -- the process ------------------------------------------------------------------------------------------------------


def test_a_process_that_is_ended(tmp_path: Path) -> None:
    child = Process(job(tmp_path), 60)
    assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    assert ended(child) == "its process was ended by SIGKILL"
    child = Process(job(tmp_path), 60)
    child.stop()
    assert child.poll() == "it was stopped" and not is_alive(child.pid)


def test_a_process_ends_with_what_it_was_started_for(tmp_path: Path) -> None:
    child = Process(job(tmp_path), 60)
    pid = child.pid
    assert is_alive(pid)
    del child
    gc.collect()
    assert not is_alive(pid)


def test_a_job_that_cannot_be_done(tmp_path: Path) -> None:
    """Its own words are the reason; and nothing is printed."""
    unknown = Job(program(), [X, {"not": "an argument"}], {}, False, tmp_path)
    assert ended(Process(unknown, 60)).startswith("KeyError: 'shape'")


def test_a_process_that_takes_too_long(tmp_path: Path) -> None:
    assert ended(Process(job(tmp_path), 0.0)) == "it took longer than 0 seconds"


PARENT = """
import os, sys, time
from pathlib import Path
from fxsight.background import Process
from tests.test_background import job

child = Process(job(Path(sys.argv[1])), 600)
print(child.pid, flush=True)
os.kill(child.pid, 19)  # it compiles when it goes on
time.sleep(600)
"""


@pytest.mark.slow
def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    """A parent that is killed can end nothing itself."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, env=env, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert is_alive(pid)
    os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(pid) and not list(tmp_path.glob("*.region"))


# -- all of it --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def until_compiled(net: nn.Module, start: Any, folder: Path, seconds: float = 120) -> tuple[list[Tensor], Any]:
    """Traces until one runs compiled, or is said never to."""
    model: Any = fxsight.Model(net, background=Background(after=0.0, look=0.0, start=start))
    model.__dict__["_captures"].artifacts = Artifacts(folder)
    found, deadline = list[Tensor](), time.monotonic() + seconds
    while time.monotonic() < deadline:
        with torch.no_grad(), model.trace(X, backend="auto") as tracer:
            model.first.output[:, 0] *= 2.0
            out = model.output.save()
        found.append(out)
        if tracer.tier == "inductor" or "op by op: the compilation failed" in str(tracer.program.explain()):
            break
        time.sleep(0.01)
    return found, tracer


def exact(net: Any) -> Tensor:
    with torch.no_grad():
        hidden = net.first(X)
        hidden[:, 0] *= 2.0
        return net.second(torch.tanh(hidden))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def nobody(job: Job, seconds: float) -> Child:
    raise AssertionError("it is compiled already")


def test_another_process_compiles(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The one test with a real compiler: what it leaves is what the next two begin with."""
    net = Net().eval()
    found, tracer = until_compiled(net, None, folder)
    assert tracer.tier == "inductor", tracer.program.explain()
    assert all(torch.equal(out, exact(net)) for out in found[:-1])
    torch.testing.assert_close(found[-1], exact(net), rtol=1e-4, atol=1e-4)
    assert tracer.program.difference.is_within and list(folder.glob("*.region"))
    assert capfd.readouterr() == ("", "")


def test_the_next_model_finds_what_was_compiled(folder: Path) -> None:
    assert list(folder.glob("*.region")), "what the test before has left"
    net = Net().eval()
    found, tracer = until_compiled(net, nobody, folder)
    assert tracer.tier == "inductor", tracer.program.explain()
    torch.testing.assert_close(found[-1], exact(net), rtol=1e-4, atol=1e-4)


def test_a_damaged_artifact_is_compiled_again(folder: Path) -> None:
    (file,) = folder.glob("*.region")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])

    class Mends:
        def poll(self) -> str:
            return ""

    def start(job: Job, seconds: float) -> Child:
        assert not file.exists(), "what is damaged is removed"
        file.write_bytes(whole)
        return Mends()

    _, tracer = until_compiled(Net().eval(), start, folder)
    assert tracer.tier == "inductor", tracer.program.explain()


ONE = """
import sys
from pathlib import Path
from tests.test_background import Net, exact, until_compiled, torch

torch.manual_seed(0)
net = Net().eval()
found, tracer = until_compiled(net, None, Path(sys.argv[1]))
torch.testing.assert_close(found[-1], exact(net), rtol=1e-4, atol=1e-4)
print(tracer.tier)
"""


@pytest.mark.slow
def test_two_processes_compile_into_one_folder(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ONE, str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["inductor"] * 2
