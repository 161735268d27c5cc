"""Programs of the walkthrough on a language model, as they are written there; only the names of models are others."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fxsight.compat.nnsight import LanguageModel

DEMO = str(Path(__file__).parents[2] / "docs" / "demo" / "model")


@cache
def _llm() -> Any:
    return LanguageModel(DEMO, device_map="auto", dispatch=True)


def _predicted(prompt: str) -> str:
    llm = _llm()
    with torch.no_grad():
        logits = llm._module(**llm.tokenizer(prompt, return_tensors="pt")).logits
    return str(llm.tokenizer.decode(logits[0].argmax(-1)[-1]))


def test_g1(capsys: pytest.CaptureFixture[str]) -> None:
    llm: Any = LanguageModel(DEMO, device_map="auto")
    print(llm)
    printed = capsys.readouterr().out
    assert "(h): ModuleList(\n      (0-3): 4 x GPT2Block(" in printed and "(lm_head): Linear(" in printed
    assert llm.device.type == "meta"


def test_g2() -> None:
    llm = _llm()
    with warnings.catch_warnings():  # output[0] is the first row of the batch here, which is the only one
        warnings.simplefilter("ignore")
        with llm.trace("The Eiffel Tower is in the city of"):
            # Access the last layer using h[-1] as it's a ModuleList
            # Access the first index of .output as that's where the hidden states are.
            llm.transformer.h[-1].mlp.output[0][:] = 0

            # Logits come out of model.lm_head and we apply argmax to get the predicted token ids.
            token_ids = llm.lm_head.output.argmax(dim=-1).save()
    assert llm.tokenizer.decode(token_ids[0][-1]) == " Delhi"


def test_g3() -> None:
    llm = _llm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with llm.trace() as tracer:
            with tracer.invoke("The Eiffel Tower is in the city of"):
                # Ablate the last MLP for only this batch.
                llm.transformer.h[-1].mlp.output[0][:] = 0

                # Get the output for only the intervened on batch.
                token_ids_intervention = llm.lm_head.output.argmax(dim=-1).save()

            with tracer.invoke("The Eiffel Tower is in the city of"):
                # Get the output for only the original batch.
                token_ids_original = llm.lm_head.output.argmax(dim=-1).save()
    assert llm.tokenizer.decode(token_ids_original[0][-1]) == " Paris"
    assert llm.tokenizer.decode(token_ids_intervention[0][-1]) == " Delhi"


def test_g4() -> None:
    llm = _llm()
    with llm.trace("hello", invoker_args={"max_length": 10}) as tracer:
        invoker = tracer.invoker
    first = invoker.inputs
    with llm.trace() as tracer, tracer.invoke("hello", max_length=10) as invoker:
        invoker = invoker
    assert invoker.inputs[0] == first[0] == () and tracer.invoker is invoker
    assert torch.equal(invoker.inputs[1]["input_ids"], first[1]["input_ids"])
    assert torch.equal(first[1]["input_ids"], llm.tokenizer("hello", return_tensors="pt")["input_ids"])


def test_g5() -> None:
    llm, placeholder = _llm(), " _ _ _ _"  # as many tokens as the other prompt has
    with llm.trace() as tracer:
        with tracer.invoke("The Eiffel Tower is in the city of"):
            embeddings = llm.transformer.wte.output

        with tracer.invoke(placeholder):
            llm.transformer.wte.output = embeddings
            token_ids_intervention = llm.lm_head.output.argmax(dim=-1).save()

        with tracer.invoke(placeholder):
            token_ids_original = llm.lm_head.output.argmax(dim=-1).save()
    assert llm.tokenizer.decode(token_ids_original[0][-1]) == _predicted(placeholder)
    assert llm.tokenizer.decode(token_ids_intervention[0][-1]) == " Paris"


def test_g8() -> None:
    llm = _llm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with llm.trace("The Eiffel Tower is in the city of"):
            hidden_states = llm.transformer.h[-1].output[0].save()
    assert hidden_states.shape == (8, 64)  # a tensor has rows where the older model returned a tuple
