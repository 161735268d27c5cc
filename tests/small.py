"""Hugging Face's models made small: random weights, the same in every process; frozen, in evaluation mode."""

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

WORDS, WIDTH = 97, 16
_LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _made(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    net: nn.Module = cls(config).eval().requires_grad_(False)
    return net


def gpt2(**sizes: Any) -> GPT2LMHeadModel:
    """Two layers of width 16 with two heads, and 97 words, where not told otherwise."""
    own = {"vocab_size": WORDS, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    made: GPT2LMHeadModel = _made(GPT2LMHeadModel, GPT2Config(**{**own, "bos_token_id": 0, "eos_token_id": 0, **sizes}))
    return made


def llama(**sizes: Any) -> LlamaForCausalLM:
    """As ``gpt2``."""
    made: LlamaForCausalLM = _made(LlamaForCausalLM, LlamaConfig(**{**_LLAMA, **sizes}))
    return made


def mistral(**sizes: Any) -> MistralForCausalLM:
    """As ``gpt2``, with a sliding window of two tokens."""
    made: MistralForCausalLM = _made(MistralForCausalLM, MistralConfig(**{**_LLAMA, "sliding_window": 2, **sizes}))
    return made


def neox(**sizes: Any) -> GPTNeoXForCausalLM:
    """As ``gpt2``."""
    own = {name: size for name, size in _LLAMA.items() if name != "num_key_value_heads"}
    made: GPTNeoXForCausalLM = _made(GPTNeoXForCausalLM, GPTNeoXConfig(**{**own, **sizes}))
    return made


def bert(**sizes: Any) -> BertModel:
    """As ``gpt2``, without a head."""
    own = {name: size for name, size in _LLAMA.items() if name not in ("num_key_value_heads", "eos_token_id")}
    made: BertModel = _made(BertModel, BertConfig(**{**own, **sizes}))
    return made
