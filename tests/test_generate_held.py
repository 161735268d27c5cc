"""Numbers of later steps in the body of a generation: it is held there, nothing runs twice, and it ends as it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, MambaConfig, MambaForCausalLM

import fxsight
from fxsight import LanguageModel
from fxsight.errors import NeedsValueError, NotSavedError, TraceError
from tests import small
from tests.generating import GREEDY, IDS, hf, hooked, keep, t5

WAYS: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"do_sample": True}, {"use_cache": False}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_conditions_at_every_step(model: Any, module: Any, options: dict[str, Any]) -> None:
    numbers: list[float] = []

    def change(step: int, h: torch.Tensor) -> Any:
        numbers.append(float(h[0, -1].sum()))
        return h * -2 if numbers[-1] > 0 else h + 1

    torch.manual_seed(3)
    with hooked(module, "transformer.h.0", change), hooked(module, "lm_head", keep) as expected:
        ids = hf(module, **options)
    drawn = torch.rand(3)
    for _ in range(2):
        torch.manual_seed(3)
        logits: list[Any] = []
        seen: list[float] = []
        with model.generate(IDS, **{**GREEDY, **options}) as tracer:
            for _ in tracer.all():
                h = model.transformer.h[0].output
                seen.append(float(h[0, -1].sum()))
                model.transformer.h[0].output = h * -2 if seen[-1] > 0 else h + 1
                logits.append(model.lm_head.output.save())
            out = tracer.result.save()
        assert seen == numbers and torch.equal(out, ids) and torch.equal(torch.rand(3), drawn)
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


@pytest.mark.parametrize("name", ["mamba", "mistral"])
def test_caches_that_are_changed_in_place(name: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 97}
    torch.manual_seed(0)
    module: Any = MambaForCausalLM(MambaConfig(**sizes)).eval() if name == "mamba" else small.mistral()
    path = "backbone.layers.0" if name == "mamba" else "model.layers.0"
    numbers: list[float] = []
    with hooked(module, path, lambda step, h: numbers.append(float(h.sum()))):
        ids = hf(module, eos_token_id=-1)
    model: Any = LanguageModel(module)
    seen: list[float] = []
    with model.generate(IDS, **GREEDY, eos_token_id=-1) as tracer:
        for _ in tracer.all():
            seen += [float(model[path].output.sum())]
            assert float(model[path].output.sum() * 2) == seen[-1] * 2
    assert seen == numbers and torch.equal(tracer.result, ids)


def test_nothing_runs_twice(model: Any, module: Any) -> None:
    calls: list[int] = []
    kinds = LogitsProcessorList([lambda ids, scores: scores + 0 * len(calls)])
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        with model.generate(IDS, **GREEDY, logits_processor=kinds) as tracer:
            early = model.transformer.h[0].output  # held by a variable, so it stays, saved or not
            for step in tracer.iter[2:]:
                if step == 2:
                    number = float(model.transformer.h[0].output.sum())
            assert type(early) is torch.Tensor and early.shape == (2, 4, 32)
            for _ in tracer.iter[3]:
                last = (model.transformer.h[0].output + early[:, -1:]).save()
    finally:
        handle.remove()
    with hooked(module, "transformer.h.0", keep) as blocks:
        ids = hf(module)
    assert torch.equal(tracer.result, ids) and number == float(blocks[2].sum()) and len(calls) <= 4
    assert torch.equal(last, blocks[3] + blocks[0][:, -1:])


def test_what_has_run_is_past(model: Any) -> None:
    said = r"step 0 has run already, because a number of step 1 was needed \(.*py:\d+\): say before"
    with pytest.raises(TraceError, match=said), model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[1]:
            float(model.lm_head.output.sum())
        model.transformer.h[0].output[:] = 0
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS[:1]):
            for _ in tracer.iter[1]:
                float(model.lm_head.output.sum())
        with pytest.raises(TraceError, match="steps have run already"), tracer.invoke(IDS[1:]):
            pass


def test_a_loop_ends_with_the_generation(model: Any, module: Any) -> None:
    end = int(hf(module)[0, 5])
    tokens: list[int] = []
    with model.generate(IDS[:1], **GREEDY, eos_token_id=end) as tracer:
        for _ in tracer.iter[3]:
            late = model.lm_head.output.save()
        for _ in tracer.all():
            tokens.append(int(model.lm_head.output[0, -1].argmax()))
    assert tokens == tracer.result[0, 4:].tolist() and len(tokens) == 2
    with pytest.raises(NotSavedError, match="belongs to step 3, and this generation ended after 2 steps"):
        late + 1
    with (
        pytest.raises(NeedsValueError, match=r"a number of step 3 .* ended before"),
        model.generate(IDS[:1], **GREEDY, eos_token_id=end) as tracer,
    ):
        for _ in tracer.iter[3]:
            float(model.lm_head.output.sum())


def test_the_ids_and_a_stop(model: Any, module: Any) -> None:
    ids = hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        assert int(tracer.result[0, -1]) == int(ids[0, -1])
    assert torch.equal(tracer.result, ids)
    with model.generate(IDS, **GREEDY) as tracer:
        steps = fxsight.list()
        for step in tracer.all():
            steps.append(step)
            if int(model.lm_head.output[0, -1].argmax()) == int(ids[0, 6]):
                tracer.stop()
    assert torch.equal(tracer.result, ids[:, : 3 + len(steps)])


def test_an_encoder(module: Any) -> None:
    pair: Any = t5()
    with (
        hooked(pair, "encoder.block.1.layer.1", lambda step, h: h * 3) as encoded,
        hooked(pair, "decoder.block.0.layer.2", keep) as blocks,
    ):
        ids = hf(pair)
    model: Any = LanguageModel(pair)
    with model.generate(IDS, **GREEDY) as tracer:
        model.encoder.block[1].layer[1].output *= 3
        number = float(model.encoder.block[1].layer[1].output.sum())
        for _ in tracer.iter[1]:
            later = float(model.decoder.block[0].layer[2].output.sum())
        out = tracer.result.save()
    assert number == float(encoded[0].sum()) and later == float(blocks[1].sum()) and torch.equal(out, ids)


def test_where_there_are_none(model: Any) -> None:
    with pytest.raises(NeedsValueError, match="has beams"), model.generate(IDS, **GREEDY, num_beams=2) as tracer:
        for _ in tracer.iter[1]:
            float(model.lm_head.output.sum())
