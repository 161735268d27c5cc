"""Small random models of every family we promise to work on, and names of one value of each kind in them.

All are seeded, tiny (width 32, two layers, 97 tokens), float32, in evaluation mode, made without a network.
`ENTRIES` is what tests run over; `TinyTransformer` is what random programs run over.
Importing this file loads torch alone; a transformers model is imported when its entry is made.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 97
WIDTH = 32
Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class FunctionOp:
    """A call of a Python function or torch operation in the `forward` of a module.

    module: path of the module.  name: the operation's name there, such as `attention_interface_0`.
    place: gives the object (a Python module, or a mapping of functions) and the key under which that
    `forward` looks the function up whenever it calls it: replacing it there intercepts the call.
    call: which of the calls of that function during one forward of the model this is, from 0.
    """

    module: str
    name: str
    place: Callable[[], tuple[Any, str]]
    call: int


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    make: builds it, the same weights each time.  inputs: (batch, length) to positional, keyword arguments.
    module: path of a block; its output is a tensor, or a tuple whose first element is one.
    inner: path of a module inside such a block, an MLP where there is one; its output is a tensor.
    op: a module call in a `forward`: path of the module whose forward it is, the operation's name there, and
    the path of the module called, where a hook meets the same value.
    function: an operation that is no module call; its output is a tensor, or a tuple that begins with one.
    batches, lengths: sizes to test; every batch goes with every length.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    module: str
    inner: str
    op: tuple[str, str, str]
    function: FunctionOp
    batches: tuple[int, ...] = (2, 3)
    lengths: tuple[int, ...] = (5, 8)

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Every (batch, length) to test."""
        return itertools.product(self.batches, self.lengths)


# --------------------------------------------------------------------------------------------- models of ours


class ResidualUnit(nn.Module):
    """conv, norm, ReLU, conv, norm, plus the input, ReLU; sum and ReLU in place, as in most vision models."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """f32[batch, channels, side, side] to the same shape."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        activated: Tensor = self.relu(out)
        return activated


class ConvNet(nn.Module):
    """A small image classifier: stem, max pooling, two residual units, mean over the image, linear."""

    def __init__(self, channels: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.units = nn.Sequential(ResidualUnit(channels), ResidualUnit(channels))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.normal_(norm.get_buffer("running_mean"), std=0.2)
            nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """f32[batch, 3, side, side] to logits f32[batch, classes]."""
        x = F.relu(self.norm(self.stem(pixels)))
        x = F.max_pool2d(x, 2)
        x = self.units(x)
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


class Readout(nn.Module):
    """A two-layer perceptron with tanh."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """f32[batch, width] to f32[batch, classes]."""
        x = torch.tanh(self.up(x))
        x = self.down(x)
        return x


class CellLoop(nn.Module):
    """A GRU cell called in a Python loop, a fixed number of times: one module, `steps` addresses."""

    def __init__(self, features: int = 6, width: int = WIDTH, steps: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.width = width
        self.steps = steps
        self.inp = nn.Linear(features, width)
        self.cell = nn.GRUCell(width, width)
        self.readout = Readout(width, classes)

    def forward(self, sequence: Tensor) -> Tensor:
        """f32[batch, steps, features] to logits f32[batch, classes]."""
        state = sequence.new_zeros(sequence.shape[0], self.width)
        inputs = self.inp(sequence)
        for step in range(self.steps):
            state = self.cell(inputs[:, step], state)
        logits: Tensor = self.readout(state)
        return logits


class Attention(nn.Module):
    """Causal self-attention over `heads` heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """f32[batch, length, width] to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Up, GELU, down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """f32[batch, length, width] to the same shape."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """A pre-norm block; its two sums are the residual stream. `drop` returns the very tensor it is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """f32[batch, length, width] to the same shape."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class TinyTransformer(nn.Module):
    """A causal language model in plain PyTorch, made for random programs: modules share tensors in many ways.

    The output of one block, the input of the next and the input of its `ln_1` are one tensor, which the
    residual sum reads again; `ln_1`'s output is `attn`'s input; `attn.proj`'s output is `attn`'s; `drop`
    returns its input. Every width is even, so that any value can be halved.
    """

    def __init__(self, width: int = 16, heads: int = 2, blocks: int = 3, vocab: int = 98) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.pos = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """i64[batch, length] to logits f32[batch, length, vocab]."""
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.ln_f(x))
        return logits


# ----------------------------------------------------------------------------------------- making and feeding


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Make a model from a seed, in evaluation mode, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def tiny_transformer(seed: int = 0) -> TinyTransformer:
    """Three blocks, width 16, two heads; norms with random weights, so that they cannot be confused."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = TinyTransformer()
        for norm in (m for m in net.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    return net.eval()


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, i64[batch, length]; none of them 0, 1 or 2, which are special to some models."""
    generator = torch.Generator().manual_seed(1_000_000 * seed + 1_000 * batch + length)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def _hub(config: str, model: str, **options: Any) -> nn.Module:
    """A transformers model of the given configuration class and model class, with random weights."""
    transformers = importlib.import_module("transformers")
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = getattr(transformers, config)(**(special | options))
    return seeded(lambda: getattr(transformers, model)(settings))


def _decoder(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    """How to make a decoder that names its sizes as Llama does."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return partial(_hub, config, model, **(sizes | options))


def _by_position(batch: int, length: int) -> Inputs:
    return (token_ids(batch, length),), {"use_cache": False}


def _by_keyword(batch: int, length: int) -> Inputs:
    return (), {"input_ids": token_ids(batch, length), "use_cache": False}


def _masked(batch: int, length: int) -> Inputs:
    """The last two tokens of the first row are padding."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, -2:] = 0
    return (), {"input_ids": token_ids(batch, length), "attention_mask": mask}


def _two_texts(batch: int, length: int) -> Inputs:
    """An encoder's tokens and a shorter text for the decoder."""
    ids = {"input_ids": token_ids(batch, length), "decoder_input_ids": token_ids(batch, length - 2, seed=1)}
    return (), {**ids, "use_cache": False}


def _normal(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def _pixels(batch: int, length: int) -> Inputs:
    return (), {"pixel_values": _normal(batch, 3, length, length)}


def _image(batch: int, length: int) -> Inputs:
    return (_normal(batch, 3, length, length),), {}


def _sequence(batch: int, length: int) -> Inputs:
    return (_normal(batch, length, 6),), {}


def _attention_functions() -> tuple[Any, str]:
    return importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS, "sdpa"


def _named(module: str, key: str) -> tuple[Any, str]:
    return importlib.import_module(module), key


def _attention(module: str, call: int) -> FunctionOp:
    """The call of the attention function (SDPA) in an attention module; its output is (tensor, None)."""
    return FunctionOp(module, "attention_interface_0", _attention_functions, call)


def _like_llama(name: str, config: str, model: str, **options: Any) -> Entry:
    """An entry whose modules are named as Llama's are."""
    attention = "model.layers.1.self_attn"
    return Entry(
        name=name,
        make=_decoder(config, model, **({"num_key_value_heads": 2} | options)),
        inputs=_by_keyword,
        module="model.layers.0",
        inner="model.layers.0.mlp",
        op=(attention, "self_o_proj_0", f"{attention}.o_proj"),
        function=_attention(attention, call=1),
    )


_GEMMA_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="gpt2",
        make=partial(
            _hub,
            "GPT2Config",
            "GPT2LMHeadModel",
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            n_positions=64,
        ),
        inputs=_by_position,
        module="transformer.h.0",
        inner="transformer.h.0.mlp",
        op=("transformer.h.1.attn", "self_c_proj_0", "transformer.h.1.attn.c_proj"),
        function=_attention("transformer.h.1.attn", call=1),
    ),
    _like_llama("llama", "LlamaConfig", "LlamaForCausalLM"),
    _like_llama("qwen3", "Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    _like_llama("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, **_GEMMA_LAYERS),
    _like_llama("mistral", "MistralConfig", "MistralForCausalLM", sliding_window=4),
    _like_llama("mixtral", "MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    _like_llama("phi3", "Phi3Config", "Phi3ForCausalLM"),
    Entry(
        name="gpt_neox",
        make=_decoder("GPTNeoXConfig", "GPTNeoXForCausalLM"),
        inputs=_by_keyword,
        module="gpt_neox.layers.0",
        inner="gpt_neox.layers.0.mlp",
        op=("gpt_neox.layers.1.attention", "self_dense_0", "gpt_neox.layers.1.attention.dense"),
        function=_attention("gpt_neox.layers.1.attention", call=1),
    ),
    Entry(
        name="opt",
        make=_decoder("OPTConfig", "OPTForCausalLM", ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH),
        inputs=_by_keyword,
        module="model.decoder.layers.0",
        inner="model.decoder.layers.0.fc2",
        op=("model.decoder.layers.1", "self_activation_fn_0", "model.decoder.layers.1.activation_fn"),
        function=_attention("model.decoder.layers.1.self_attn", call=1),
    ),
    Entry(
        name="bloom",
        make=_decoder("BloomConfig", "BloomForCausalLM"),
        inputs=_by_keyword,
        module="transformer.h.0",
        inner="transformer.h.0.mlp",
        op=("transformer.h.1.mlp", "self_dense_4h_to_h_0", "transformer.h.1.mlp.dense_4h_to_h"),
        function=FunctionOp(
            "transformer.h.1.self_attention",
            "F_softmax_0",
            partial(_named, "torch.nn.functional", "softmax"),
            call=1,
        ),
    ),
    Entry(
        name="mamba",
        make=_decoder("MambaConfig", "MambaForCausalLM", state_size=8),
        inputs=_by_keyword,
        module="backbone.layers.0",
        inner="backbone.layers.0.mixer",
        op=("backbone.layers.1.mixer", "self_in_proj_0", "backbone.layers.1.mixer.in_proj"),
        function=FunctionOp(
            "backbone.layers.1.mixer",
            "causal_conv1d_fn_0",
            partial(_named, "transformers.models.mamba.modeling_mamba", "causal_conv1d_fn"),
            call=1,
        ),
    ),
    Entry(
        name="bert",
        make=_decoder("BertConfig", "BertForMaskedLM"),
        inputs=_masked,
        module="bert.encoder.layer.0",
        inner="bert.encoder.layer.0.intermediate",
        op=("bert.encoder.layer.1.attention", "self_output_0", "bert.encoder.layer.1.attention.output"),
        function=_attention("bert.encoder.layer.1.attention.self", call=1),
    ),
    Entry(
        name="t5",
        make=partial(
            _hub,
            "T5Config",
            "T5ForConditionalGeneration",
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=8,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
        ),
        inputs=_two_texts,
        module="decoder.block.0",
        inner="encoder.block.0.layer.1.DenseReluDense",
        op=(
            "decoder.block.1.layer.2.DenseReluDense",
            "self_wo_0",
            "decoder.block.1.layer.2.DenseReluDense.wo",
        ),
        function=_attention("encoder.block.1.layer.0.SelfAttention", call=1),
    ),
    Entry(
        name="vit",
        make=_decoder("ViTConfig", "ViTForImageClassification", image_size=16, patch_size=8, num_labels=10),
        inputs=_pixels,
        module="vit.layers.0",
        inner="vit.layers.0.mlp",
        op=("vit.layers.1.mlp", "self_fc2_0", "vit.layers.1.mlp.fc2"),
        function=_attention("vit.layers.1.attention", call=1),
        lengths=(16,),
    ),
    Entry(
        name="cnn",
        make=partial(seeded, ConvNet),
        inputs=_image,
        module="units.0",
        inner="units.0.bn2",
        op=("units.1", "self_conv2_0", "units.1.conv2"),
        function=FunctionOp("", "F_max_pool2d_0", partial(_named, "torch.nn.functional", "max_pool2d"), call=0),
        lengths=(8, 12),
    ),
    Entry(
        name="rnn",
        make=partial(seeded, CellLoop),
        inputs=_sequence,
        module="cell",
        inner="readout.up",
        op=("", "self_cell_0", "cell"),
        function=FunctionOp("readout", "torch_tanh_0", partial(_named, "torch", "tanh"), call=0),
        lengths=(4,),
    ),
)
