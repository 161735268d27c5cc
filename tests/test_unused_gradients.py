"""Gradients that are asked for and not used, on a frozen model: they are not computed, and nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxsight

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    return fxsight.Model(net, cache=False)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("last", [False, True])
def test_grad(model: Any, backend: str, last: bool) -> None:
    for _ in range(2):
        with model.trace(X, backend=backend):
            hidden = model[0].output
            loss = model.output[-1].sum() if last else model.output.sum()
            torch.autograd.grad(loss, hidden)
            out = model.output.save()
        torch.testing.assert_close(out, model._module(X))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_backward(model: Any, backend: str) -> None:
    with model.trace(X, backend=backend):
        loss = model.output.sum()
        with loss.backward():
            hidden = model[0].output.grad
        assert hidden.shape == (3, 8)  # and not used
        out = model.output.save()
    torch.testing.assert_close(out, model._module(X))


def test_beside_a_pass_that_is_used(model: Any) -> None:
    with model.trace(X, backend="inductor"):
        hidden = model[0].output
        torch.autograd.grad(model.output.sum(), hidden, retain_graph=True)
        (used,) = torch.autograd.grad(model.output.pow(2).sum(), hidden)
        used = used.save()
    h = model._module[0](X).requires_grad_()
    (expected,) = torch.autograd.grad(model._module[2](torch.relu(h)).pow(2).sum(), h)
    torch.testing.assert_close(used, expected)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_pass_for_nothing_is_refused_as_in_torch(model: Any, backend: str) -> None:
    with (
        pytest.raises(RuntimeError, match=r"test_unused_gradients.py:\d+: element 0 of tensors does not require grad"),
        model.trace(X, backend=backend),
    ):
        model.output.sum().backward()
        model.output.save()
