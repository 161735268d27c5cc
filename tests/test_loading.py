"""Loading of language models: by name, without weights at first; the oracle is transformers itself."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fxsight
from fxsight import LanguageModel, LoadError

DEMO = str(Path(__file__).parent.parent / "docs" / "demo" / "model")
PROMPT = "The Eiffel Tower is in the city of"
SIZES: Any = {"vocab_size": 1024, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


@cache
def _plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO)


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def _logits() -> Any:
    with torch.no_grad():
        return _plain()(**_tokenizer()(PROMPT, return_tensors="pt")).logits


def _traced(model: Any) -> Any:
    with torch.no_grad(), model.trace(PROMPT):
        logits = model.lm_head.output.save()
    return logits


def test_weights_are_loaded_by_the_first_trace() -> None:
    model: Any = LanguageModel(DEMO)
    block, raw = model.transformer.h[1], model._module.lm_head
    assert model.device.type == "meta" and "GPT2Block" in repr(model)
    with model.scan(PROMPT):
        assert block.output.shape == (1, 8, 64)
    assert "attention_interface_0" in repr(block.attn.source) and model.device.type == "meta"
    assert torch.equal(_traced(model), _logits())
    assert model.device.type == "cpu" and block is model.transformer.h[1] and raw is model._module.lm_head
    assert raw.weight is model._module.transformer.wte.weight and not model._module.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), _plain().parameters(), strict=True))


def test_weights_are_loaded_at_once_or_when_asked_for() -> None:
    assert LanguageModel(DEMO, dispatch=True).device == torch.device("cpu")
    model: Any = LanguageModel(Path(DEMO))
    assert model.dispatch() is model and model.device.type == "cpu"
    weight = model.lm_head.weight
    assert model.dispatch().lm_head.weight is weight  # nothing is loaded twice
    assert torch.equal(LanguageModel(DEMO)(PROMPT).logits, _logits())


def test_what_was_done_before_the_weights_came_stays() -> None:
    model: Any = LanguageModel(DEMO, rename={"transformer.h": "layers"})
    model.requires_grad_(False)
    model.layers[0].attn.train()
    model.probe = torch.nn.Linear(64, 2)
    own = model.layers[2].mlp = torch.nn.Identity()
    calls: list[int] = []
    handle = model._module.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.dispatch()
    assert not model.lm_head.weight.requires_grad and model.layers[0].attn.training and not model.layers[1].training
    assert model.layers[2].mlp._module is own and model.probe.weight.requires_grad
    handle.remove()
    model(PROMPT)
    assert not calls


def test_methods_and_copies_load_for_themselves() -> None:
    model: Any = LanguageModel(DEMO)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_traced(other), _logits()) and other.tokenizer.pad_token == _tokenizer().pad_token
    assert model.device.type == "meta"
    method = model.method("forward")
    model.dispatch()
    with method.trace(PROMPT) as tracer:
        logits = tracer.result.logits.save()
    assert torch.equal(logits, _logits()) and model.device.type == "cpu"
    assert torch.equal(_traced(pickle.loads(pickle.dumps(model))), _logits())


def test_arguments_of_from_pretrained() -> None:
    model: Any = LanguageModel(DEMO, dtype=torch.bfloat16, attn_implementation="eager")
    for _ in range(2):
        assert model.config._attn_implementation == "eager" and {p.dtype for p in model.parameters()} == {
            torch.bfloat16
        }
        model.dispatch()
    with pytest.raises(TypeError, match="dtype, automodel: for loading a model, and this one is loaded already"):
        LanguageModel(_plain(), dtype=torch.float16, automodel="AutoModel")


def test_the_tokenizer_of_the_user_is_left_as_it_is() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO, pad_token=None)
    before = tokenizer.padding_side, tokenizer.pad_token
    model: Any = LanguageModel(_plain(), tokenizer=tokenizer)
    with model.trace([PROMPT, "Rome"]):
        logits = model.lm_head.output.save()
    assert logits.shape[:2] == (2, 8) and (tokenizer.padding_side, tokenizer.pad_token) == before
    own = LanguageModel(DEMO).tokenizer
    assert (own.padding_side, own.pad_token) == ("left", "<|endoftext|>")
    assert LanguageModel(_plain(), tokenizer=DEMO).tokenizer.vocab_size == own.vocab_size


def test_heads(tmp_path: Path) -> None:
    masked = BertForMaskedLM(BertConfig(**SIZES, intermediate_size=8)).eval()
    masked.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    model: Any = LanguageModel(tmp_path)
    assert model.tokenizer is None and type(model._module) is BertForMaskedLM
    with model.trace(ids):
        logits = model.output.logits.save()
    assert torch.equal(logits, masked(ids).logits)
    assert type(LanguageModel(tmp_path, automodel="AutoModel").dispatch()._module) is BertModel
    assert type(LanguageModel(tmp_path, automodel=BertModel)._module) is BertModel


def test_an_encoder_decoder_begins_with_its_start_token(tmp_path: Path) -> None:
    config = T5Config(vocab_size=1024, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    torch.manual_seed(0)
    plain = T5ForConditionalGeneration(config).eval()
    plain.save_pretrained(tmp_path)
    model: Any = LanguageModel(tmp_path, tokenizer=DEMO)
    tokens, start = _tokenizer()(PROMPT, return_tensors="pt"), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad(), model.trace(PROMPT):
        logits = model.output.logits.save()
        hidden = model.encoder.block[1].output[0].save()
    with torch.no_grad():
        expected = plain(**tokens, decoder_input_ids=start)
    assert torch.equal(logits, expected.logits) and hidden.shape == (1, 8, 8)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke("Rome"):
            model.encoder.block[0].output[0][:] = 0
        with tracer.invoke(PROMPT):
            logits = model.output.logits.save()
    assert (logits - expected.logits).abs().max() < 1e-5  # the batch is computed by other kernels


def test_nothing_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = r"'owner/name' \(revision v2\) was not found: there is no folder .*owner/name, it is not in the cache "
    with pytest.raises(LoadError, match=text + r".*hub, and the hub was not asked \(offline mode\)"):
        LanguageModel("owner/name", revision="v2")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(LoadError, match=r"the folder .* is no complete model or tokenizer: [\s\S]*it holds notes.txt"):
        LanguageModel(str(tmp_path))
    _plain().config.save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    assert model.tokenizer is None
    with pytest.raises(LoadError, match=r"no file named model.safetensors[\s\S]*it holds config.json, "):
        model.trace([[1, 2]])
    with pytest.raises(LoadError, match="is no complete model or tokenizer: it has no tokens"):
        LanguageModel(DEMO, tokenizer=str(tmp_path))
    with pytest.raises(fxsight.InputError, match="a text needs a tokenizer, and this model has none"):
        model.scan("text")
