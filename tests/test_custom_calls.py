"""A ``torch.autograd.Function`` that a body calls: its own backward, as autograd calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import fxsight
from fxsight.errors import TraceError

torch.manual_seed(0)
X = torch.randn(3, 4)
NET = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
THRESHOLD = nn.Parameter(torch.randn(8) * 0.3)
WEIGHT = nn.Parameter(torch.randn(8, 8))


class Round(torch.autograd.Function):
    """With a number, and a backward that keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float = 2.0) -> Tensor:
        ctx.save_for_backward(x)
        ctx.k = k
        return (x * k).round() / k

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * x * ctx.k, None


class Reverse(torch.autograd.Function):
    """The tensor itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Jump(torch.autograd.Function):
    """A JumpReLU whose threshold learns."""

    @staticmethod
    def forward(x: Tensor, threshold: Tensor, width: float) -> Tensor:
        return x * (x > threshold).to(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, threshold, ctx.width = inputs
        ctx.save_for_backward(x, threshold)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.width).to(x)
        return (x > threshold).to(x) * g, torch.sum(-(threshold / ctx.width) * near * g, dim=0), None


class Exp(torch.autograd.Function):
    """In-place calls in both, and its result kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[x > 0] = 1
        y = y + x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        g = g.clone()
        g[:, 0] = 0
        found: Tensor = g * y
        return found


class Once(Exp):
    """One that is differentiated once."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        found: Tensor = g * y
        return found


class Several(torch.autograd.Function):
    """Three results, one of them without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return x * 2, x > 0, x @ w

    @staticmethod
    def backward(ctx: Any, a: Tensor, _: Any, b: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return a * 2 + b @ w.t(), x.t() @ b


class Unused(torch.autograd.Function):
    """A result that is not computed from the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ones(3, 8)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 5


def _call(function: Any, *args: Any) -> Any:
    return function.apply(*args)


BODIES: dict[str, Callable[[Any], Any]] = {
    "kept input": lambda h: _call(Round, h, 4.0),
    "the input itself": Reverse.apply,
    "a computed threshold": lambda h: _call(Jump, h, THRESHOLD.exp(), 0.5),
    "a parameter": lambda h: _call(Jump, h.relu(), THRESHOLD, 0.5),
    "in place": Exp.apply,
    "one after the other": lambda h: _call(Round, _call(Reverse, _call(Exp, h))),
    "several results": lambda h: (lambda found: found[0] + found[2])(_call(Several, h, WEIGHT)),
    "one of several": lambda h: _call(Several, h, WEIGHT)[2],
    "the one without": lambda h: _call(Several, h, WEIGHT)[1] * h,
}


def _learned() -> list[Tensor | None]:
    found = [THRESHOLD.grad, WEIGHT.grad]
    THRESHOLD.grad = WEIGHT.grad = None
    return found


def _eager(body: Callable[[Any], Any]) -> list[Tensor | None]:
    h = NET[0](X).requires_grad_()
    y = body(h)
    out = NET[2](NET[1](y + h))
    out.pow(2).sum().backward()
    return [h.grad, y.detach(), out.detach(), *_learned()]


def _traced(model: Any, body: Callable[[Any], Any]) -> list[Tensor | None]:
    with model.trace(X):
        h = model[0].output
        y = body(h).save()
        model[0].output = y + h
        out = model.output.save()
        out.pow(2).sum().backward()
        gradient = h.grad.save()
    return [gradient, y, out, *_learned()]


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_gradients_are_autograd_s(body: Callable[[Any], Any]) -> None:
    model = fxsight.Model(NET, cache=False)
    for found, wanted in zip(_traced(model, body) + _traced(model, body), 2 * _eager(body), strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or (wanted is not None and torch.equal(found, wanted))


@pytest.mark.parametrize("function", [Exp, Round])
def test_it_is_differentiated_twice(function: Any) -> None:
    model = fxsight.Model(NET, cache=False)
    h = NET[0](X).requires_grad_()
    (first,) = torch.autograd.grad(NET[2](function.apply(h)).sum(), h, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), h)
    with model.trace(X):
        h = model[0].output
        model[1].output = function.apply(h)
        (one,) = torch.autograd.grad(model.output.sum(), h, create_graph=True)
        (two,) = torch.autograd.grad(one.pow(2).sum(), h)
        one.save()
        two.save()
    assert torch.equal(one, first.detach())
    assert torch.equal(two, second)


def test_one_that_is_differentiated_once_says_so() -> None:
    model = fxsight.Model(NET, cache=False)
    with (
        pytest.raises(RuntimeError, match=r"Once: trying to differentiate twice"),
        model.trace(X),
    ):
        h = model[0].output
        torch.autograd.grad(_call(Once, h).sum(), h, create_graph=True)


def test_gradients_of_its_result_are_edited_in_each_pass() -> None:
    model = fxsight.Model(NET, cache=False)
    with model.trace(X):
        h = model[0].output
        y = model[1].output = _call(Round, h)
        y.grad = y.grad * 3
        with model.output[:, 0].sum().backward(retain_graph=True):
            first = h.grad.save()
        with model.output[:, 1].sum().backward():
            second = h.grad.save()
    h = NET[0](X).requires_grad_()
    y = _call(Round, h)
    out = NET[2](y)
    (other,) = torch.autograd.grad(out[:, 1].sum(), h, retain_graph=True)
    y.register_hook(lambda g: g * 3)
    (one,) = torch.autograd.grad(out[:, 0].sum(), h)
    assert torch.equal(first, one)
    assert torch.equal(second, other)


def test_a_gradient_from_outside_is_refused() -> None:
    model = fxsight.Model(NET, cache=False)
    x = X.clone().requires_grad_()
    with model.trace(x):
        y = _call(Reverse, model[0].output).save()
    with pytest.raises(TraceError, match=r"that a body has called, from outside of its block.*write loss.backward"):
        y.sum().backward()
    with torch.no_grad(), model.trace(x) as tracer:
        _call(Reverse, model[0].output).save()
    assert tracer.program.functional()((x,))[0].shape == (3, 8)  # under no_grad it is no such call


def test_it_is_no_pure_function() -> None:
    model = fxsight.Model(NET, cache=False)
    with model.trace(X) as tracer:
        _call(Reverse, model[0].output).save()
    with pytest.raises(TraceError, match=r"no pure function: the body calls a torch\.autograd.Function"):
        tracer.program.functional()


def test_what_was_kept_is_not_changed() -> None:
    model = fxsight.Model(NET, cache=False)
    with (
        pytest.raises(RuntimeError, match="by an inplace operation: Round has kept it"),
        model.trace(X),
    ):
        h = model[0].output
        y = _call(Round, h)
        h[:] = 0
        y.sum().backward()


def test_a_view_of_what_is_changed_is_refused() -> None:
    model = fxsight.Model(NET, cache=False)
    with (
        pytest.raises(TraceError, match=r"a view of .*clone, which is changed in place"),
        model.trace(X),
    ):
        h = model[0].output.clone()
        y = _call(Reverse, h)
        h[:] = 0
        y.save()


def test_a_result_that_is_not_computed_from_the_value_is_refused() -> None:
    model = fxsight.Model(NET, cache=False)
    with pytest.raises(TraceError, match="has computed its result without it: its gradient has no way"), model.trace(X):
        model[0].output = model[0].output + _call(Unused, model[0].output) * 2


def test_an_input_whose_gradient_has_no_way_is_refused() -> None:
    class Doubled(Jump):
        """Its forward uses something made from the input."""

        @staticmethod
        def forward(x: Tensor, threshold: Tensor, width: float) -> Tensor:
            return x * (threshold * 2)

    model = fxsight.Model(NET, cache=False)
    with (
        pytest.raises(TraceError, match=r"an input of this .* is a tensor that was computed"),
        model.trace(X),
    ):
        _call(Doubled, model[0].output, THRESHOLD.exp(), 0.5).sum().backward()


def test_checkpoints_in_a_body() -> None:
    model = fxsight.Model(NET, cache=False)
    with model.trace(X):
        h = model[0].output
        checkpoint(lambda t: t.relu() * 2, h, use_reentrant=False).sum().backward()
        gradient = h.grad.save()
    assert torch.equal(gradient, 2 * (NET[0](X) > 0).float())
    with pytest.raises((TraceError, RuntimeError), match="checkpoint"), model.trace(X):
        h = model[0].output.requires_grad_()
        checkpoint(lambda t: t.relu() * THRESHOLD, h, use_reentrant=True).sum().backward()
        gradient = h.grad.save()


def test_in_an_edit_its_value_counts_and_its_gradient_is_refused() -> None:
    model = fxsight.Model(NET, cache=False)
    with model.edit(X) as edited:
        model[0].output = _call(Reverse, model[0].output)
    with edited.trace(X):
        out = edited.output.save()
    assert torch.equal(out, NET(X))
    with pytest.raises(TraceError, match=r"Function of an edit .*whose backward is not kept"), edited.trace(X):
        edited.output.sum().backward()
        edited.input.grad.save()


def test_in_a_branch_not_taken_it_is_forgotten() -> None:
    model = fxsight.Model(NET, cache=False)
    with model.trace(X) as tracer:
        h = model[0].output
        with tracer.cond(h.sum() > 1e9):
            model[0].output = _call(Reverse, h)
        model.output.sum().backward()
        gradient = h.grad.save()
    h = NET[0](X).requires_grad_()
    NET[2](NET[1](h)).sum().backward()
    assert torch.equal(gradient, h.grad)
