"""Generations in a session: values go from a trace to a generation, to a trace, to a generation, without saving."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxsight.errors import NotSavedError, TraceError
from tests.generating import GREEDY, IDS, hf, hooked, keep


def test_values_both_ways(model: Any, module: Any) -> None:
    with hooked(module, "transformer.h.0", keep) as clean:
        module(IDS[:, :2])
    with hooked(module, "transformer.h.0", lambda step, h: h + clean[0][:, -1:]) as blocks:
        ids = hf(module)
    with hooked(module, "transformer.h.1", lambda step, h: h - blocks[1]), hooked(module, "lm_head", keep) as logits:
        module(ids)
    for _ in range(2):
        with model.session():
            with model.trace(IDS[:, :2]):
                last = model.transformer.h[0].output[:, -1:]
            with model.generate(IDS, **GREEDY) as tracer:
                for step in tracer.all():
                    model.transformer.h[0].output += last
                    if step == 1:
                        second = model.transformer.h[0].output
                out = tracer.result
            with model.trace(out):
                model.transformer.h[1].output -= second
                found = model.lm_head.output.save()
        assert torch.equal(tracer.result, ids) and torch.equal(found, logits[0]) and torch.equal(out, ids)


def test_prompts_from_a_trace_and_loops(model: Any, module: Any) -> None:
    with model.session() as session:
        with model.trace(IDS):
            words = model.lm_head.output.argmax(-1)
        with model.generate(words, **GREEDY) as tracer:
            first = tracer.result.save()
        for count in session.iter([1, 2]):
            with model.generate(IDS, **{**GREEDY, "max_new_tokens": count}) as other:
                model.lm_head.output.save()
        said = r"written once for all elements: write `for item in session\.iter"
        with pytest.raises(TraceError, match=said), session.iter([1, 2]), model.generate(IDS, **GREEDY):
            pass
    assert torch.equal(first, hf(module, module(IDS).logits.argmax(-1))) and other.result.shape == (2, 6)


def test_what_nobody_holds_is_not_kept(model: Any) -> None:
    with model.session(), model.generate(IDS, **GREEDY) as tracer:
        for step in tracer.all():
            if step == 3:
                last = model.lm_head.output
    assert type(last) is torch.Tensor and last.shape == (2, 1, 97)
    with model.generate(IDS, **GREEDY) as tracer:
        unsaved = model.lm_head.output
    with pytest.raises(NotSavedError, match="was not saved"):
        unsaved + 1
