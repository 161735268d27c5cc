"""Numbers of step 0 in the body of a generation: they are those of the prompt, computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fxsight.errors import NeedsValueError
from tests.generating import GREEDY, IDS, hf, hooked, keep


def changed(module: Any, change: Any, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The ids, and the outputs of block 0 before ``change(step, output)`` has changed them."""
    with hooked(module, "transformer.h.0", keep) as seen, hooked(module, "transformer.h.0", change):
        return hf(module, **options), seen


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"do_sample": True, "top_k": 20}])
def test_a_condition_on_a_number_of_the_prompt(model: Any, module: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    ids, seen = changed(module, lambda step, h: h * (2 if step else -1), **options)
    for _ in range(2):
        torch.manual_seed(3)
        with model.generate(IDS, **{**GREEDY, **options}) as tracer:
            h = model.transformer.h[0].output
            number = float(h.sum())
            if h.sum() == seen[0].sum():
                for step in tracer.all():
                    model.transformer.h[0].output *= 2 if step else -1
            kept = model.transformer.h[1].output.save()
            out = tracer.result.save()
        assert number == float(seen[0].sum()) and torch.equal(out, ids) and not kept.requires_grad


def test_a_number_after_an_edit_and_a_branch_not_taken(model: Any, module: Any) -> None:
    ids, seen = changed(module, lambda step, h: h + 1 if step == 0 else None)
    with model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[0]:
            model.transformer.h[0].output += 1
            if model.transformer.h[0].output.mean() < -100:
                model.transformer.h[1].output *= 0
        token = model.lm_head.output[0, -1].argmax().item()
        out = tracer.result.save()
    assert torch.equal(out, ids) and token == int(ids[0, 4])
    assert seen[0].shape == (2, 4, 32)


def test_it_is_computed_once(model: Any, module: Any) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        if model.transformer.h[0].output.mean() > 100:
            pass
        model.transformer.h[0].output.save()
        step = tracer.step(0)
        tracer.result.save()
    assert "known_" in str(step.program) and torch.equal(tracer.result, changed(module, lambda step, h: None)[0])


def test_numbers_in_an_invoke(model: Any, module: Any) -> None:
    ids, seen = changed(module, lambda step, h: torch.cat([h[:1] * 2, h[1:]]))
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS[:1]):
            h = model.transformer.h[0].output
            near = abs(float(h.sum()) - float(seen[0][:1].sum())) < 1e-4
            if near:
                for _ in tracer.all():
                    model.transformer.h[0].output *= 2
        with tracer.invoke(IDS[1:]):
            same = float(model.transformer.h[0].output.sum()) == float(seen[0][1:].sum())
        out = tracer.result.save()
    assert near and same and torch.equal(out, ids)


def test_where_there_are_none(model: Any) -> None:
    with (
        pytest.raises(NeedsValueError, match="a number of step 0 "),
        model.generate(IDS, **GREEDY, past_key_values=DynamicCache()),
    ):
        float(model.lm_head.output.sum())
