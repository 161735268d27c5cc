"""Models and inputs, the same numbers in every process: seeded, random weights, no gradients.

Imported by the nnsight worker, too: torch and transformers only.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, DEPTH = 64, 12


class Layers(nn.Module):
    """Twelve linear layers of 64 in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _frozen(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


def layers() -> nn.Module:
    """T1's model."""
    return _frozen(Layers)


def _language_model(**sizes: int | None) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _frozen(lambda: GPT2LMHeadModel(GPT2Config(**sizes)))


def toy() -> nn.Module:
    """T2's model: two layers of width 64, 128 tokens, GPT-2's architecture."""
    return deep(2)


def gpt2() -> nn.Module:
    """GPT-2 small with random weights: 12 layers, 12 heads, width 768, 50,257 tokens."""
    return _language_model()


def small() -> nn.Module:
    """For sweeps in seconds: four layers of width 256, 1,000 tokens, GPT-2's architecture."""
    return _language_model(n_layer=4, n_embd=256, n_head=4, vocab_size=1000, bos_token_id=None, eos_token_id=None)


def kernel() -> nn.Module:
    """A layer and GELU: the smallest for which Inductor writes a kernel."""
    return _frozen(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()))


def deep(depth: int, positions: int = 64) -> nn.Module:
    """T2's model with as many layers."""
    return _language_model(
        n_layer=depth, n_embd=64, n_head=4, vocab_size=128, n_positions=positions, bos_token_id=None, eos_token_id=None
    )


def speaking() -> nn.Module:
    """T2's model with room for 128 tokens more."""
    return _language_model(
        n_layer=2, n_embd=64, n_head=4, vocab_size=128, n_positions=256, bos_token_id=None, eos_token_id=None
    )


LANGUAGE: Mapping[str, Callable[[], nn.Module]] = {"toy": toy, "gpt2": gpt2}
SPEAKING: Mapping[str, Callable[[], nn.Module]] = {"toy": speaking, "gpt2": gpt2}
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    **LANGUAGE,
    "small": small,
    "kernel": kernel,
    "deep12": partial(deep, 12),
    "deep48": partial(deep, 48),
}


def rows() -> Tensor:
    """T1's input: f32[2, 64]."""
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


def tokens(net: Any, batch: int, length: int, seed: int = 1) -> Tensor:
    """Token ids for a language model: i64[batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, net.config.vocab_size, (batch, length), generator=generator)


def prompts(net: Any, quick: bool) -> list[Tensor]:
    """Prompts to harvest from, in batches: 64 of 16 tokens, 8 if quick; i64[8, 16] or i64[4, 16] each."""
    number, size = (8, 4) if quick else (64, 8)
    return list(torch.split(tokens(net, number, 16), size))


def direction(net: Any) -> Tensor:
    """A steering vector: f32[width]."""
    return torch.randn(net.config.n_embd, generator=torch.Generator().manual_seed(2))
