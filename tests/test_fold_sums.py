"""Edits of the residual stream folded into the weights that make it, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsight import Model
from fxsight.errors import FoldError
from tests import small

V = torch.linspace(-1, 1, 16)
D = nn.functional.normalize(torch.linspace(-1, 2, 16), dim=0)


@cache
def _model(kind: str, **options: Any) -> Model:
    net: nn.Module = {"gpt2": small.gpt2, "llama": small.llama, "neox": small.neox, "bert": small.bert}[kind](**options)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return Model(net, cache=False)


def _ids(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def _without(h: Any) -> Any:
    return h - (h @ D).unsqueeze(-1) * D


def _edited(model: Model, body: Callable[[Any], object], call: dict[str, Any]) -> Model:
    edited: Any
    with model.edit(input_ids=_ids(), **call) as edited:
        body(model)
    return edited  # type: ignore[no-any-return]


def _changed(model: Model, folded: nn.Module) -> list[str]:
    pairs = zip(model._module.named_parameters(), folded.named_parameters(), strict=True)
    return [name for (name, a), (_, b) in pairs if not torch.equal(a, b)]


def _assigned(block: Any) -> None:
    block.output = block.output + V


def _everywhere(embedded: Any, blocks: Any, norm: str) -> None:
    embedded.output = _without(embedded.output)
    for block in blocks:
        mid = block[norm]
        mid.input[:] = _without(mid.input)
        block.output = _without(block.output)


_GPT2, _LLAMA = "transformer.h", "model.layers"


_FOLDED: list[tuple[str, dict[str, Any], Callable[[Any], object], str]] = [
    ("gpt2", {}, lambda m: m.transformer.h[1].output.add_(V), f"{_GPT2}.1.mlp.c_proj.bias"),
    ("gpt2", {}, lambda m: _assigned(m.transformer.h[1]), f"{_GPT2}.1.mlp.c_proj.bias"),
    ("gpt2", {}, lambda m: m.transformer.h[1].ln_2.input.add_(V), f"{_GPT2}.1.attn.c_proj.bias"),
    ("gpt2", {}, lambda m: m.transformer.h[1].attn.output[0].sub_(V), f"{_GPT2}.1.attn.c_proj.bias"),
    ("gpt2", {}, lambda m: _assigned(m.transformer.h[0].ops.operator_add_0), f"{_GPT2}.0.attn.c_proj.bias"),
    ("gpt2", {}, lambda m: m.transformer.drop.output.add_(V), "transformer.wpe.weight"),
    ("gpt2", {}, lambda m: m.transformer.ln_f.output.add_(V), "transformer.ln_f.bias"),
    (
        "gpt2",
        {},
        lambda m: m.transformer.h[1].mlp.output.__setitem__(slice(None), 0),
        f"{_GPT2}.1.mlp.c_proj.weight {_GPT2}.1.mlp.c_proj.bias",
    ),
    ("llama", {"mlp_bias": True}, lambda m: m.model.layers[0].output.add_(V), f"{_LLAMA}.0.mlp.down_proj.bias"),
    ("neox", {}, lambda m: m.gpt_neox.layers[1].output.add_(V), "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"),
    ("bert", {}, lambda m: m.encoder.layer[1].output.add_(V), "encoder.layer.1.output.LayerNorm.bias"),
    (
        "llama",
        {},
        lambda m: _everywhere(m.model.embed_tokens, m.model.layers, "post_attention_layernorm"),
        " ".join(
            ["model.embed_tokens.weight"]
            + [f"{_LLAMA}.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")]
        ),
    ),
    (
        "gpt2",
        {"tie_word_embeddings": False},
        lambda m: _everywhere(m.transformer.drop, m.transformer.h, "ln_2"),
        " ".join(
            ["transformer.wte.weight", "transformer.wpe.weight"]
            + [
                f"{_GPT2}.{i}.{part}.c_proj.{name}"
                for i in (0, 1)
                for part in ("attn", "mlp")
                for name in ("weight", "bias")
            ]
        ),
    ),
]
_FAST = (0, 2, 5, 11)


@pytest.mark.parametrize(
    ("kind", "options", "body", "changed"),
    [pytest.param(*each, marks=() if i in _FAST else pytest.mark.slow) for i, each in enumerate(_FOLDED)],
)
def test_folded(kind: str, options: Any, body: Any, changed: str, tmp_path: Path) -> None:
    model = _model(kind, **options)
    call: dict[str, Any] = {} if kind == "bert" else {"use_cache": False}
    edited = _edited(model, body, call)
    folded: Any = edited.fold_edits(input_ids=_ids(), **call)
    assert _changed(model, folded) == changed.split()
    folded.save_pretrained(tmp_path)
    loaded = type(model._module).from_pretrained(tmp_path)
    for rows, length in ((3, 9), (2, 17)):
        want, got = edited(input_ids=_ids(rows, length), **call), loaded(input_ids=_ids(rows, length), **call)
        torch.testing.assert_close(got[0], want[0])
        assert not torch.allclose(got[0], model(input_ids=_ids(rows, length), **call)[0], atol=1e-4)


def test_it_generates_as_the_edited_model() -> None:
    model = _model("gpt2")
    edited = _edited(model, lambda m: [block.output.add_(V) for block in m.transformer.h], {})
    folded: Any = edited.fold_edits(input_ids=_ids())
    options: Any = {"max_new_tokens": 8, "do_sample": False}
    module: Any = edited.compile(backend="eager")
    assert torch.equal(folded.generate(_ids(), **options), module.generate(_ids(), **options))


def test_one_edit_after_another_at_one_place() -> None:
    model = _model("llama")
    call: dict[str, Any] = {"input_ids": _ids(), "use_cache": False}
    out = model.model.layers[1].mlp.down_proj
    with model.edit(**call) as edited:
        out.output = _without(out.output)
    with edited.edit(**call) as edited:
        out.output *= 3
    folded = edited.fold_edits(**call)
    assert _changed(model, folded) == ["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(folded(**call).logits, edited(**call).logits)


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        (
            "llama",
            lambda m: m.model.layers[1].output.add_(V),
            r"no summand of it has a bias of its own: .* use the same summand; it adds a constant, and "
            r"aten.linear.default \(model.layers.1.mlp.down_proj/F_linear_0\) has no bias: a checkpoint would lose it",
        ),
        (
            "gpt2",
            lambda m: _assigned_input(m.transformer.h[1].ln_2),
            r"aten.add.Tensor \(transformer.h.1/operator_add_\d\) reads the value without the edit",
        ),
        ("gpt2", lambda m: m.transformer.h[1].output[:, -1].add_(V), "it chooses rows"),
        ("gpt2", lambda m: m.transformer.h[1].output.mul_(2), r"aten.layer_norm.default .* use the same summand"),
        (
            "gpt2",
            lambda m: m.transformer.drop.output.mul_(2),
            "is that of transformer.wte.weight and of lm_head.weight",
        ),
        ("gpt2", lambda m: m.transformer.h[1].mlp.act.output.add_(torch.ones(64)), "which is no product with a number"),
        (
            "llama",
            lambda m: list(map(_project, m.model.layers)),
            r", of model.layers.0:output, cannot be folded into weights: .* use the same summand",
        ),
    ],
)
def test_refused(kind: str, body: Any, told: str) -> None:
    edited = _edited(_model(kind), body, {"use_cache": False})
    with pytest.raises(FoldError, match=told):
        edited.fold_edits(input_ids=_ids(), use_cache=False)


def _assigned_input(view: Any) -> None:
    view.input = view.input + V


def _project(view: Any) -> None:
    view.output = _without(view.output)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, twice: bool = False) -> Any:
        h = self.a(x)
        if twice:
            h = self.a(h)
        side = self.b(x)
        return self.drop(h) * 0.5 + side.sum(-1, keepdim=True), x @ self.a.weight + self.shift, side


def test_sums_written_by_hand() -> None:
    x, v = torch.randn(3, 4), torch.arange(4.0)
    model = Model(Odd().eval().requires_grad_(False), cache=False)

    def folded(body: Any, **call: Any) -> Any:
        with model.edit(x, **call) as edited:
            body()
        made = edited.fold_edits(x, **call)
        for one, other in zip(made(x, **call), edited(x, **call), strict=True):
            torch.testing.assert_close(one, other)
        return _changed(model, made)

    assert folded(lambda: model.output[1].add_(v)) == ["shift"]
    assert folded(lambda: model.b.output.add_(v)) == ["b.bias"]
    assert folded(lambda: model.ops.operator_mul_0.output.add_(v)) == ["a.bias"]  # half of it is added
    for body, told, call in [
        (lambda: model.output[0].add_(v), "one of its summands is scaled, or has other rows", {}),
        (lambda: model.output[1].mul_(2), "aten.matmul.default .*, which is no sum of what weights make", {}),
        (lambda: model.a.call(1).output.add_(v), "a.bias is used 2 times in this forward", {"twice": True}),
        (lambda: model.a.output.mul_(2), "a.weight is used 2 times in this forward", {}),
    ]:
        with pytest.raises(FoldError, match=told):
            folded(body, **call)
    model._module.train()
    with pytest.raises(FoldError, match=r"dropout is on: fold a model in eval\(\)"):
        folded(lambda: model.drop.output.add_(v))
