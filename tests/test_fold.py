"""Edits folded into weights: a plain module, a checkpoint of which computes the same; or a refusal with its reason."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxsight import Model
from fxsight.errors import FoldError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.again, self.bare = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.again.weight = self.bare.weight

    def forward(self, x: Tensor) -> Any:
        return self.bare(self.again(self.down(torch.relu(self.up(x)))))


def _x(rows: int = 3) -> Tensor:
    return torch.randn((rows, 5, 4), generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def model() -> Model:
    return Model(Net().requires_grad_(False), cache=False)


def test_sums_products_projections_and_columns(model: Model) -> None:
    v, d, m = torch.linspace(-1, 1, 8), torch.nn.functional.normalize(torch.ones(8), dim=0), torch.eye(8) * 2
    before = {name: t.clone() for name, t in model._module.state_dict().items()}
    with model.edit(_x()) as edited:
        model.up.output += v
    with edited.edit() as edited:
        h = edited.up.output
        edited.up.output = h - (h @ d).unsqueeze(-1) * d
    with edited.edit() as edited:
        edited.down.input[..., 2:4] = 0
    with edited.edit() as edited:
        edited.up.output = (edited.up.output @ m) / 3 - 1
    with edited.edit() as edited:
        edited.down.output[..., 1] *= 5
    folded = edited.fold_edits(_x())
    assert type(folded) is Net and folded is not model._module
    for rows in (3, 8):
        torch.testing.assert_close(folded(_x(rows)), edited(_x(rows)))
    assert all(torch.equal(t, before[name]) for name, t in model._module.state_dict().items())
    assert folded.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (lambda m: m.up.output.relu_(), r"torch.Tensor.relu_ is not linear"),
        (lambda m: m.up.output.clamp_(-1000, 1000), r"torch.Tensor.clamp_ is not linear"),
        (lambda m: m.up.output.__setitem__(slice(0, 1), 0), r"it chooses rows"),
        (lambda m: m.up.output.__setitem__((slice(None), 0), 0), r"it chooses rows"),
        (lambda m: m.up.output.mul_(m.up.output), "not the same affine function of every row"),
        (lambda m: m.up.output.add_(torch.arange(5.0)[:, None]), "some sizes only|of every row"),
        (lambda m: m.up.output.add_(m.up.input.sum()), "several places"),
        (lambda m: m.bare.output.mul_(2), r"its weight is that of again.weight and of bare.weight: the others would"),
        (lambda m: m.output.mul_(2), r"its weight is that of again.weight and of bare.weight"),
    ],
)
def test_refused(model: Model, body: Any, told: str) -> None:
    with model.edit(_x()) as edited:
        body(model)
    with pytest.raises(FoldError, match=told):
        edited.fold_edits(_x())


def test_a_layer_without_bias_takes_no_constant() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2)).requires_grad_(False)
    model = Model(net, cache=False)
    with model.edit(_x()) as edited:
        model[0].output += 1
    with pytest.raises(
        FoldError,
        match=r"it adds a constant, and aten.linear.default \(0/F_linear_0\) has no bias: a checkpoint would lose",
    ):
        edited.fold_edits(_x())
    with model.edit(_x()) as edited:
        model[0].output *= 2
    torch.testing.assert_close(edited.fold_edits(_x())(_x()), edited(_x()))


def test_what_others_see_is_compared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            h = x + 1
            return self.a(h) + self.b(h)

    model = Model(Shared().requires_grad_(False), cache=False)
    with model.edit(_x()) as edited:
        model.a.input[..., 0] = 0  # in place: b sees it, too
    with pytest.raises(FoldError, match="the folded module does not compute what the edited model computes"):
        edited.fold_edits(_x())
    with model.edit(_x()) as edited:
        model.a.input = model.a.input * 2  # assigned: b does not
    torch.testing.assert_close(edited.fold_edits(_x())(_x()), edited(_x()))


@cache
def _language(kind: str) -> Model:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=97, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        net: nn.Module = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        net = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes))
    return Model(net.eval().requires_grad_(False), cache=False)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_checkpoint(kind: str, tmp_path: Path) -> None:
    """A head zeroed and a direction ablated in what every layer writes: a checkpoint that others load."""
    model = _language(kind)
    ids = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    d = torch.nn.functional.normalize(torch.linspace(-1, 1, 16), dim=0)
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    names = ("attn.c_proj", "mlp.c_proj") if kind == "gpt2" else ("self_attn.o_proj", "mlp.down_proj")
    writers = [block[name] for block in blocks for name in names]
    edited = model
    for writer in writers:
        with edited.edit(input_ids=ids, use_cache=False) as edited:
            h = writer.output
            writer.output = h - (h @ d).unsqueeze(-1) * d
    with edited.edit(input_ids=ids, use_cache=False) as edited:
        writers[0].input[..., 8:16] = 0
    edited.fold_edits(input_ids=ids, use_cache=False).save_pretrained(tmp_path)
    loaded = type(model._module).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, edited(input_ids=ids, use_cache=False).logits)
