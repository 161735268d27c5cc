"""Gradients on language models and convolutional networks, against hooks, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import fxsight
from tests.test_gradients import at, twin

WORDS = 50


def _gpt2() -> tuple[nn.Module, str]:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **sizes)), "transformer.h"


def _llama() -> tuple[nn.Module, str]:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)), "model.layers"


def _bert() -> tuple[nn.Module, str]:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForMaskedLM(BertConfig(vocab_size=WORDS, **sizes)), "bert.encoder.layer"


def _mamba() -> tuple[nn.Module, str]:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "state_size": 4, "time_step_rank": 2}
    return MambaForCausalLM(MambaConfig(vocab_size=WORDS, use_cache=False, **sizes)), "backbone.layers"


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(rows))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _weights(net: nn.Module) -> list[Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return found


def _same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("make", [_gpt2, _llama, _bert, _mamba])
def test_language_models(make: Callable[[], tuple[nn.Module, str]], frozen: bool) -> None:
    torch.manual_seed(0)
    net, blocks = make()
    net.eval().requires_grad_(not frozen)
    model = fxsight.Model(net, cache=False)
    names = [f"{blocks}.0", f"{blocks}.1"]
    for rows, length in ((3, 7), (2, 5), (1, 4)):
        ids = _ids(rows, length)
        with twin(net, {names[0]: None, names[1]: lambda g: g * 0.5}) as expected:
            net(ids).logits[:, -1].pow(2).sum().backward()
        weights = _weights(net)
        with model.trace(ids):
            outputs = [_first(at(model, name).output) for name in names]
            outputs[1].grad *= 0.5
            loss = model.output.logits[:, -1].pow(2).sum()
            loss.backward()
            kept = [h.grad.save() for h in outputs]
        assert all(torch.equal(g, expected[name]) for g, name in zip(kept, names, strict=True))
        assert _same(_weights(net), weights)


def test_rows_of_invokes() -> None:
    torch.manual_seed(0)
    net, _ = _gpt2()
    model: Any = fxsight.Model(net.eval().requires_grad_(False), cache=False)
    one, two = _ids(1, 6), _ids(2, 6)
    with model.trace(torch.cat([one, two])):
        h = model.transformer.h[0].output
        model.output.logits.pow(2).sum().backward()
        whole = h.grad.save()
    for factor in (1.0, 0.0):
        with model.trace() as tracer:
            with tracer.invoke(one):
                first = model.transformer.h[0].output.grad.save()
                loss = model.output.logits.pow(2).sum()
            with tracer.invoke(two):
                h = model.transformer.h[1].output
                h.grad = h.grad * factor
                second = model.transformer.h[0].output.grad.save()
                loss = loss + model.output.logits.pow(2).sum()
                loss.backward()
        torch.testing.assert_close(first, whole[:1])
        torch.testing.assert_close(second, whole[1:] * factor)


def test_inside_fused_attention() -> None:
    torch.manual_seed(0)
    net: Any = _gpt2()[0].eval().requires_grad_(False)
    model: Any = fxsight.Model(net, cache=False)
    ids = _ids(2, 5)
    address = "transformer.h.0.attn/attention_interface_0/torch_nn_functional_scaled_dot_product_attention_0/softmax_0"
    with model.trace(ids) as tracer:
        pattern = tracer.at(address).output
        loss = model.output.logits[:, -1].pow(2).sum()
        loss.backward()
        gradient = pattern.grad.save()
    eager = GPT2LMHeadModel(GPT2Config.from_dict({**net.config.to_dict(), "attn_implementation": "eager"})).eval()
    eager.load_state_dict(net.state_dict())
    out = eager(ids, output_attentions=True)
    out.attentions[0].retain_grad()
    out.logits[:, -1].pow(2).sum().backward()
    torch.testing.assert_close(gradient, out.attentions[0].grad, rtol=1e-4, atol=1e-6)


class Pixels(nn.Module):
    """Convolutions, running statistics, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.c2, self.fc = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c2(self.act(self.bn(self.c1(x))))
        out: Tensor = self.fc(nn.functional.max_pool2d(h, 2).mean((2, 3)))
        return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_convolutional_network(frozen: bool, training: bool) -> None:
    torch.manual_seed(0)
    net = Pixels().train(training).requires_grad_(not frozen)
    before, x = copy.deepcopy(net.state_dict()), torch.randn(2, 1, 8, 8)
    names = ["c1", "c2"]
    with twin(net, dict.fromkeys(names)) as expected:
        net(x).pow(2).sum().backward()
    weights, after = _weights(net), copy.deepcopy(net.state_dict())
    net.load_state_dict(before)
    model = fxsight.Model(net, cache=False)
    with model.trace(x):
        outputs = [at(model, name).output for name in names]
        model.output.pow(2).sum().backward()
        kept = [h.grad.save() for h in outputs]
    assert all(torch.equal(g, expected[name]) for g, name in zip(kept, names, strict=True))
    assert _same(_weights(net), weights)
    assert all(torch.equal(net.state_dict()[key], after[key]) for key in after)


def test_a_value_that_the_model_changes_in_place() -> None:
    """Its gradient is that of the value as it was read."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 2)).requires_grad_(False)
    model: Any = fxsight.Model(net, cache=False)
    x = torch.randn(3, 1, 8, 8)
    with model.trace(x):
        before, after = model[0].output.grad.save(), model[1].output.grad.save()
        model.output.pow(2).sum().backward()
    first = net[0](x).requires_grad_()
    second = first.relu()
    second.retain_grad()
    net[3](net[2](second)).pow(2).sum().backward()
    assert torch.equal(before, first.grad)
    assert torch.equal(after, second.grad)


def test_dropout_has_the_masks_of_eager() -> None:
    torch.manual_seed(0)
    net, _ = _gpt2()
    model: Any = fxsight.Model(net.train(), cache=False)
    ids = _ids(3, 7)
    torch.manual_seed(5)
    net(ids).logits.pow(2).sum().backward()
    expected = _weights(net)
    torch.manual_seed(5)
    with model.trace(ids):
        model.output.logits.pow(2).sum().backward()
    assert _same(_weights(net), expected)


def test_autocast() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    model: Any = fxsight.Model(net, cache=False)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(x).pow(2).sum().backward()
        expected = _weights(net)
        for _ in range(2):
            with model.trace(x):
                model.output.pow(2).sum().backward()
            assert _same(_weights(net), expected)


def test_checkpointing() -> None:
    """What a forward computes twice to save memory is computed once here; the numbers are the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    outer, x = Outer(), torch.randn(3, 8)
    outer(x).pow(2).sum().backward()
    expected = _weights(outer)
    model: Any = fxsight.Model(outer, cache=False)
    with model.trace(x):
        model.output.pow(2).sum().backward()
    assert _same(_weights(outer), expected)
