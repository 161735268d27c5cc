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
_ASSISTS = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "vocab_size": 128},
    **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "sliding_window": 4},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_ADAPTER = {"adapter_out_dim": 32}
_LOCAL = {"encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32}}
_TWICE = {"attention_hidden_size": 64, "attention_head_dim": 16}
_SHARED = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, **_TWICE}
_INDEXED = {
    **_HYBRID,
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
    **{"indexer_compress_ratio": 2, "hc_lowrank": 8},
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
RECIPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _HEADS),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "dots3_note", "dots3_note_text"), _HEADS),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _HYBRID),
    **{kind: {"text_config": _HYBRID} for kind in ("qwen3_5", "qwen3_5_moe")},
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
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    **{kind: {"num_codebooks": 4} for kind in ("musicgen", "musicgen_melody")},
    "gemma4_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {**_ASSISTS, "num_kv_shared_layers": 4, "model_type": "gemma4_text"},
    },
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {**_ASSISTS, "model_type": "gemma4_unified_text"},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "youtu": _HEADS,
    "dots3_note": {
        "text_config": _HEADS,
        "audio_config": {"num_key_value_heads": 4, **_ADAPTER, "downsample_hidden_size": 16, "adapter_input_size": 32},
        "vision_config": {**_ADAPTER, "adapter_in_dim": 32, "mlp_layer_types": ["dense"] * 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "zaya": {"num_experts_per_tok": 1, "num_experts": 4},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
    "blt": {"encoder_hash_byte_group_vocab": 64, "use_cache": False, **_LOCAL},
    "zamba": _SHARED,
    "zamba2": {**_SHARED, "intermediate_size": 64, "num_key_value_heads": 4},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
}
# Whose causal language model takes the config of its decoder.
DECODERS = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}
RECIPES["deepseek_v2"]["num_experts_per_tok"] = 2
RECIPES["bailing_hybrid"] = {**_HYBRID, **_HEADS, "num_key_value_heads": 4}


def names() -> dict[str, str]:
    """Model types, and the names of their causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(kind: str) -> Any:
    """The config of a small model of a type."""
    from transformers import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[DECODERS.get(kind, kind)], RECIPES.get(kind, {}))


def _small(cls: Any, more: dict[str, Any]) -> Any:
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
    return cls(**{**parts, **sizes, **{name: value for name, value in more.items() if name not in parts}})


def make(kind: str) -> nn.Module:
    """A small random model in evaluation mode.

    Raises: ValueError when it is not small.
    """
    config = small_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in _made(kind, config).parameters())
    if size > 20_000_000:
        raise ValueError(f"not small: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return _made(kind, config).float().eval()


def _made(kind: str, config: Any) -> nn.Module:
    import transformers

    made: Any = getattr(transformers, names()[kind])._from_config if kind in DECODERS else None
    made = transformers.AutoModelForCausalLM.from_config if made is None else made
    return made(config, dtype=torch.float32)  # type: ignore[no-any-return]


def inputs(kind: str, batch: int, length: int) -> dict[str, Any]:
    """Token ids, or what the architecture takes instead."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    if kind.endswith("_assistant"):  # drafts for a larger model, whose embeddings and keys it is given
        keys = {layers: torch.randn(2, batch, 2, length, 8, generator=generator).unbind() for layers in _LAYERS}
        embeds = torch.randn(batch, length, 64, generator=generator)
        positions = torch.arange(length).expand(batch, length)
        return {"inputs_embeds": embeds, "shared_kv_states": keys, "position_ids": positions}
    rows = batch * 4 if kind in DECODERS else batch  # one row for each of 4 codebooks
    return {"input_ids": torch.randint(4, 100, (rows, length), generator=generator)}


_LAYERS = ("full_attention", "sliding_attention")
