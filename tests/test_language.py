"""Language models: prompts become the call of the module."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxsight
from fxsight import InputError, LanguageModel

DEMO = Path(__file__).parent.parent / "docs" / "demo" / "model"
LONG, SHORT = "The Eiffel Tower is in the city of", "Rome is"
TOLERANCE = 2e-5  # of logits near 15: a padded row is computed by kernels for longer rows, which round otherwise


@cache
def _model() -> Any:
    return LanguageModel(str(DEMO))


def _plain(*prompts: Any, **kwargs: Any) -> Tensor:
    """The logits of the plain call of transformers."""
    model = _model()
    with torch.no_grad():
        logits: Tensor = model._module(**model.tokenizer(*prompts, return_tensors="pt", **kwargs)).logits
    return logits


def test_transformers_is_not_imported_with_fxsight() -> None:
    code = "import fxsight, sys; assert 'transformers' not in sys.modules; fxsight.LanguageModel"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prompt_has_the_bits_of_the_plain_call() -> None:
    model = _model()
    with model.trace(LONG):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, _plain(LONG))
    assert torch.equal(model.trace(LONG, trace=False).logits, logits)
    with model.scan(LONG):
        assert model.lm_head.output.shape == logits.shape


def test_prompts_of_one_length_are_one_batch() -> None:
    model = _model()
    with model.trace([LONG, LONG]):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, _plain([LONG, LONG]))


def test_invokes_of_different_lengths_have_the_values_they_have_alone() -> None:
    model = _model()
    with model.trace() as tracer:
        with tracer.invoke(SHORT) as invoker:
            short = model.lm_head.output.save()
            model.transformer.h[1].mlp.output *= 2
        with tracer.invoke(LONG):
            long = model.lm_head.output.save()
    with model.trace(SHORT):
        model.transformer.h[1].mlp.output *= 2
        alone = model.lm_head.output.save()
    length = alone.shape[1]
    assert list(invoker.inputs[1]) == ["input_ids", "attention_mask"] and tracer.invoker is not invoker
    assert short.shape == long.shape  # an invoke keeps the padded length, its tokens are at the end
    assert (short[:, -length:] - alone).abs().max() < TOLERANCE
    assert torch.equal(long, _plain(LONG))


def test_a_list_of_prompts_is_padded_as_invokes_are() -> None:
    model = _model()
    with model.trace([SHORT, LONG]):
        both = model.lm_head.output.save()
    length = _plain(SHORT).shape[1]
    assert (both[:1, -length:] - _plain(SHORT)).abs().max() < TOLERANCE
    assert (both[1:] - _plain(LONG)).abs().max() < TOLERANCE


def test_bad_prompts() -> None:
    model = _model()
    with pytest.raises(InputError, match="the prompt '' has zero tokens: a model needs at least one"):
        model.trace("")
    with pytest.raises(InputError, match="a prompt is a text, a list of texts, token ids or a tokenizer's result"):
        model.trace(1.5)
    with pytest.raises(InputError, match="a text needs a tokenizer, and this model has none"):
        LanguageModel(model._module).trace("text")


def test_a_shape_that_longer_prompts_change_is_refused_and_values_have_their_new_one() -> None:
    model = _model()
    message = r"the body has looked at a shape, \[1, 4, 64\], which is \[1, 8, 64\] with the rows of this invoke"

    def body() -> None:
        with model.trace() as tracer:
            with tracer.invoke(SHORT):
                state = model.transformer.h[0].output
                state[:, state.shape[1] - 1].save()
            with tracer.invoke(LONG):
                pass

    with pytest.raises(fxsight.TraceError, match=message):
        body()
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            state = model.transformer.h[0].output
            wide = state.size(-1)
        with tracer.invoke(LONG):
            own = model.transformer.h[0].output.save()
            model.transformer.h[0].output = state * 2
            written = model.transformer.h[0].output.save()
        first = fxsight.save(state)
    assert wide == 64 and first.shape == own.shape
    assert torch.equal(written, first * 2)
