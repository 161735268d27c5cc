"""A generation that is stopped: what was asked before is there, what comes after is unset, the tokens so far are it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxsight import LanguageModel
from fxsight.errors import NotSavedError, TraceError
from tests.generating import GREEDY, IDS, Stream, hf, hooked, keep, t5


def test_at_a_step(model: Any, module: Any) -> None:
    with hooked(module, "lm_head", keep) as expected:
        ids = hf(module)
    for _ in range(2):
        logits: list[Any] = []
        with model.generate(IDS, **GREEDY) as tracer:
            for _ in tracer.iter[3]:
                late = model.lm_head.output.save()
            out = tracer.result.save()
            for step in tracer.all():
                logits.append(model.lm_head.output.save())
                if step == 2:
                    tracer.stop()
            logits.clear()  # not done
        assert torch.equal(out, ids[:, :6]) and torch.equal(tracer.result, ids[:, :6])
        assert all(torch.equal(a, b) for a, b in zip(logits, expected[:3], strict=True))
        with pytest.raises(
            NotSavedError, match=r"belongs to step 3, and this generation was stopped at step 2 \(.*py:"
        ):
            late + 1
    with model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.all():
            model.lm_head.output.save()
    assert torch.equal(tracer.result, ids)


def test_outside_a_loop_and_first(model: Any, module: Any) -> None:
    ids = hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[:2]:
            logits = model.lm_head.output.save()
        tracer.stop()
    assert logits.shape == (2, 1, 97) and torch.equal(tracer.result, ids[:, :5])
    stream = Stream()
    with model.generate(IDS[:1], **GREEDY, streamer=stream, return_dict_in_generate=True) as tracer:
        first = model.lm_head.output.save()
        tracer.stop()
    assert torch.equal(tracer.result, IDS[:1]) and first.shape == (1, 1, 97) and stream.seen[-1] == "end"


def test_at_a_value(model: Any, module: Any) -> None:
    with hooked(module, "transformer.h.0", lambda step, h: h * 2) as blocks:
        ids = hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        for step in tracer.all():
            late = model.transformer.h[1].output.save()
            model.transformer.h[0].output *= 2
            block = model.transformer.h[0].output.save()
            if step == 1:
                block.stop()
                break
        program = tracer.step(1)
    assert torch.equal(block, blocks[1]) and torch.equal(tracer.result, ids[:, :5])
    assert "transformer.h.0/" in str(program.program) and "h.1.mlp" not in str(program.program).partition("aten.")[2]
    with pytest.raises(NotSavedError, match=r"is computed later than transformer\.h\.0:output"):
        late + 1


@pytest.mark.parametrize("options", [{"use_cache": False}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_the_tokens_so_far(model: Any, module: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    ids = hf(module, **options)
    torch.manual_seed(3)
    with model.generate(IDS, **{**GREEDY, **options}) as tracer:
        for _ in tracer.iter[3]:
            tracer.stop()
    assert torch.equal(tracer.result, ids[:, :7])


def test_of_an_encoder_decoder_and_not_of_beams(model: Any) -> None:
    module: Any = t5()
    ids = hf(module)
    other: Any = LanguageModel(module)
    with other.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[2]:
            tracer.stop()
    assert torch.equal(tracer.result, ids[:, :3])
    with (
        pytest.raises(TraceError, match="stopping a generation with beams"),
        model.generate(IDS, num_beams=2) as tracer,
    ):
        tracer.stop()
