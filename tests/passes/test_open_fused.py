"""One fused operator, at one place, as the plain operators it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsight
from fxsight.address import Address
from fxsight.passes import OpenFused

AT = Address.parse("first/F_scaled_dot_product_attention_0")


class Attend(nn.Module):
    """Attention over itself, four heads of eight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(*x.shape[:-1], 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)


class Two(nn.Module):
    """Two attentions, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attend(), Attend()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x))
        return out


X = torch.randn(2, 5, 32)


@pytest.fixture(scope="module")
def model() -> fxsight.Model:
    return fxsight.Model(Two(), cache=False)


def _pattern(x: torch.Tensor) -> torch.Tensor:
    heads = x.view(*x.shape[:-1], 4, 8).transpose(1, 2)
    scores = heads @ heads.transpose(-2, -1) / 8**0.5
    pattern: torch.Tensor = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1)
    return pattern


def test_the_pattern_is_read_and_only_this_place_is_opened(model: fxsight.Model) -> None:
    with model.trace(X) as tracer:
        inside = model.first.ops.F_scaled_dot_product_attention_0.ops
        pattern = inside.softmax_0.output.save()
        out = model.output.save()
    assert torch.allclose(pattern, _pattern(X), atol=1e-6) and torch.allclose(out, Two()(X), atol=1e-5)
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    assert sum(node.target is sdpa for node in tracer.program.program.graph.nodes) == 1


def test_the_pattern_is_written(model: fxsight.Model) -> None:
    with model.trace(X):
        model.first.ops.F_scaled_dot_product_attention_0.ops.softmax_0.output[:] = torch.eye(5)
        first = model.first.output.save()
    assert torch.allclose(first, X, atol=1e-6)


def test_opening_twice_is_opening_once(model: fxsight.Model) -> None:
    with model.trace(X) as tracer:
        model.output.save()
    program = tracer._captured
    opened = OpenFused(AT)(program)
    assert opened is not program and OpenFused(AT)(opened) is opened
    assert opened.history[-1] == f"OpenFused(at={AT})"


def test_what_cannot_be_opened_says_so(model: fxsight.Model) -> None:
    with model.trace(X) as tracer:
        model.output.save()
    with pytest.raises(fxsight.UnknownAddress):
        OpenFused(Address.parse("first/nothing_0"))(tracer._captured)
