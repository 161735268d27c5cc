"""Every form of a prompt, and whose arguments are whose; the oracle is the plain call of transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from fxsight import InputError, LanguageModel, TraceError, save

DEMO = str(Path(__file__).parent.parent / "docs" / "demo" / "model")
LONG, SHORT = "The Eiffel Tower is in the city of", "Rome is"
TOLERANCE = 2e-5  # of logits near 15: a padded row is computed by kernels for longer rows, which round otherwise


@cache
def _model() -> Any:
    return LanguageModel(DEMO)


def _encoded(prompt: Any = LONG, **kwargs: Any) -> Any:
    return _model().tokenizer(prompt, return_tensors="pt", **kwargs)


def _plain(**kwargs: Any) -> Any:
    with torch.no_grad():
        return _model().dispatch()._module(**kwargs)


def _traced(*args: Any, **kwargs: Any) -> Any:
    model = _model()
    with torch.no_grad(), model.trace(*args, **kwargs) as tracer:
        logits = tracer.result.logits.save()
    return logits


def test_forms_of_a_prompt() -> None:
    encoded, expected = _encoded(), _plain(**_encoded()).logits
    ids = encoded["input_ids"]
    for form in (LONG, [LONG], ids, ids[0], ids.tolist(), ids[0].tolist(), dict(encoded), encoded, [ids[0]]):
        assert torch.equal(_traced(form), expected), form
    assert torch.equal(_traced(**encoded), expected) and torch.equal(_traced(input_ids=ids), expected)
    assert torch.equal(_traced([*ids.tolist(), *ids.tolist()]), _plain(input_ids=ids.repeat(2, 1)).logits)


def test_lists_of_different_lengths() -> None:
    ids = [_encoded(prompt)["input_ids"][0].tolist() for prompt in (SHORT, LONG)]
    both, texts = _traced(ids), _traced([SHORT, LONG])
    assert torch.equal(both, texts)
    for row, own in enumerate(ids):
        assert (both[row, -len(own) :] - _plain(input_ids=torch.tensor([own])).logits[0]).abs().max() < TOLERANCE


def test_labels() -> None:
    model, ids = _model(), _encoded()["input_ids"]
    expected = _plain(**_encoded(), labels=ids).loss
    for labels in (ids, LONG):
        with torch.no_grad(), model.trace(LONG, labels=labels):
            loss = model.output.loss.save()
        assert torch.equal(loss, expected)
    with torch.no_grad(), model.trace() as tracer:
        for prompt in (SHORT, LONG):
            with tracer.invoke(prompt, labels=prompt):
                pass
        loss = model.output.loss.save()
    losses = [
        (_plain(**_encoded(p), labels=_encoded(p)["input_ids"]).loss, _encoded(p)["input_ids"].shape[1] - 1)
        for p in (SHORT, LONG)
    ]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert (loss - mean).abs() < 1e-5  # padding has no part in it


def test_arguments_of_the_tokenizer_and_of_the_forward() -> None:
    model = _model()
    cut = _plain(**_encoded(max_length=3, truncation=True)).logits
    assert torch.equal(_traced(LONG, max_length=3, truncation=True), cut)
    assert torch.equal(_traced(LONG, invoker_args={"max_length": 3, "truncation": True}), cut)
    with torch.no_grad(), model.trace(LONG, output_hidden_states=True, use_cache=False, max_length=3, truncation=True):
        hidden = save(model.output.hidden_states)
        cache_ = model.output.past_key_values
    assert len(hidden) == 5 and hidden[0].shape == (1, 3, 64) and cache_ is None
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(LONG, max_length=3, truncation=True) as invoker:
            first = model.lm_head.output.save()
        with tracer.invoke(LONG, max_length=3, truncation=True):
            second = model.lm_head.output.save()
    assert torch.equal(first, cut) and torch.equal(second, cut)
    assert invoker.inputs[1]["input_ids"].tolist() == _encoded(max_length=3, truncation=True)["input_ids"].tolist()
    with model.trace(SHORT, padding="max_length", max_length=6):
        assert model.lm_head.output.shape[1] == 6


def test_invokes_of_several_forms_and_rows() -> None:
    model, ids = _model(), _encoded(SHORT)["input_ids"]
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke([SHORT, LONG]):
            pair = model.lm_head.output.save()
        with tracer.invoke(ids):
            short = model.lm_head.output.save()
        with tracer.invoke(LONG):
            model.transformer.h[0].output[:] = 0
        with tracer.invoke():
            everything = model.lm_head.output.save()
    assert pair.shape[0] == 2 and short.shape[0] == 1 and everything.shape[0] == 4
    assert (pair[1] - _plain(**_encoded()).logits[0]).abs().max() < TOLERANCE
    alone = _plain(input_ids=ids).logits
    for found in (short, pair[:1]):
        assert (found[:, -ids.shape[1] :] - alone).abs().max() < TOLERANCE


def _small(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    match kind:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16))
        case "bloom":
            return BloomForCausalLM(BloomConfig(vocab_size=1024, hidden_size=16, n_layer=2, n_head=4))
        case "opt":
            return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=64))
        case _:
            return RobertaForMaskedLM(RobertaConfig(**sizes, intermediate_size=16, max_position_embeddings=64))


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("bloom", "opt")]


@pytest.mark.parametrize("kind", ["llama", "roberta", *_SLOW])
def test_padding_is_right_in_other_architectures(kind: str) -> None:
    """Rotary, ALiBi, learned and counted positions."""
    model: Any = LanguageModel(_small(kind).eval(), tokenizer=DEMO)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(SHORT):
            short = tracer.model_output = model.output.logits.save()
        with tracer.invoke(LONG):
            long = model.output.logits.save()
    for found, prompt in ((short, SHORT), (long, LONG)):
        with torch.no_grad():
            alone = model._module(**_encoded(prompt)).logits
        assert (found[:, -alone.shape[1] :] - alone).abs().max() < 1e-5


def test_what_cannot_be_padded_is_refused() -> None:
    torch.manual_seed(0)
    net = RwkvForCausalLM(RwkvConfig(vocab_size=1024, hidden_size=16, num_hidden_layers=2, context_length=32)).eval()
    model: Any = LanguageModel(net, tokenizer=DEMO, cache=False)
    match = "prompts of different lengths in one batch: RwkvForCausalLM does not look at an attention mask, which could"
    with pytest.raises(TraceError, match=match), model.trace([SHORT, LONG]):
        pass


def test_bad_prompts() -> None:
    model = _model()
    empties: list[Any] = [
        "",
        ["text", ""],
        torch.ones(1, 0, dtype=torch.int64),
        torch.ones(0, dtype=torch.int64),
        [[]],
        [[1], []],
    ]
    for empty in empties:
        with pytest.raises(InputError, match="zero tokens: a model needs at least one"):
            model.trace(empty)
    for other in (1.5, [], [1.5], [["text"]], {"text"}):
        with pytest.raises(InputError, match="a prompt is a text, a list of texts, token ids or a tokenizer's result"):
            model.trace(other)
    with pytest.raises(InputError, match="a text needs a tokenizer, and this model has none"):
        LanguageModel(model._module).trace("text")
    with pytest.raises(TraceError, match="trace\\(\\) needs an input, or at least one"), model.trace(use_cache=False):
        pass
