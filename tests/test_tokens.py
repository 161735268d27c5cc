"""Tokens by their text: the same tokens alone, in a list of prompts, and in invokes that are padded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fxsight
from fxsight import InputError, LanguageModel, Model, TraceError

DEMO = str(Path(__file__).parent.parent / "docs" / "demo" / "model")
EIFFEL, ROME = "The Eiffel Tower is in the city of", "The Colosseum is in"


@cache
def _model() -> Any:
    return LanguageModel(DEMO)


def _alone(prompt: str, position: int) -> torch.Tensor:
    model = _model()
    with model.trace(prompt):
        hidden = model.transformer.h[1].output.save()
    return hidden[:, position]  # type: ignore[no-any-return]


def test_the_last_token_of_the_subject_is_one_line() -> None:
    model = _model()
    texts = model.tokens(EIFFEL).texts[0]
    last = next(i for i in range(len(texts)) if "".join(texts[: i + 1]).endswith("Tower"))
    with model.trace(EIFFEL) as tracer:
        found = model.transformer.h[1].output[tracer.tokens("Eiffel Tower").last].save()
        assert tracer.tokens("Eiffel Tower")[-1] == last - len(texts)
    assert torch.equal(found, _alone(EIFFEL, last))


def test_positions_hold_when_a_longer_invoke_comes() -> None:
    model = _model()
    with model.trace() as tracer:
        with tracer.invoke(ROME):
            at = tracer.tokens("Colosseum")
            first = model.transformer.h[1].output[at.last].save()
        with tracer.invoke(EIFFEL) as invoker:
            second = model.transformer.h[1].output[tracer.tokens("Tower").last].save()
        whole = tracer.tokens("is in")
        both = model.transformer.h[1].output[whole.first].save()
    assert len(invoker.inputs[1]["input_ids"][0]) > len(model.tokens(ROME).ids[0])
    assert (first - _alone(ROME, at[-1])).abs().max() < 2e-5  # padded: computed by kernels for longer rows
    assert torch.equal(second, _alone(EIFFEL, model.tokens(EIFFEL)("Tower")[-1]))
    for row, prompt in ((0, ROME), (1, EIFFEL)):
        assert (both[row] - _alone(prompt, model.tokens(prompt)("is in")[0])[0]).abs().max() < 2e-5


def test_rows_with_the_text_at_different_places() -> None:
    model = _model()
    prompts = [EIFFEL, "In Paris is the Eiffel Tower of"]
    with model.trace(prompts) as tracer:
        at = tracer.tokens("Eiffel Tower")
        read = model.transformer.h[1].output[at.last].save()
        model.transformer.h[1].output[at.last] = 0
        after = model.transformer.h[1].output.save()
        every = model.transformer.h[1].output[at.all].save()
    assert read.shape == (2, 64) and every.shape == (2, len(at.positions[0]), 64)
    for row, positions in enumerate(at.positions):
        assert (after[row, positions[-1]] == 0).all() and (after[row] == 0).all(-1).sum() == 1
        assert (read[row] - _alone(prompts[row], positions[-1])[0]).abs().max() < 2e-5
    with pytest.raises(InputError, match=r"the rows have it at different positions, .*: take .first, .last or .all"):
        at[-1]
    with pytest.raises(InputError, match=r"the text has \[1, 2\] tokens in different rows"):
        fxsight.tokens.Span(((1, 2), (1,))).all  # noqa: B018


def test_a_text_is_found_as_it_is_written() -> None:
    tokens = _model().tokens("Rome is Rome, and naïve 北京 is not")
    assert "".join(tokens.texts[0]) == "Rome is Rome, and naïve 北京 is not"
    assert repr(tokens).startswith(f"-{len(tokens.ids[0])}:'")
    assert tokens("Rome", nth=0)[0] == -len(tokens.ids[0]) < tokens("Rome", nth=-1)[0] < tokens("naïve")[0]
    covered = "".join(tokens.texts[0][position] for position in tokens("北京"))
    assert covered.strip() == "北京"
    with pytest.raises(
        InputError, match=r"'Rome' is 2 times in the prompt 'Rome is.*say which, tokens\('Rome', nth=0\)"
    ):
        tokens("Rome")
    with pytest.raises(InputError, match=r"'Rome' is 2 times in the prompt .*; there is no number 2"):
        tokens("Rome", nth=2)
    with pytest.raises(InputError, match="'Milan' is not in the prompt 'Rome is Rome"):
        tokens("Milan")


def test_where_there_are_no_tokens() -> None:
    model = _model()
    with model.trace() as tracer:
        with pytest.raises(TraceError, match="this trace has no input yet: its tokens are there inside"):
            tracer.tokens  # noqa: B018
        with tracer.invoke([[5, 6, 7]]):
            assert tracer.tokens.ids == [[5, 6, 7]]
    with pytest.raises(InputError, match="a text is found by the tokenizer, and this model has none"):
        LanguageModel(model._module).tokens([[1, 2]])("x")
    plain: Any = Model(torch.nn.Linear(2, 2), cache=False)
    with plain.trace(torch.ones(1, 2)) as tracer, pytest.raises(TraceError, match="this model has no tokenizer"):
        tracer.tokens  # noqa: B018
