"""Edited language models as two files that generate, with the keys and values kept: the tokens of ``generate``."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxsight import Model
from fxsight.errors import EditError, TraceError
from fxsight.export_check import check_generation
from tests import small


@cache
def _model(kind: str) -> Model:
    window = partial(small.mistral, sliding_window=4)
    made: dict[str, Any] = {"gpt2": small.gpt2, "llama": small.llama, "mistral": window, "bert": small.bert}
    return Model(made[kind](), cache=False)


def _ids(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def _steered(kind: str, block: str, **call: Any) -> Any:
    """Every token is pushed, and the last one of each step again."""
    model = _model(kind)
    edited: Any
    with model.edit(input_ids=_ids(), **call, parameters={"steer": torch.linspace(-3, 3, 16)}) as edited:
        model[block].output += torch.linspace(-3, 3, 16)
        model[block].output[:, -1] *= 1.5
    return edited


def _generate(folder: Path, inputs: dict[str, Any], count: int = 10) -> Tensor:
    prefill, decode = (torch.export.load(folder / f"{part}.pt2").module() for part in ("prefill", "decode"))
    out, tokens = prefill(**inputs), list[Tensor]()
    for _ in range(count):
        tokens.append(out["logits"][:, -1:].argmax(-1))
        inputs = {**inputs, "input_ids": tokens[-1]}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[-1])], -1)
            inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
        out = decode(**inputs, **out["past_key_values"])
    return torch.cat(tokens, -1)


def _wanted(edited: Any, ids: Tensor, **call: Any) -> Tensor:
    """What ``generate`` of transformers gives, with the edited model."""
    made = edited.compile(backend="eager").generate(
        ids, do_sample=False, max_new_tokens=10, eos_token_id=None, pad_token_id=0, **call
    )
    found: Tensor = made[:, ids.shape[1] :]
    return found


def test_gpt2(tmp_path: Path) -> None:
    edited = _steered("gpt2", "transformer.h.1")
    made = edited.export_generation(tmp_path, input_ids=_ids(), check=False)
    inputs = json.loads(made.decode.manifest.read_text())["inputs"]
    assert list(inputs)[:3] == ["input_ids", "past_key_values_layers_0_keys", "past_key_values_layers_0_values"]
    for ids in (_ids(), _ids(3, 9), _ids(1, 7)):
        assert torch.equal(_generate(tmp_path, {"input_ids": ids}), _wanted(edited, ids))
        assert not torch.equal(_generate(tmp_path, {"input_ids": ids}), _wanted(_model("gpt2"), ids))


@pytest.mark.slow
def test_checked_in_a_fresh_process(tmp_path: Path) -> None:
    made = _steered("gpt2", "transformer.h.1").export_generation(tmp_path, input_ids=_ids())
    assert made.cache == "past_key_values"
    for each in (made.prefill, made.decode):
        assert each.checked is not None and each.checked.bitwise
        content = json.loads(each.manifest.read_text())
        assert content["addresses"] == ["transformer.h.1:output"] and len(content["checked"]["other_sizes"]) == 2
    with pytest.raises(EditError, match="generate other tokens than the edited model"):
        wrong = torch.zeros(2, 3, dtype=torch.int64)
        check_generation(made.prefill.path, made.decode.path, made.cache, [({"input_ids": _ids()}, wrong)])


@pytest.mark.slow
def test_llama_with_prompts_of_different_lengths(tmp_path: Path) -> None:
    mask = torch.ones_like(_ids())
    mask[0, :2] = 0
    edited = _steered("llama", "model.layers.1", attention_mask=mask)
    edited.export_generation(tmp_path, input_ids=_ids(), attention_mask=mask)
    for rows, length in ((2, 5), (3, 8), (1, 4)):
        ids, mask = _ids(rows, length), torch.ones(rows, length, dtype=torch.int64)
        mask[0, :2] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        assert torch.equal(_generate(tmp_path, inputs), _wanted(edited, ids, attention_mask=mask))


@pytest.mark.slow
def test_one_prompt_as_the_example(tmp_path: Path) -> None:
    edited = _steered("llama", "model.layers.0")
    edited.export_generation(tmp_path, input_ids=_ids(1, 6), check=False)
    for ids in (_ids(1, 6), _ids(4, 3)):
        assert torch.equal(_generate(tmp_path, {"input_ids": ids}), _wanted(edited, ids))


def test_refused(tmp_path: Path) -> None:
    model = _model("gpt2")
    with pytest.raises(TraceError, match=r"an export needs an example of the prompts: edited.export_generation"):
        model.export_generation(tmp_path)
    with pytest.raises(EditError, match=r"from token ids: edited.export_generation\(folder, input_ids=ids\)"):
        model.export_generation(tmp_path, _ids())
    past = model(input_ids=_ids()).past_key_values
    with pytest.raises(EditError, match="the example is a prompt, without a cache"):
        model.export_generation(tmp_path, input_ids=_ids(2, 1), past_key_values=past)
    with pytest.raises(EditError, match="generating needs logits and a cache of keys and values; this forward returns"):
        _model("bert").export_generation(tmp_path, input_ids=_ids())
    with pytest.raises(EditError, match="the cache 'past_key_values' counts what it has seen, and what is exported"):
        _model("mistral").export_generation(tmp_path, input_ids=_ids(), check=False)
    assert not (tmp_path / "decode.pt2").exists()
