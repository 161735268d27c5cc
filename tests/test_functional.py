"""A finished program as a pure function, against ``torch.func`` on the plain module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import fxsight
from fxsight.errors import InputError, TraceError
from fxsight.functional import Functional
from tests.test_custom_functions import Net as Rounding
from tests.test_custom_functions import Round
from tests.zoo import ENTRIES

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # said by torch.func.jvp
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
V = torch.randn(8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers; a scale by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.outer((self.inner(x) * scale).tanh())
        return out


def _steered() -> tuple[Net, Functional, Any]:
    """A program that adds ``V`` to the inner layer's output, the function of it, and the same by hand."""
    net = Net().requires_grad_(False)
    model = fxsight.Model(net, cache=False)
    with model.trace(X, scale=torch.tensor(2.0)) as tracer:
        model.inner.output = model.inner.output + V
        model.output.save()

    def plain(x: Tensor, v: Tensor, scale: Tensor, weight: Tensor = net.inner.weight) -> Tensor:
        hidden = functional_call(net.inner, {"weight": weight}, (x,)) + v
        out: Tensor = net.outer((hidden * scale).tanh())
        return out

    return net, tracer.program.functional(), plain


TWO = torch.tensor(2.0)


def test_it_is_the_program() -> None:
    _, f, plain = _steered()
    assert torch.equal(f((X,), f.constants, scale=TWO)[0], plain(X, V, TWO))
    assert torch.equal(f((X[:2],), [V * 3], f.parameters, scale=TWO * 2)[0], plain(X[:2], V * 3, TWO * 2))
    assert f.constants == (V,) and set(f.parameters) == {"inner.weight", "inner.bias", "outer.weight", "outer.bias"}


def test_jvp_and_jacobians() -> None:
    net, f, plain = _steered()
    tangents = (torch.ones_like(X), torch.ones_like(V))
    mine = jvp(lambda x, v: f((x,), [v], scale=TWO)[0], (X, V), tangents)
    theirs = jvp(lambda x, v: plain(x, v, TWO), (X, V), tangents)
    torch.testing.assert_close(mine, theirs)
    weight = net.inner.weight
    found = jacrev(lambda w: f((X,), [V], {"inner.weight": w}, scale=TWO)[0])(weight)
    torch.testing.assert_close(found, jacrev(lambda w: plain(X, V, TWO, w))(weight))
    slope = grad(lambda s: f((X,), [V], scale=s)[0].sum())(TWO)
    torch.testing.assert_close(slope, grad(lambda s: plain(X, V, s).sum())(TWO))


def test_vmap() -> None:
    _, f, plain = _steered()
    many = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    found = vmap(lambda v: f((X,), [v], scale=TWO)[0])(many)
    torch.testing.assert_close(found, torch.stack([plain(X, v, TWO) for v in many]))
    per_row = vmap(grad(lambda v, x: f((x[None],), [v], scale=TWO)[0].sum()), (None, 0))(V, X)
    torch.testing.assert_close(per_row, vmap(grad(lambda v, x: plain(x, v, TWO).sum()), (None, 0))(V, X))


def test_a_language_model() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "gpt2")
    net = entry.make()
    (args, kwargs) = entry.inputs(2, 5)
    model: Any = fxsight.Model(net, cache=False)
    with torch.no_grad(), model.trace(*args, **kwargs) as tracer:
        model.output.logits.save()
    f, name = tracer.program.functional(), "transformer.h.0.mlp.c_fc.weight"
    weight = dict(net.named_parameters())[name]
    mine = grad(lambda w: f(args, (), {name: w}, **kwargs)[0].pow(2).sum())(weight)
    theirs = grad(lambda w: functional_call(net, {name: w}, args, kwargs).logits.pow(2).sum())(weight)
    torch.testing.assert_close(mine, theirs)


def test_what_does_not_fit() -> None:
    _, f, _ = _steered()
    with pytest.raises(InputError, match=r"takes 1 constants, the tensors that its body used, and is given 0"):
        f((X,), scale=TWO)
    with pytest.raises(InputError, match=r"constant 0 was float32\[8\] in the trace, and is given as float32\[4\]"):
        f((X,), [V[:4]], scale=TWO)
    with pytest.raises(InputError, match=r"no parameter 'iner.weight'; did you mean 'inner.weight'"):
        f((X,), [V], {"iner.weight": V}, scale=TWO)
    with pytest.raises(InputError, match="the program takes"):
        f((X,), [V])


def test_what_is_no_pure_function() -> None:
    model = fxsight.Model(Net(), cache=False)
    with model.trace(X, TWO) as tracer:
        hidden = model.inner.output
        model.output.sum().backward()
        hidden.grad.save()
    with pytest.raises(TraceError, match="a body with a backward pass is no pure function"):
        tracer.program.functional()
    with model.trace(X, TWO) as tracer:
        out = model.output
        if out.sum() < 1e9:
            out.save()
    with pytest.raises(InputError, match="the body has looked at numbers"):
        tracer.program.functional()
    norm = fxsight.Model(nn.Sequential(nn.BatchNorm1d(4)), cache=False)
    with norm.trace(X) as tracer:
        norm.output.save()
    with pytest.raises(TraceError, match=r"the model changes '0\.\w+' in place; put the model in eval mode"):
        tracer.program.functional()
    rounding = fxsight.Model(Rounding(Round), cache=False)
    with rounding.trace(X) as tracer:
        rounding.output.save()
    with pytest.raises(TraceError, match="a gradient would flow through Round"):
        tracer.program.functional()
