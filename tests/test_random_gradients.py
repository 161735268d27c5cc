"""Random programs with a backward pass: the gradients of all weights, against hooks under autograd.

Hooks and programs do the same operations, but not always in the same order, and autograd adds gradients up in the order
of operations: in double precision what is wrong is told from what is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsight.model import Model
from tests.oracle import intercepted, locations
from tests.programs import AssignStep, InplaceStep, Program, ReadStep, Values, describe
from tests.random_programs import places, random_program
from tests.test_random_programs import run_step
from tests.zoo import tiny_transformer, token_ids

QUICK = 6
LONG = 1000


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    """All numbers that are made here are f64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _gradients(net: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    net.zero_grad()
    return found


def _with_hooks(steps: Program, net: nn.Module, ids: Tensor) -> list[Tensor] | None:
    """The gradients of all weights; None where autograd refuses an edit in place."""
    values = Values(steps)
    located = [step for step in steps if isinstance(step, ReadStep | AssignStep | InplaceStep)]
    with ExitStack() as stack:
        for path, port in locations(located):
            here = [step for step in located if (step.path, step.port) == (path, port)]
            stack.enter_context(intercepted(net, path, port, partial(values.visit, here)))
        try:
            net(ids).pow(2).sum().backward()
        except RuntimeError:
            net.zero_grad()
            return None
    return _gradients(net)


def _with_fxsight(steps: Program, model: Model, ids: Tensor) -> list[Tensor]:
    known: dict[str, Any] = {}
    saved: list[Any] = []
    with model.trace(ids):
        for step in steps:
            run_step(step, model, known, saved)
        model.output.pow(2).sum().backward()
    return _gradients(model._module)


def check(first: int, count: int) -> int:
    """Compare programs beginning at one seed.  Returns: how many autograd has taken."""
    torch.manual_seed(0)
    net, ids = tiny_transformer().eval().double(), token_ids(2, 5)
    model, compared = Model(net, cache=False), 0
    at = places(net, ids)
    for seed in range(first, first + count):
        steps = random_program(seed, at)
        expected = _with_hooks(steps, net, ids)
        if expected is None:
            continue
        try:
            found = _with_fxsight(steps, model, ids)
        except Exception as error:
            raise AssertionError(f"seed {seed} fails: {error!r}\n{describe(steps)}") from error
        largest = max(float(b.abs().max()) for b in expected)
        for a, b in zip(found, expected, strict=True):
            # What is zero but for rounding (the bias of attention's keys) is as large as other gradients' rounding.
            allowed = 1e-10 * float(b.abs().max()) + 1e-14 * largest + 1e-30
            assert float((a - b).abs().max()) <= allowed, f"seed {seed} differs\n{describe(steps)}"
        compared += 1
    return compared


@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")
def test_random_gradients_equal_hooks() -> None:
    assert check(0, QUICK) > QUICK // 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")
@pytest.mark.parametrize("first", range(QUICK, LONG, 142))
def test_many_random_gradients_equal_hooks(first: int) -> None:
    assert check(first, 142) > 142 // 3
