"""Caches of ``transformers`` among the inputs: structures of the program, grown in place as the module would."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import EncoderDecoderCache, LinearAttentionLayer

import fxsight
from fxsight.past import restore
from fxsight.tree import Tree, flatten

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 97}
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=97, n_positions=64, bos_token_id=0, eos_token_id=1),
    "llama": LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, **SIZES),
    "mistral": MistralConfig(num_hidden_layers=2, num_key_value_heads=1, sliding_window=8, **SIZES),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return model


def same(one: Any, other: Any) -> bool:
    """Whether two caches hold the same."""
    (mine, tree), (theirs, other_tree) = flatten(one), flatten(other)
    pairs = zip(mine, theirs, strict=True)
    return tree == other_tree and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_steps_are_those_of_the_module_and_are_captured_once(name: str) -> None:
    module = make(name)
    model = fxsight.Model(module, cache=False)
    mine, theirs = DynamicCache(config=CONFIGS[name]), DynamicCache(config=CONFIGS[name])
    layers = list(mine.layers)
    given = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    for step in range(9):
        if step == 2:
            made = model._captures.made
        with torch.no_grad(), model.trace(input_ids=given, past_key_values=mine, use_cache=True):
            logits = model.output.logits.save()
        with torch.no_grad():
            expected = module(input_ids=given, past_key_values=theirs, use_cache=True).logits
        assert torch.equal(logits, expected)
        assert same(mine, theirs)
        given = expected[:, -1:].argmax(-1)
    assert all(now is before for now, before in zip(mine.layers, layers, strict=True))
    assert model._captures.made - made <= (2 if name == "mistral" else 0)  # a full window is another program


def test_another_batch_needs_no_other_program() -> None:
    model = fxsight.Model(make("gpt2"), cache=False)
    for batch in (2, 3, 1):
        cache = DynamicCache(config=CONFIGS["gpt2"])
        for length in (3, 1):
            ids = torch.ones(batch, length, dtype=torch.long)
            with torch.no_grad(), model.trace(input_ids=ids, past_key_values=cache):
                logits = model.output.logits.save()
        assert logits.shape == (batch, 1, 97)
    assert model._captures.made <= 3


def test_an_edit_of_keys_is_in_the_cache() -> None:
    module = make("gpt2")
    model, cache = fxsight.Model(module, cache=False), DynamicCache(config=CONFIGS["gpt2"])
    with torch.no_grad(), model.trace(input_ids=torch.ones(2, 3, dtype=torch.long), past_key_values=cache):
        model.transformer.h[1].attn.c_attn.output[..., 32:] = 0
    assert not cache.layers[1].keys.any() and cache.layers[0].keys.any()


def test_a_static_cache_is_changed_in_its_own_memory() -> None:
    module = make("llama")
    model = fxsight.Model(module, cache=False)
    mine, theirs = (StaticCache(config=CONFIGS["llama"], max_cache_len=8) for _ in range(2))
    for cache in (mine, theirs):
        cache.early_initialization(2, 1, 16, torch.float32, torch.device("cpu"))
    memory = mine.layers[0].keys
    for ids in (torch.tensor([[5, 6, 7], [9, 8, 7]]), torch.tensor([[3], [4]]), torch.tensor([[1], [2]])):
        with torch.no_grad(), model.trace(input_ids=ids, past_key_values=mine):
            logits = model.output.logits.save()
        with torch.no_grad():
            expected = module(input_ids=ids, past_key_values=theirs).logits
        torch.testing.assert_close(logits, expected)  # the module chooses its kernel by a number in the cache
    assert mine.layers[0].keys is memory
    assert [x.shape for x in flatten(mine)[0] if isinstance(x, torch.Tensor)] == [
        x.shape for x in flatten(theirs)[0] if isinstance(x, torch.Tensor)
    ]
    assert mine.get_seq_length() == theirs.get_seq_length() == 5


def states() -> LinearAttentionLayer:
    layer = LinearAttentionLayer()
    layer.update_conv_state(torch.randn(1, 3, 4))
    return layer


@pytest.mark.parametrize(
    "past",
    [
        DynamicCache(config=CONFIGS["mistral"]),
        EncoderDecoderCache(DynamicCache(config=CONFIGS["gpt2"]), DynamicCache(config=CONFIGS["gpt2"])),
        StaticCache(config=CONFIGS["llama"], max_cache_len=4),
        states(),
    ],
    ids=lambda past: type(past).__name__,
)
def test_a_cache_is_its_members(past: Any) -> None:
    leaves, tree = flatten(past)
    assert Tree.from_json(json.loads(json.dumps(tree.to_json()))) == tree
    built = tree.build(leaves)
    assert type(built) is type(past) and same(built, past)
    empty = object.__new__(type(past))
    restore(empty, built)
    assert same(empty, past)
