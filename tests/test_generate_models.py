"""Generations of every kind of cache are those of transformers, with edits those of a loop with hooks: to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fxsight import LanguageModel

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [19, 18, 17, 16, 15, 14]])
COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 97,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {**COMMON, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
SEQUENCES: dict[str, Any] = {
    "d_model": 32,
    "vocab_size": 97,
    "decoder_start_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers.0.mlp", COMMON),
    "qwen3": ("model.layers.0.mlp", {**COMMON, "head_dim": 16}),
    "mistral": ("model.layers.0.mlp", {**COMMON, "sliding_window": 8}),
    "gemma3_text": (
        "model.layers.0.mlp",
        {**COMMON, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral": ("model.layers.0.mlp", {**EXPERTS, "num_local_experts": 4}),
    "olmoe": ("model.layers.0.self_attn.o_proj", {**EXPERTS, "num_experts": 4}),
    "mamba": ("backbone.layers.0", {k: COMMON[k] for k in COMMON if "heads" not in k and k != "intermediate_size"}),
    "bamba": ("model.layers.0", {**COMMON, **MAMBA, "attn_layer_indices": [1]}),
    "lfm2": ("model.layers.0", {**COMMON, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "t5": ("decoder.block.1.layer.2", {**SEQUENCES, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}),
    "bart": (
        "model.decoder.layers.0.fc1",
        {
            **SEQUENCES,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "forced_eos_token_id": None,
        },
    ),
}
QUICK = ("llama", "mamba", "t5")


def make(name: str) -> Any:
    config = transformers.CONFIG_MAPPING[name](**CONFIGS[name][1])
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if name in ("t5", "bart") else transformers.AutoModelForCausalLM
    return kind.from_config(config).eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CONFIGS]
)
def test_generations(name: str) -> None:
    module, path = make(name), CONFIGS[name][0]
    model: Any = LanguageModel(module, cache=False)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    seen: list[torch.Tensor] = []
    handles = [
        module.get_submodule(path).register_forward_hook(lambda m, a, out: _half(out)),
        module.get_submodule("lm_head").register_forward_hook(lambda m, a, out: seen.append(out.clone())),
    ]
    edited = module.generate(IDS, **greedy)
    for handle in handles:
        handle.remove()

    logits: list[Any] = []
    with model.generate(IDS, **greedy) as tracer:
        for _ in tracer.all():
            model[path].output = _half(model[path].output)
            logits.append(model.lm_head.output.save())
        ids = tracer.result.save()
    assert torch.equal(ids, edited)
    assert all(torch.equal(a, b) for a, b in zip(logits, seen, strict=True))

    with model.generate(IDS, **greedy) as tracer:
        for _ in tracer.all():
            model.lm_head.output.save()
    assert torch.equal(tracer.result, module.generate(IDS, **greedy))
    sampled = {**greedy, "do_sample": True}
    torch.manual_seed(1)
    expected = module.generate(IDS, **sampled)
    torch.manual_seed(1)
    with model.generate(IDS, **sampled) as tracer:
        for _ in tracer.all():
            model.lm_head.output.save()
    assert torch.equal(tracer.result, expected)
    assert model._captures.made <= (5 if "sliding_window" in CONFIGS[name][1] else 2)


def _half(output: Any) -> Any:
    return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5


def test_padded_prompts_have_a_mask() -> None:
    module: nn.Module = make("llama")
    model: Any = LanguageModel(module, cache=False)
    ids, mask = torch.tensor([[0, 0, 7], [5, 6, 7]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    greedy: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generate: Any = module.generate
    with model.generate(ids, **greedy) as tracer:
        for _ in tracer.all():
            model.lm_head.output.save()
    assert torch.equal(tracer.result, generate(ids, **greedy))


def test_a_static_cache() -> None:
    module: nn.Module = make("llama")
    model: Any = LanguageModel(module, cache=False)
    greedy: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    generate: Any = module.generate
    expected = generate(IDS, **greedy)
    with model.generate(IDS, **greedy) as tracer:
        for _ in tracer.all():
            model.lm_head.output.save()
    assert torch.equal(tracer.result, expected)
