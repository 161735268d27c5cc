"""Attribution: against the same formulas written with hooks, and against the sums they must add up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxsight
from fxsight.attribution import (
    attribution_patching,
    direct_logit_attribution,
    edge_attribution,
    integrated_gradients,
)
from fxsight.errors import InputError
from tests.test_gradients import twin

BLOCKS = [f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]


def _net() -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)).eval().requires_grad_(False)


def _ids(seed: int) -> Tensor:
    return torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(seed))


def _metric(model: Any) -> Any:
    return (model.output.logits[:, -1, 3] - model.output.logits[:, -1, 4]).sum()


def _outputs(net: Any, ids: Tensor, places: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(p).register_forward_hook(
            lambda m, a, out, p=p: found.__setitem__(p, out[0] if isinstance(out, tuple) else out)
        )
        for p in places
    ]
    with torch.no_grad():
        net(ids)
    for handle in handles:
        handle.remove()
    return found


def test_attribution_patching_is_value_times_gradient() -> None:
    net, clean, corrupted = _net(), _ids(1), _ids(2)
    model = fxsight.Model(net, cache=False)
    scores = attribution_patching(model, clean, corrupted, _metric, BLOCKS)
    one, other = _outputs(net, clean, BLOCKS), _outputs(net, corrupted, BLOCKS)
    with twin(net, dict.fromkeys(BLOCKS)) as gradients:
        logits = net(corrupted).logits[:, -1]
        (logits[:, 3] - logits[:, 4]).sum().backward()
    for place in BLOCKS:
        expected = ((one[place] - other[place]) * gradients[place]).sum(-1)
        assert torch.equal(scores.at(place=place).values, expected)
    assert len(scores.to_records()) == 4 * 3 * 6
    assert scores.to_records()[0].keys() == {"place", "dim_0", "dim_1", "value"}


def test_it_is_the_change_where_the_model_is_linear() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model = fxsight.Model(net, cache=False)
    clean, corrupted = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    scores = attribution_patching(model, clean, corrupted, lambda m: m.output.sum(), ["0", "1", "1:input"])
    difference = (net(clean) - net(corrupted)).sum()
    for place in ("0", "1", "1:input"):
        torch.testing.assert_close(scores.at(place=place).values.sum(), difference)


def test_integrated_gradients_add_up() -> None:
    net, ids = _net(), _ids(1)
    model = fxsight.Model(net, cache=False)
    place = "transformer.h.0.mlp"
    scores = integrated_gradients(model, {"input_ids": ids}, _metric, place, steps=64)
    handle = net.transformer.h[0].mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
    start = net(ids).logits[:, -1]
    handle.remove()
    end = net(ids).logits[:, -1]
    change = (end[:, 3] - end[:, 4]).sum() - (start[:, 3] - start[:, 4]).sum()
    torch.testing.assert_close(scores.sum(), change, rtol=1e-3, atol=1e-4)
    assert scores.shape == (3, 6, 32)


def test_integrated_gradients_of_a_baseline() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model, x = fxsight.Model(net, cache=False), torch.randn(3, 4)
    value = net[0](x).detach()
    assert not integrated_gradients(model, x, lambda m: m.output.sum(), "0", baseline=value, steps=1).any()
    with pytest.raises(InputError, match="steps=0: integrated gradients take at least one"):
        integrated_gradients(model, x, lambda m: m.output.sum(), "0", steps=0)


class Residual(nn.Module):
    """A residual stream of linear parts: every edge has its exact effect."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.a(h)
        out: Tensor = h + self.b(h)
        return out


def test_every_edge_of_a_linear_model() -> None:
    net = Residual().double().requires_grad_(False)
    model = fxsight.Model(net, cache=False)
    clean, corrupted = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    scores = edge_attribution(model, clean, corrupted, lambda m: m.output.sum(), ["embed", "a"], ["a:input", "b:input"])
    embed, other = net.embed(clean), net.embed(corrupted)
    first, second = net.a(embed), net.a(other)
    weights = {"a": net.a.weight, "b": net.b.weight}
    to_a = ((other - embed) @ weights["a"].T).sum() + ((other - embed) @ weights["a"].T @ weights["b"].T).sum()
    torch.testing.assert_close(scores.at(source="embed", target="a:input").values, to_a)
    torch.testing.assert_close(
        scores.at(source="embed", target="b:input").values, ((other - embed) @ weights["b"].T).sum()
    )
    torch.testing.assert_close(
        scores.at(source="a", target="b:input").values, ((second - first) @ weights["b"].T).sum()
    )
    assert scores.at(source="a", target="a:input").values.isnan()
    assert len(scores.to_records()) == 3


def test_logits_are_the_sum_of_what_is_written() -> None:
    net, ids = _net(), _ids(1)
    model = fxsight.Model(net, cache=False)
    token, other = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    places = ["transformer.wte", "transformer.wpe", *BLOCKS]
    with torch.no_grad():
        logits = net(ids).logits
        bias = (net.lm_head.weight[token] - net.lm_head.weight[other]) @ net.transformer.ln_f.bias
    scores = direct_logit_attribution(
        model, ids, places, norm="transformer.ln_f", unembed="lm_head", token=token, other=other
    )
    rows = torch.arange(3)
    difference = logits[rows, :, token] - logits[rows, :, other]
    torch.testing.assert_close(scores.values.sum(0) + bias[:, None], difference, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="the places have values of several shapes"):
        attribution_patching(model, ids, ids, _metric, places)
