"""A ``torch.autograd.Function`` in the model: its backward is not captured, and no gradient goes through it unsaid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxsight
from fxsight.capture import capture
from fxsight.errors import TraceError
from fxsight.store import decode, encode
from tests.zoo import ENTRIES


class Round(torch.autograd.Function):
    """Rounds; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Reverse(torch.autograd.Function):
    """The same tensor with the other gradient."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Double(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 7 * gradient


class Net(nn.Module):
    """A function of this kind between two layers, and a way around it."""

    def __init__(self, function: Any, around: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)
        self.function, self.around = function, around

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        h = h + self.function.apply(h) if self.around else self.function.apply(h)
        out: Tensor = self.outer(h)
        return out


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def _line(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().split("\n"), 1) if text in line)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("function", [Round, Reverse, Double])
def test_a_gradient_through_it_is_refused(function: Any, around: bool) -> None:
    if around and function is Double:
        return  # it changes what goes around it
    model = fxsight.Model(Net(function, around), cache=False)
    with pytest.raises(TraceError) as caught, model.trace(X):
        hidden = model.inner.output
        model.output.sum().backward()  # the pass
        hidden.grad.save()
    text = str(caught.value)
    at = _line("function.apply(h) if")
    assert text.startswith(
        f"{__file__}:{_line('  # the ' + 'pass')}: a gradient would flow through {function.__name__}"
    )
    assert f"tests/test_custom_functions.py:{at}:" in text and "write the function with plain operators" in text


@pytest.mark.parametrize("function", [Round, Reverse, Double])
def test_values_that_were_saved_refuse_it_outside(function: Any) -> None:
    net = Net(function)
    model = fxsight.Model(net, cache=False)
    with model.trace(X):
        before, out = model.inner.output.save(), model.output.save()
    assert torch.equal(out, net(X))
    with pytest.raises(TraceError, match=f"a gradient would flow through {function.__name__}, a torch.autograd"):
        out.sum().backward()
    if function is not Double:  # which changes it
        before.sum().backward()


def test_numbers_that_were_asked_for_refuse_it_outside() -> None:
    model = fxsight.Model(Net(Round), cache=False)
    with model.trace(X):
        out = model.output
        if out.sum() < math.inf:
            out = (out * 2).save()
    with pytest.raises(TraceError, match="a gradient would flow through Round"):
        out.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_that_do_not_need_it_are_as_always(frozen: bool) -> None:
    net = Net(Round).requires_grad_(not frozen)
    model = fxsight.Model(net, cache=False)
    with model.trace(X):
        outer = model.outer.input
        (found,) = torch.autograd.grad(model.output.pow(2).sum(), outer)
        found.save()
    rounded = net.inner(X).round().detach().requires_grad_()
    (wanted,) = torch.autograd.grad(net.outer(rounded).pow(2).sum(), rounded)
    assert torch.equal(found, wanted)
    with model.trace(X):
        loss = model.output.pow(2).sum()
        loss.backward(inputs=[net.outer.weight.requires_grad_()])
    assert net.outer.weight.grad is not None and net.inner.weight.grad is None


def test_nothing_is_said_where_nothing_is_differentiated() -> None:
    model = fxsight.Model(Net(Round), cache=False)
    with torch.no_grad(), model.trace(X):
        model.inner.output[:] = 1.2
        hidden, out = model.outer.input.save(), model.output.save()
    assert (hidden == 1).all() and not out.requires_grad


class Checkpointed(nn.Module):
    """What torch itself writes with such a function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=True)
        return out


def test_torch_s_own_are_none() -> None:
    program = capture(Checkpointed(), (X.clone().requires_grad_(),), {})
    assert program.book.functions == ()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_models_of_transformers_have_none(name: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    program = capture(entry.make(), *entry.inputs(2, 5))
    assert program.book.functions == ()


def test_it_is_written_down_and_read_back() -> None:
    program = capture(Net(Round), (X,), {})
    (one,) = program.book.functions
    assert one.name == "Round" and one.start < one.end
    assert decode(encode(program, "name"), "name").book.functions == (one,)
