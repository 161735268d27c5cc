"""Small random models of every causal-LM architecture that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# What a size is called, and how small it is made, wherever a config has one of that name.
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("linear_num_key_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads", "attention_heads"), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("attention_head_dim", "dim_head", "d_head", "linear_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "dff"), 64),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "intermediate_size_mlp", "feed_forward_size", "n_inner"), 64),
    **dict.fromkeys(("dense_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim", "index_topk", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("vocab_size", "hidden_size_per_layer_input_vocab", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 64),
    **dict.fromkeys(("attention_hidden_size", "embedding_size", "word_embed_proj_dim", "backbone_hidden_size"), 32),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "attention_head_size"), 8),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 8),
}

# What has to be said besides.
_HEADS = {"num_key_value_heads": 4}  # latent attention has as many keys as queries
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
RECIPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _HEADS),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "dots3_note", "dots3_note_text"), _HEADS),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "bailing_hybrid"), _HYBRID),
    **{kind: {"text_config": _HYBRID} for kind in ("qwen3_5", "qwen3_5_moe", "qwen4_exp")},
    **{kind: {"rotary_dim": 4} for kind in ("codegen", "gptj")},
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "deepseek_v2": {**_HEADS, "topk_group": 1, "n_group": 1},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": {**_HYBRID, **_HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "reformer": {"is_decoder": True},
}


def names() -> dict[str, str]:
    """Model types, and the names of their causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(kind: str) -> Any:
    """The config of a small model of a type."""
    from transformers import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[kind], RECIPES.get(kind, {}))


def _small(cls: Any, more: dict[str, Any]) -> Any:
    given = {k: v for k, v in more.items() if not isinstance(v, dict)}
    try:
        usual = cls()
    except Exception:  # it has no usual form: the recipe says all
        return cls(**more)
    renamed = {value: key for key, value in (getattr(usual, "attribute_map", None) or {}).items()}
    sizes = {}
    for name, value in vars(usual).items():
        size = SMALL.get(name, SMALL.get(renamed.get(name, "")))
        if size is not None and isinstance(value, int) and not isinstance(value, bool):
            sizes[name] = size
    parts = {
        name: _small(type(part), more.get(name, {})).to_dict()
        for name, part in vars(usual).items()
        if hasattr(part, "to_dict") and hasattr(part, "model_type")
    }
    return cls(**{**parts, **sizes, **given})


def make(kind: str) -> nn.Module:
    """A small random model in evaluation mode.

    Raises: ValueError when it is not small.
    """
    from transformers import AutoModelForCausalLM

    config = small_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 20_000_000:
        raise ValueError(f"not small: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def inputs(kind: str, batch: int, length: int) -> dict[str, Any]:
    """Token ids."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return {"input_ids": torch.randint(4, 100, (batch, length), generator=generator)}
