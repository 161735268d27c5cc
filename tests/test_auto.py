"""``backend="auto"``: op by op, then compiled; what is asked of it, and what keeps it from being compiled.

In these tests the place of another process is taken by ``Standin``, through ``Background.start``, and the place of
Inductor by a compiler whose results are a stated bit off.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxsight
from fxsight.artifacts import Artifacts
from fxsight.background import Background, Child, Workers
from fxsight.captures import Captures
from fxsight.job import Job, Unwritable
from tests.test_regions import Stack
from tests.zoo import seeded

OFF = 1e-6


def off_by(factor: float) -> Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]:
    """A compiler whose results are multiplied."""

    def compiler(module: fx.GraphModule, example: list[Any]) -> Callable[..., Sequence[Any]]:
        def call(*given: Any) -> list[Any]:
            return [r * (1 + factor) if isinstance(r, Tensor) else r for r in module(*given)]

        return call

    return compiler


@dataclass
class Standin:
    """Compiles into the memory of this process, and is ready when it is told so.

    says: what a compilation says in the end.  is_lazy: nothing is compiled.
    """

    artifacts: Artifacts
    says: str | None = ""
    is_lazy: bool = False
    jobs: list[Job] = field(default_factory=list[Job])

    def __call__(self, job: Job, seconds: float) -> Child:
        self.jobs.append(job)
        if not self.is_lazy:
            job.do(self.artifacts)
        return self

    def poll(self) -> str | None:
        return self.says


class Case:
    """A model, and what compiles for it."""

    def __init__(self, net: nn.Module, folder: Path | None, factor: float = OFF, **rule: Any) -> None:
        self.artifacts = Artifacts(folder, off_by(factor))
        self.start = Standin(self.artifacts)
        self.net: Any = net.eval().requires_grad_(False)
        self.model: Any = fxsight.Model(net, cache=False)
        settings = Background(**{"after": 0.0, "look": 0.0, "whole_after": None, "start": self.start, **rule})
        self.model.__dict__["_captures"] = Captures(net, None, self.artifacts, Workers(settings))
        self.tracer: Any = None

    def __call__(self, x: Tensor, edit: Callable[[Any], None] | None = None) -> Tensor:
        with self.model.trace(x, backend="auto") as self.tracer:
            if edit is not None:
                edit(self.model)
            out: Tensor = self.model.output.save()
        return out

    @property
    def told(self) -> str:
        return str(self.tracer.program.explain())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(seeded(Stack), tmp_path)


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count))


def scaled(number: float) -> Callable[[Any], None]:
    return lambda model: model.blocks[1].output.mul_(number)


def rectified(block: int) -> Callable[[Any], None]:
    return lambda model: model.blocks[block].output.relu_()


def test_op_by_op_then_compared_then_compiled(case: Case) -> None:
    x, exact, tiers = rows(), case.net(rows()), list[str]()
    case.start.says = None
    for _ in range(3):
        assert torch.equal(case(x), exact)
        tiers.append(case.tracer.tier)
    assert "being compiled" in case.told and "difference" not in case.told
    case.start.says = ""
    assert torch.equal(case(x), exact), "the run that is compared is the last one op by op"
    assert tiers == ["eager"] * 3 and case.tracer.tier == "eager"
    first = case.tracer
    found = case(x)
    assert case.tracer.tier == "inductor" and first.tier == "eager"
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=2 * OFF, atol=0)
    measured: Any = case.tracer.program.difference
    assert measured.is_within and 0.5 * OFF < measured.relative < 2 * OFF
    assert len(case.start.jobs) == 1
    assert case.told.splitlines()[:2] == [line for line in case.told.splitlines() if "runs" in line]
    assert "eager: 4 runs" in case.told and "inductor: 1 runs" in case.told and str(measured) in case.told


def test_each_thread_is_told_the_tier_of_its_own_results(case: Case) -> None:
    for _ in range(3):
        case(rows())
    tiers = list[str]()

    def other() -> None:
        case.tracer.program(rows(7))
        tiers.append(case.tracer.program.tier)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert tiers == ["eager"] and case.tracer.program.tier == "inductor"


def test_nothing_is_compiled_before_it_has_run_for_long(tmp_path: Path) -> None:
    case = Case(seeded(Stack), tmp_path, after=3600.0)
    for _ in range(20):
        case(rows())
    assert case.start.jobs == [] and case.tracer.tier == "eager" and "op by op" not in case.told


def test_beyond_the_tolerance_it_stays_op_by_op(tmp_path: Path) -> None:
    case = Case(seeded(Stack), tmp_path, factor=0.01)
    for _ in range(4):
        assert torch.equal(case(rows()), case.net(rows()))
    assert case.tracer.tier == "eager" and len(case.start.jobs) == 1
    assert "op by op: compiled results differ by more than lower.TOLERANCE: " in case.told
    assert case.tracer.program.difference.relative == pytest.approx(0.01, rel=0.1)


def test_a_compilation_that_fails(case: Case) -> None:
    case.start.says = "RuntimeError: no compiler"
    for _ in range(4):
        assert torch.equal(case(rows()), case.net(rows()))
    assert len(case.start.jobs) == 1
    assert "op by op: the compilation failed: RuntimeError: no compiler" in case.told


@pytest.mark.parametrize("error", [OSError("no processes left"), Unwritable("the program cannot be written: a lock")])
def test_a_compilation_that_cannot_be_started(tmp_path: Path, error: Exception) -> None:
    def start(job: Job, seconds: float) -> Child:
        raise error

    case = Case(seeded(Stack), tmp_path, start=start)
    for _ in range(3):
        assert torch.equal(case(rows()), case.net(rows()))
    assert f"op by op: {error}" in case.told


def test_a_compilation_that_leaves_nothing_is_tried_twice(case: Case) -> None:
    case.start.is_lazy = True
    for _ in range(6):
        case(rows())
    assert len(case.start.jobs) == 2 and case.tracer.tier == "eager"
    assert "op by op: what was compiled cannot be read back" in case.told


def test_what_is_compiled_already_is_not_compiled_again(case: Case) -> None:
    for _ in range(2):
        case(rows())
    other = Case(seeded(Stack), case.artifacts.folder)
    other.model.__dict__["_captures"].artifacts = case.artifacts
    other(rows())
    other(rows())
    assert other.tracer.tier == "inductor" and other.start.jobs == []


def test_each_size_is_compared_once(case: Case) -> None:
    tiers = []
    for count in (5, 5, 5, 9, 9, 1, 1):
        torch.testing.assert_close(case(rows(count)), case.net(rows(count)))
        tiers.append(case.tracer.tier)
    assert tiers == ["eager", "eager", "inductor", "eager", "inductor", "eager", "inductor"]
    assert len(case.start.jobs) == 1


def test_sizes_that_what_is_compiled_does_not_hold_for(case: Case) -> None:
    """A slice that is empty for some sizes is compiled once for either case."""

    def edit(model: Any) -> None:
        model.blocks[1].output[7:] *= 2

    def expected(x: Tensor) -> Tensor:
        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[7:] *= 2
            return output

        handle = case.net.blocks[1].register_forward_hook(change)
        try:
            found: Tensor = case.net(x)
        finally:
            handle.remove()
        return found

    tiers = []
    for count in (5, 5, 5, 9, 9, 9, 5):
        torch.testing.assert_close(case(rows(count), edit), expected(rows(count)))
        tiers.append(case.tracer.tier)
    assert tiers == ["eager", "eager", "inductor", "eager", "eager", "inductor", "inductor"]
    assert len(case.start.jobs) == 2


def test_weights_are_those_of_the_moment(case: Case) -> None:
    for _ in range(3):
        case(rows())
    assert case.tracer.tier == "inductor"
    case.net.load_state_dict({name: t * 0.5 for name, t in case.net.state_dict().items()})
    torch.testing.assert_close(case(rows()), case.net(rows()))
    assert case.tracer.tier == "inductor"


def test_numbers_that_vary_share_one_compilation(case: Case) -> None:
    for number in range(8):
        case(rows(), scaled(1.0 + number))
    assert case.tracer.tier == "inductor" and len(case.start.jobs) <= 2


def test_gradients_are_never_lost(case: Case) -> None:
    x = rows().requires_grad_()
    for _ in range(4):
        torch.autograd.backward(case(x).sum())
    assert case.tracer.tier == "eager" and case.start.jobs == []
    assert "op by op: its results have a history of gradients" in case.told
    with torch.no_grad():
        tiers = [(case(x), case.tracer.tier)[1] for _ in range(3)]
    assert tiers[-1] == "inductor"
    assert case(x).requires_grad and case.tracer.tier == "eager"


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Counting(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * 2


@pytest.mark.parametrize(
    ("net", "why"), [(Noisy, "it draws random numbers"), (Counting, "it changes what it is given")]
)
def test_what_cannot_run_twice(tmp_path: Path, net: Callable[[], nn.Module], why: str) -> None:
    case = Case(net(), tmp_path)
    for _ in range(3):
        case(rows())
    assert case.start.jobs == [] and f"op by op: {why}" in case.told
    assert not isinstance(case.net, Counting) or int(case.net.count) == 3


def test_without_a_folder_nothing_is_compiled() -> None:
    case = Case(seeded(Stack), None)
    for _ in range(3):
        case(rows())
    assert case.start.jobs == []
    assert "op by op: there is no folder for what is compiled: the model has cache=False" in case.told


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    model: Any = fxsight.Model(seeded(Stack).requires_grad_(False), background=None)
    for _ in range(3):
        with model.trace(rows(), backend="auto") as tracer:
            model.output.save()
    assert tracer.tier == "eager" and "op by op: the model has background=None" in str(tracer.program.explain())


def test_one_compilation_at_a_time(case: Case) -> None:
    case.start.says = None
    for number in range(3):
        case(rows(), rectified(number))
    assert len(case.start.jobs) == 1 and "waits for another" in case.told
    case.start.says = ""
    for _ in range(3):
        case(rows(), rectified(2))
    assert len(case.start.jobs) == 2 and case.tracer.tier == "inductor"


def test_what_fails_when_it_runs_is_given_up(case: Case) -> None:
    def compiler(module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        runs = iter([True])

        def call(*given: Any) -> Any:
            if not next(runs, False):
                raise RuntimeError("a kernel is gone")
            return module(*given)

        return call

    case.artifacts._compiler = compiler
    for _ in range(4):
        assert torch.equal(case(rows()), case.net(rows()))
    assert "op by op: what is compiled has failed: a kernel is gone" in case.told


def test_sessions_and_sweeps_run_op_by_op(case: Case) -> None:
    with case.model.session(), case.model.trace(rows(), backend="auto") as tracer:
        out = case.model.output.save()
    assert torch.equal(out, case.net(rows())) and tracer.tier == "eager" and case.start.jobs == []


def test_an_edited_model_is_compiled_beside_its_calls(case: Case) -> None:
    with case.model.edit(rows()) as edited:
        case.model.blocks[0].output[:] = 0
    fast, exact = edited.compile(backend="auto"), edited(rows())
    found = [fast(rows()) for _ in range(4)]
    assert all(torch.equal(out, exact) for out in found[:2]) and not torch.equal(found[-1], exact)
    torch.testing.assert_close(found[-1], exact)


def test_the_default_is_op_by_op(case: Case) -> None:
    with case.model.trace(rows()) as tracer:
        case.model.output.save()
    assert tracer.tier == "eager" and str(tracer.program.explain()) == "eager: op by op"
    assert tracer.program.difference is None


# -- in one piece -----------------------------------------------------------------------------------------------------


@pytest.fixture
def blocks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small programs are cut into regions, too."""
    monkeypatch.setattr("fxsight.ahead.SMALL", 0)


@pytest.mark.usefixtures("blocks_count")
def test_what_is_hot_is_compiled_in_one_piece(tmp_path: Path) -> None:
    case = Case(seeded(Stack), tmp_path, whole_after=0.0)
    for _ in range(6):
        torch.testing.assert_close(case(rows()), case.net(rows()), rtol=1e-4, atol=1e-4)
    assert [job.is_whole for job in case.start.jobs] == [False, True]
    (said,) = [line for line in case.told.splitlines() if line.startswith("in one piece: ")]
    assert " ms, by regions " in said and said.endswith(("one piece kept", "regions kept"))
    assert ("compiled in one piece" in case.told) == said.endswith("one piece kept")
    torch.testing.assert_close(case(rows(9)), case.net(rows(9)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("blocks_count")
def test_the_faster_is_kept(tmp_path: Path) -> None:
    """Each call of something compiled takes its time: one piece is faster than six regions."""
    case = Case(seeded(Stack), tmp_path, whole_after=0.0)
    case.artifacts._compiler = slow
    for _ in range(6):
        torch.testing.assert_close(case(rows()), case.net(rows()))
    assert case.told.endswith("one piece kept") and "compiled in one piece" in case.told
    tiers = [(case(rows(count)), case.tracer.tier)[1] for count in (5, 9, 9)]
    assert tiers == ["inductor", "eager", "inductor"]


def slow(module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        time.sleep(0.002)
        return module(*given)

    return call


@pytest.mark.usefixtures("blocks_count")
def test_one_piece_that_fails_leaves_regions(tmp_path: Path) -> None:
    case = Case(seeded(Stack), tmp_path, whole_after=0.0)
    for _ in range(3):
        case(rows())
    case.start.says = "MemoryError"
    for _ in range(3):
        case(rows())
    assert case.tracer.tier == "inductor" and "compiled by regions" in case.told
    assert "in one piece: the compilation failed: MemoryError" in case.told


@pytest.mark.usefixtures("blocks_count")
def test_one_piece_can_be_switched_off(case: Case) -> None:
    for _ in range(6):
        case(rows())
    assert [job.is_whole for job in case.start.jobs] == [False] and "in one piece" not in case.told


def test_a_small_program_is_compiled_in_one_piece_at_once(tmp_path: Path) -> None:
    case = Case(seeded(Stack), tmp_path, whole_after=0.0)
    for _ in range(6):
        case(rows())
    assert [job.is_whole for job in case.start.jobs] == [True] and "compiled in one piece" in case.told
