"""What the tests of generations share: small models, and loops of hooks around the ``generate`` of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from tests import small

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
_PAIR: dict[str, Any] = {"d_model": 32, "vocab_size": 97, "decoder_start_token_id": 2, "pad_token_id": 0}


_VARIED: dict[str, Any] = {"initializer_range": 0.3, "tie_word_embeddings": False}


def gpt2() -> nn.Module:
    """Two layers of width 32, with weights so far apart that texts differ; token 96 ends a text."""
    made: nn.Module = small.gpt2(n_embd=32, eos_token_id=96, **_VARIED)
    return made


def llama() -> nn.Module:
    """As ``gpt2``."""
    made: nn.Module = small.llama(hidden_size=32, eos_token_id=96, **_VARIED)
    return made


def t5() -> nn.Module:
    """Two layers each of encoder and decoder; no token ends a text."""
    torch.manual_seed(0)
    config = T5Config(**_PAIR, d_kv=16, d_ff=64, num_layers=2, num_heads=2, eos_token_id=None)
    made: nn.Module = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    return made


def bart() -> nn.Module:
    """As ``t5``; the weights far apart, so that texts differ."""
    torch.manual_seed(0)
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes: dict[str, Any] = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "forced_eos_token_id": None}
    config = BartConfig(**_PAIR, **sides, **sizes, **ends, init_std=0.5)
    made: nn.Module = BartForConditionalGeneration(config).eval().requires_grad_(False)
    return made


class Stream:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@contextmanager
def hooked(module: nn.Module, path: str, change: Callable[[int, Any], Any]) -> Iterator[list[Any]]:
    """While open, the output of a submodule is changed at each call; the outputs are kept.

    change: given the number of the call and a copy of the output, which it changes, or instead of which it returns
    another.
    """
    seen: list[Any] = []

    def hook(_: Any, __: Any, output: Any) -> Any:
        own = (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()
        changed = change(len(seen), own)
        found = own if changed is None else changed
        seen.append(found[0].clone() if isinstance(found, tuple) else found.clone())
        return found

    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def keep(step: int, output: Any) -> None:
    """Changes nothing."""


def hf(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What transformers generates, from ``IDS`` where nothing else is given."""
    found: torch.Tensor = module.generate(*(args or (IDS,)), **{**GREEDY, **kwargs})
    return found
