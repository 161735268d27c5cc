"""How blocks are built, as data: the children that tell a family, and where its values are.

Places are written as addresses below the block. A tuple that a module returns stands for its first member.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# A place that begins with "!" is none: what follows is the reason.
PARALLEL = "!attention and MLP read the same residual here, there is none between them"

COMMON: Mapping[str, str] = {"resid_pre": ":input", "resid_post": ":output"}
NAMES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")


@dataclass(frozen=True)
class Family:
    """Blocks with these children.

    attention: path of the module that calls the attention function.  flag: an attribute of the block or of its config
    that says that the residual is parallel.
    """

    children: frozenset[str]
    attention: str
    places: Mapping[str, str]
    flag: str = ""


def _family(children: str, attention: str, attn_out: str, resid_mid: str, mlp_out: str, flag: str = "") -> Family:
    places = {"attn_out": attn_out, "resid_mid": resid_mid, "mlp_out": mlp_out}
    return Family(frozenset(children.split()), attention, places, flag)


# The first whose children a block has all.
FAMILIES: tuple[Family, ...] = (
    _family(  # Gemma 2 and 3: norms after each part, too
        "input_layernorm self_attn post_attention_layernorm pre_feedforward_layernorm mlp post_feedforward_layernorm",
        "self_attn",
        "post_attention_layernorm:output",
        "pre_feedforward_layernorm:input",
        "post_feedforward_layernorm:output",
    ),
    _family(  # GLM 4
        "input_layernorm self_attn post_self_attn_layernorm post_attention_layernorm mlp post_mlp_layernorm",
        "self_attn",
        "post_self_attn_layernorm:output",
        "post_attention_layernorm:input",
        "post_mlp_layernorm:output",
    ),
    _family(  # Llama, Mistral, Qwen, Gemma, Mixtral, OLMoE, ...
        "input_layernorm self_attn post_attention_layernorm mlp",
        "self_attn",
        "self_attn:output",
        "post_attention_layernorm:input",
        "mlp:output",
    ),
    _family(  # OLMo 2: norms after each part alone
        "self_attn post_attention_layernorm mlp post_feedforward_layernorm",
        "self_attn",
        "post_attention_layernorm:output",
        "mlp:input",
        "post_feedforward_layernorm:output",
    ),
    _family("input_layernorm self_attn mlp", "self_attn", "self_attn:output", PARALLEL, "mlp:output"),  # Phi, Cohere
    _family("ln_1 attn ln_2 mlp", "attn", "attn:output", "ln_2:input", "mlp:output"),  # GPT-2, GPT-Neo, GPT-BigCode
    _family("ln_1 attn mlp", "attn", "attn:output", PARALLEL, "mlp:output"),  # GPT-J, CodeGen
    _family(  # GPT-NeoX, Pythia
        "input_layernorm attention post_attention_layernorm mlp",
        "attention",
        "attention:output",
        "post_attention_layernorm:input",
        "mlp:output",
        "use_parallel_residual",
    ),
    _family(  # Bloom: its parts add the residual themselves
        "input_layernorm self_attention post_attention_layernorm mlp",
        "self_attention",
        "self_attention.dense:output",
        "post_attention_layernorm:input",
        "mlp.dense_4h_to_h:output",
    ),
    _family(
        "self_attn self_attn_layer_norm fc1 fc2 final_layer_norm",
        "self_attn",
        "self_attn:output",
        "final_layer_norm:input",
        "!its MLP works on the tokens of all prompts in one row: see fc2",
    ),  # OPT
    _family(  # BERT, RoBERTa: norms after the sums
        "attention intermediate output",
        "attention.self",
        "attention.output.dense:output",
        "attention.output.LayerNorm:input",
        "output.dense:output",
    ),
)
