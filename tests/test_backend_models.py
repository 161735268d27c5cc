"""The backend of ``torch.compile`` on models of transformers, against hooks."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxsight import Model
from fxsight.backend import backend

VECTOR = torch.linspace(-1, 1, 16)


@pytest.fixture(autouse=True)
def _fresh() -> Generator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _gpt2() -> tuple[nn.Module, str, str, str]:
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)), "transformer.h.", "mlp", "attn"


def _llama() -> tuple[nn.Module, str, str, str]:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(hidden_size=16, intermediate_size=32, **heads, **tokens)
    return LlamaForCausalLM(config), "model.layers.", "mlp", "self_attn"


def _bert() -> tuple[nn.Module, str, str, str]:
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    return BertModel(config), "encoder.layer.", "attention.self.query", "attention.self"


def _logits(output: Any) -> Tensor:
    found: Tensor = output[0]
    return found


@pytest.mark.parametrize("make", [_gpt2, pytest.param(_llama, marks=pytest.mark.slow), _bert])
def test_blocks_heads_and_logits(make: Any) -> None:
    torch.manual_seed(0)
    net, block, mlp, attention = make()
    net.eval().requires_grad_(False)
    model = Model(net, cache=False)
    ids = torch.randint(1, 97, (2, 5))
    with model.edit(ids) as edited:
        early = model.get(f"{block}0").output
        model.get(f"{block}0").output[:] += VECTOR
        model.get(f"{block}1.{mlp}").output = early * 0.5
        found = model.get(f"{block}1.{attention}").output
        (found[0] if isinstance(found, tuple) else found)[:] *= 2
        model.output[0][:] += 1

    compiled: Any = torch.compile(net, backend=backend, options={"edits": edited, "inner": "eager"})
    for training, shape in ((False, (2, 5)), (False, (3, 7)), (True, (3, 7))):
        net.train(training)
        ids = torch.randint(1, 97, shape)
        torch.manual_seed(1)
        got = _logits(compiled(ids))
        torch.manual_seed(1)
        assert torch.equal(got, _hooked(net, block, mlp, attention, ids))


def _hooked(net: nn.Module, block: str, mlp: str, attention: str, ids: Tensor) -> Tensor:
    early: list[Tensor] = []

    def first(module: nn.Module, args: Any, out: Any) -> Any:
        early.append(out)
        return out + VECTOR

    def twice(module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    part = net.get_submodule
    handles = [
        part(f"{block}0").register_forward_hook(first),
        part(f"{block}1.{mlp}").register_forward_hook(lambda m, args, out: early[0] * 0.5),
        part(f"{block}1.{attention}").register_forward_hook(twice),
    ]
    try:
        return _logits(net(ids)) + 1
    finally:
        for handle in handles:
            handle.remove()
