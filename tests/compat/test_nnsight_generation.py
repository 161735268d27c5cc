"""Generation as nnsight's documents write it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxsight.compat.nnsight as nnsight
from fxsight.errors import TraceError


@pytest.fixture(scope="module")
def llm() -> Any:
    return nnsight.LanguageModel("docs/demo/model", dispatch=True)


def test_three_tokens(llm: Any) -> None:
    prompt = "The Eiffel Tower is in the city of"
    with llm.generate(prompt, max_new_tokens=3) as tracer:
        token_ids_1 = llm.lm_head.output.argmax(dim=-1).save()
        token_ids_2 = llm.lm_head.next().output.argmax(dim=-1).save()
        token_ids_3 = llm.lm_head.next().output.argmax(dim=-1).save()
        output = llm.generator.output.save()
    ids = llm.tokenizer(prompt, return_tensors="pt")
    expected = llm._module.generate(**ids, max_new_tokens=3)
    assert torch.equal(output, expected) and torch.equal(output.value, tracer.result)
    steps = [int(t[0][-1]) for t in (token_ids_1, token_ids_2, token_ids_3)]
    assert steps == expected[0, ids["input_ids"].shape[1] :].tolist()
    assert llm.tokenizer.batch_decode(output.value) == llm.tokenizer.batch_decode(expected)


def test_iterations(llm: Any) -> None:
    with llm.generate("The Colosseum is in", max_new_tokens=4) as tracer:
        kept = nnsight.list().save()
        for step in tracer.iter[1:3]:
            kept.append(llm.lm_head.output[0, -1].argmax())
            if step == 2:
                llm.transformer.h[-1].output[:] = 0
    assert len(kept) == 2 and all(type(x) is torch.Tensor for x in kept)


def test_no_service(llm: Any) -> None:
    with pytest.raises(TraceError, match="no service to run on"):
        llm.generate("Hello", remote=True)
