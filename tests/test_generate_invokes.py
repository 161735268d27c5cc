"""Invokes in a generation: each sees and edits its rows at each step; the twin is a loop with hooks on those rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxsight
from fxsight import LanguageModel
from fxsight.errors import TraceError
from tests.generating import GREEDY, gpt2, hooked, keep, llama, t5

ONE, TWO = [5, 6, 7, 8], [[9, 8, 7, 6], [3, 2, 4, 1]]
LONG = [[11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26]]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows of one length, padded on the left by hand."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    positions = torch.tensor([[0] * (length - len(row)) + list(range(len(row))) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def test_each_invoke_has_its_rows_at_each_step(model: Any, module: Any) -> None:
    with hooked(module, "lm_head", keep) as expected:
        ids = module.generate(torch.tensor([ONE, *TWO]), **GREEDY)
    for _ in range(2):
        first: list[Any] = []
        second: list[Any] = []
        with model.generate(**GREEDY) as tracer:
            with tracer.invoke(ONE):
                for _ in tracer.iter[:]:
                    assert model.lm_head.output.shape == (1, 1, 97)
                    first.append(model.lm_head.output.save())
                own = tracer.result.save()
            with tracer.invoke(TWO):
                for _ in tracer.iter[1:3]:
                    second.append(model.lm_head.output.save())
                others = model.generator.output.save()
            out = tracer.result.save()
        assert torch.equal(out, ids) and torch.equal(own, ids[:1]) and torch.equal(others, ids[1:])
        assert torch.equal(tracer.result, ids)
        assert all(torch.equal(a, b[:1]) for a, b in zip(first, expected, strict=True))
        assert all(torch.equal(a, b[1:]) for a, b in zip(second, expected[1:3], strict=True))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_edits_of_rows_with_prompts_of_several_lengths(make: Callable[[], nn.Module]) -> None:
    module: Any = make()
    path = "transformer.h.0" if hasattr(module, "transformer") else "model.layers.0"
    vector = torch.linspace(-3, 3, 32)

    def change(step: int, h: torch.Tensor) -> None:
        if step in (0, 2):
            h[:1] += vector
        h[1:, -1] *= step + 2

    with hooked(module, path, change) as blocks, hooked(module, "lm_head", keep) as expected:
        ids = module.generate(**padded([ONE, *LONG]), **GREEDY)
    model: Any = LanguageModel(module)
    for backend in ("eager", "auto"):
        logits: list[Any] = []
        with model.generate(**GREEDY, backend=backend) as tracer:
            with tracer.invoke(ONE):
                for _ in tracer.iter[[0, 2]]:
                    model[path].output += vector
                    block = model[path].output.save()
            with tracer.invoke(LONG):
                for step in tracer.all():
                    model[path].output[:, -1] *= step + 2
            for _ in tracer.all():
                logits.append(model.lm_head.output.save())
            out = tracer.result.save()
        assert torch.equal(out, ids) and torch.equal(block, blocks[2][:1])
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    plain = module.generate(**padded([ONE, *LONG]), **GREEDY)
    assert not torch.equal(ids[:1], plain[:1]) and not torch.equal(ids[1:], plain[1:])


def test_a_shorter_prompt_after_a_longer_one_and_alone(model: Any, module: Any) -> None:
    alone = module.generate(torch.tensor([ONE]), **GREEDY)
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(LONG):
            pass
        with tracer.invoke(ONE) as invoker:
            first = model.lm_head.output[:, -1].save()
            second = model.lm_head.next().output[:, -1].save()
            own = tracer.result[:, -4:].save()
    with hooked(module, "lm_head", keep) as expected:
        module.generate(torch.tensor([ONE]), **GREEDY)
    assert torch.equal(own, alone[:, -4:]) and invoker.inputs[1]["input_ids"].tolist() == [ONE]
    assert (first - expected[0][:, -1]).abs().max() < 1e-5 and (second - expected[1][:, -1]).abs().max() < 1e-5


def test_values_go_from_invoke_to_invoke_and_from_step_to_step(model: Any, module: Any) -> None:
    kept: list[torch.Tensor] = []

    def patch(step: int, h: torch.Tensor) -> None:
        kept.append(h.clone())
        h[1:, -1] += kept[0][:1, -1] * (step == 2)
        h[1:, -1] -= h[:1, -1]

    with hooked(module, "transformer.h.0", patch):
        ids = module.generate(torch.tensor([ONE, *TWO]), **GREEDY)
    with model.generate(**GREEDY) as tracer:
        sources: list[Any] = []
        with tracer.invoke(ONE):
            for _ in tracer.all():
                sources.append(model.transformer.h[0].output[:, -1])
        with tracer.invoke(TWO):
            for step in tracer.all():
                model.transformer.h[0].output[:, -1] += sources[0] * (step == 2)
                model.transformer.h[0].output[:, -1] -= sources[step]
        out = tracer.result.save()
    assert torch.equal(out, ids)


def test_values_of_a_step_in_a_later_one_when_longer_prompts_come(model: Any) -> None:
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(ONE):
            first = model.transformer.h[0].output
            for _ in tracer.iter[1]:
                h = model.transformer.h[0].output
                model.transformer.h[0].output = (h * first).mean(1, keepdim=True)
        said = r"transformer\.h\.0:output.* of an earlier step is used at step 1, .* \[1, 6, 32\], not \[1, 4, 32\]"
        with pytest.raises(TraceError, match=said), tracer.invoke(LONG):
            pass


def test_a_shape_that_longer_prompts_change(model: Any) -> None:
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(ONE):
            last = model.transformer.h[0].output[:, model.transformer.h[0].output.shape[1] - 1]
            last.save()
        said = r"a shape of step 0, \[1, 4, 32\], which is \[1, 6, 32\] .* longest prompt first, .* h\.size\(-1\)"
        with pytest.raises(TraceError, match=said), tracer.invoke(LONG):
            pass
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(ONE):
            ones = torch.ones(model.transformer.h[0].output.size(-1))
            scaled = (model.transformer.h[0].output * ones).save()
        with tracer.invoke(LONG):
            pass
    assert scaled.shape == (1, 6, 32)


def test_several_sequences_for_each_prompt(model: Any, module: Any) -> None:
    way = {**GREEDY, "do_sample": True, "num_return_sequences": 2}

    def change(step: int, h: torch.Tensor) -> None:
        h[2:] *= 0

    torch.manual_seed(3)
    with hooked(module, "transformer.h.0", change) as expected:
        ids = module.generate(torch.tensor([ONE, *TWO]), **way)
    torch.manual_seed(3)
    with model.generate(**way) as tracer:
        with tracer.invoke(ONE):
            block = model.transformer.h[0].output.save()
            own = tracer.result.save()
        with tracer.invoke(TWO):
            for _ in tracer.all():
                model.transformer.h[0].output[:] = model.transformer.h[0].output * 0
        out = tracer.result.save()
    assert torch.equal(out, ids) and torch.equal(own, ids[:2]) and torch.equal(block, expected[0][:2])


def _triple(step: int, output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output)[1:] *= 3


def test_an_encoder_decoder() -> None:
    module: Any = t5()
    with hooked(module, "decoder.block.0.layer.2", _triple):
        ids = module.generate(torch.tensor([ONE, *TWO]), **GREEDY)
    model: Any = LanguageModel(module)
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(ONE):
            own = tracer.result.save()
        with tracer.invoke(TWO):
            for _ in tracer.all():
                model.decoder.block[0].layer[2].output *= 3
        out = tracer.result.save()
    assert torch.equal(out, ids) and torch.equal(own, ids[:1])


def test_an_edited_model_and_a_block_for_all_rows(model: Any, module: Any) -> None:
    def change(step: int, h: torch.Tensor) -> None:
        h *= 0.5
        h[1:] += 1
        if step == 1:
            h -= 2

    with hooked(module, "transformer.h.0", change):
        ids = module.generate(**padded([ONE, *LONG]), **GREEDY)
    with model.edit(ONE) as edited:
        model.transformer.h[0].output = model.transformer.h[0].output * 0.5
    with edited.generate(**GREEDY) as tracer:
        with tracer.invoke(ONE):
            pass
        with tracer.invoke(LONG):
            for _ in tracer.all():
                edited.transformer.h[0].output += 1
        with tracer.invoke(), tracer.iter[1]:
            edited.transformer.h[0].output -= 2
        out = tracer.result.save()
    assert torch.equal(out, ids)


def test_prompts_as_texts() -> None:
    model = fxsight.LanguageModel("docs/demo/model", dispatch=True)
    one, two = "The Eiffel Tower is in the city of", "The Colosseum is in"
    with model.generate(max_new_tokens=3) as tracer:
        with tracer.invoke(one):
            at = tracer.tokens("Eiffel Tower").last
            value = model.transformer.h[1].output[at].save()
            first = tracer.result[0, -3:].save()
        with tracer.invoke(two):
            second = tracer.result[0, -3:].save()
    both = model.generate([one, two], max_new_tokens=3, trace=False)
    assert torch.equal(both[:, -3:], torch.stack([first, second]))
    with model.trace(one) as tracer:
        alone = model.transformer.h[1].output[tracer.tokens("Eiffel Tower").last].save()
    assert (value - alone).abs().max() < 1e-5


def test_what_invokes_do_not_do(model: Any) -> None:
    def asked(**options: Any) -> Any:
        return model.generate(**{**GREEDY, **options})

    with pytest.raises(TraceError, match=r"num_beams=2: rows change their places"), asked(num_beams=2) as tracer:
        tracer.invoke(ONE).__enter__()
    with pytest.raises(TraceError, match="custom_generate: rows change"), asked(custom_generate="x") as tracer:
        tracer.invoke(ONE).__enter__()
    with pytest.raises(TraceError, match="has no prompt yet"), asked() as tracer:
        model.lm_head.output.save()
    with pytest.raises(TraceError, match="has no prompt yet"), asked() as tracer:
        tracer.tokens  # noqa: B018
    with pytest.raises(TraceError, match=r"needs a prompt, or at least one `with tracer\.invoke"), asked():
        pass
    with pytest.raises(TraceError, match="the first invoke of a trace needs an input"), asked() as tracer:
        tracer.invoke().__enter__()
    with model.generate(ONE, **GREEDY) as tracer:
        with pytest.raises(TraceError, match="has its prompts from generate"):
            tracer.invoke(TWO)
        with tracer.invoke():
            ids = tracer.result.save()
    assert ids.shape == (1, 8)


def test_where_invokes_cannot_stand(model: Any) -> None:
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(ONE):
            with pytest.raises(TraceError, match="an invoke inside an invoke"), tracer.invoke(TWO):
                pass
            with pytest.raises(TraceError, match="`with` over steps inside an invoke"), tracer.all():
                pass
        for _ in tracer.iter[:1]:
            with pytest.raises(TraceError, match="write the loop in the invoke"), tracer.invoke(TWO):
                pass
        model.lm_head.output.save()
        with pytest.raises(TraceError, match="the whole batch has been seen already"), tracer.invoke(TWO):
            pass


def test_a_longer_prompt_does_not_take_steps_away(model: Any) -> None:
    with model.generate(max_length=8, do_sample=False, pad_token_id=0) as tracer:
        with tracer.invoke(ONE):
            for _ in tracer.all():
                model.transformer.h[0].output *= 2
        said = "with the prompts of this invoke there are 2 steps, and without 4"
        with pytest.raises(TraceError, match=said), tracer.invoke(LONG):
            pass
        out = tracer.result.save()
    assert out.shape == (1, 8)
