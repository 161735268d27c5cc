"""Generation: every step readable and writable, the numbers those of a loop with hooks."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteria

import fxsight
from fxsight import LanguageModel
from fxsight.ahead import SMALL
from fxsight.errors import CausalityError, FirstCallWarning, NotSavedError, TraceError
from fxsight.run import Executable
from tests.generating import GREEDY, IDS, Stream, hf, hooked, keep


def test_reads_of_all_steps(model: Any, module: Any) -> None:
    with hooked(module, "lm_head", keep) as expected:
        ids = hf(module)
    for _ in range(2):  # recorded, and remembered
        logits: list[Any] = []
        with model.generate(IDS, **GREEDY) as tracer:
            for step in tracer.iter[:]:
                assert model.lm_head.output.shape == (2, 1, 97), step
                logits.append(model.lm_head.output.save())
            out = tracer.result.save()
        assert type(out) is torch.Tensor and torch.equal(out, ids) and torch.equal(tracer.result, ids)
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


def test_an_edit_at_every_step(model: Any, module: Any) -> None:
    vector = torch.linspace(-3, 3, 32)
    with (
        hooked(module, "transformer.h.0", lambda step, h: h + vector * (step + 1)),
        hooked(module, "lm_head", keep) as expected,
    ):
        ids = hf(module)
    logits: list[Any] = []
    with model.generate(IDS, **GREEDY) as tracer:
        for step in tracer.all():
            model.transformer.h[0].output += vector * (step + 1)
            logits.append(model.lm_head.output.save())
        out = model.generator.output.save()
    assert torch.equal(out, ids) and not torch.equal(ids, hf(module))
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


@pytest.mark.parametrize("asked", [2, [0, 2], slice(1, 3), slice(2, None), slice(None, None, 2)])
def test_an_edit_at_some_steps(model: Any, module: Any, asked: Any) -> None:
    chosen = [asked] if isinstance(asked, int) else asked if isinstance(asked, list) else list(range(4))[asked]
    with hooked(module, "transformer.h.1.mlp", lambda step, h: h * 0 + 5 if step in chosen else None):
        ids = hf(module)
    steps: list[int] = []
    with model.generate(IDS, **GREEDY) as tracer:
        for step in tracer.iter[asked]:
            steps.append(step)
            model.transformer.h[1].mlp.output[:] = 5
        out = tracer.result.save()
    assert steps == chosen and torch.equal(out, ids)


def test_edits_behind_with(model: Any, module: Any) -> None:
    with hooked(module, "transformer.h.1.mlp", lambda step, h: h * 0 + 5):
        ids = hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        with tracer.all():
            model.transformer.h[1].mlp.output[:] = 5
        out = tracer.result.save()
    assert torch.equal(out, ids)
    with hooked(module, "transformer.h.1.mlp", lambda step, h: h * 0 + 5 if step == 2 else None):
        ids = hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        with tracer.iter[2]:
            model.transformer.h[1].mlp.output = model.transformer.h[1].mlp.output * 0 + 5
        out = tracer.result.save()
    assert torch.equal(out, ids)
    with (
        pytest.raises(TraceError, match=r"for step in tracer.all\(\)"),
        model.generate(IDS, **GREEDY) as tracer,
        tracer.all(),
    ):
        model.lm_head.output.save()


def test_next(model: Any, module: Any) -> None:
    with hooked(module, "lm_head", keep) as expected:
        hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        first = model.lm_head.output.save()
        second = model.lm_head.next().output.save()
        third = model.lm_head.next().output.save()
        other = model.transformer.h[0].output.save()  # of step 0 still
        tracer.next()
        blocks = model.transformer.h[0].output.save()
    assert all(torch.equal(a, b) for a, b in zip((first, second, third), expected, strict=False))
    assert other.shape == (2, 4, 32) and blocks.shape == (2, 1, 32)
    with pytest.raises(TraceError, match="a trace has one step"), model.trace(IDS):
        model.lm_head.next()


def test_a_plain_write_is_of_step_0_and_says_so(model: Any, module: Any) -> None:
    with hooked(module, "transformer.h.0", lambda step, h: h * 0 if step == 0 else None):
        ids = hf(module)
    with (
        pytest.warns(FirstCallWarning, match=r"step 0 alone.*tracer\.all\(\)"),
        model.generate(IDS, **GREEDY) as tracer,
    ):
        model.transformer.h[0].output[:] = 0
        out = tracer.result.save()
    assert torch.equal(out, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.generate(IDS, **{**GREEDY, "max_new_tokens": 1}) as tracer:  # step 0 is every step
            model.transformer.h[0].output[:] = 0
    assert torch.equal(tracer.result, ids[:, :5])


def test_values_of_a_step_are_used_in_a_later_one(model: Any, module: Any) -> None:
    kept: list[torch.Tensor] = []

    def patch(step: int, h: torch.Tensor) -> Any:
        kept.append(h.clone())
        return None if step == 0 else h + kept[0][:, -1:]

    with hooked(module, "transformer.h.0", patch):
        ids = hf(module)
    for _ in range(2):
        with model.generate(IDS, **GREEDY) as tracer:
            first = model.transformer.h[0].output[:, -1:]
            for _ in tracer.iter[1:]:
                model.transformer.h[0].output = model.transformer.h[0].output + first
            out = tracer.result.save()
        assert torch.equal(out, ids)


def test_what_follows_a_loop_and_uses_its_values(model: Any, module: Any) -> None:
    with hooked(module, "lm_head", keep) as expected:
        ids = hf(module)
    logits: list[Any] = []
    with model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[:]:
            logits.append(model.lm_head.output[:, -1])
        mean = fxsight.save(torch.stack(logits).mean(0))
        new = tracer.result[:, IDS.shape[1] :].save()
    assert torch.equal(mean, torch.stack([x[:, -1] for x in expected]).mean(0))
    assert torch.equal(new, ids[:, 4:])


def test_a_value_of_a_later_step_cannot_be_written_earlier(model: Any) -> None:
    said = "at step 0 is written .* of step 2, which comes later"
    with pytest.raises(CausalityError, match=said), model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[2]:
            late = model.transformer.h[0].output
        for _ in tracer.iter[0]:
            model.transformer.h[1].output = late.expand(2, 4, 32)


def test_steps_that_are_not_there(model: Any) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        with pytest.raises(ValueError, match=r"tracer\.iter step cannot be negative"):
            list(tracer.iter[-1])
        with pytest.raises(ValueError, match=r"tracer\.iter step cannot be negative"):
            list(tracer.iter[-2:])
        with pytest.raises(TraceError, match="step 4: this generation has 4 steps at most, 0 to 3"):
            list(tracer.iter[4])
        assert list(tracer.iter[2:9]) == [2, 3]


class After(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Ends after some tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_an_early_end(model: Any, module: Any) -> None:
    ids = hf(module, stopping_criteria=[After(6)])
    logits, kept = list[Any](), fxsight.list()
    with model.generate(IDS, **GREEDY, stopping_criteria=[After(6)]) as tracer:
        kept.save()
        for _ in tracer.iter[:]:
            logits.append(model.lm_head.output.save())
            kept.append(model.lm_head.output)
        out = tracer.result.save()
    assert torch.equal(out, ids) and ids.shape == (2, 6)
    assert logits[1].shape == (2, 1, 97) and len(kept) == 2 and torch.equal(kept[1], logits[1])
    with pytest.raises(NotSavedError, match="belongs to step 2, and this generation ended after 2 steps"):
        print(logits[2])


def test_the_end_token_ends(model: Any, module: Any) -> None:
    end = int(hf(module)[0, 5])
    expected = module.generate(IDS[:1], **GREEDY, eos_token_id=end)
    with model.generate(IDS[:1], **GREEDY, eos_token_id=end) as tracer:
        late = [model.lm_head.output.save() for _ in tracer.iter[:]]
        out = tracer.result.save()
    assert torch.equal(out, expected)
    with pytest.raises(NotSavedError, match="every row had come to its end"):
        late[3] + 1


def test_sampling_beams_processors_and_streamers(model: Any, module: Any) -> None:
    class Double:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * 2

    ways: list[dict[str, Any]] = [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"logits_processor": LogitsProcessorList([Double()])},
        {"num_return_sequences": 2, "do_sample": True},
    ]
    for way in ways:
        torch.manual_seed(3)
        with hooked(module, "transformer.h.0", lambda step, h: h + 1):
            expected = hf(module, **way)
        torch.manual_seed(3)
        with model.generate(IDS, **{**GREEDY, **way}) as tracer:
            for _ in tracer.all():
                model.transformer.h[0].output += 1
            out = tracer.result.save()
        assert torch.equal(out, expected), way


def test_a_streamer_is_given_each_token_once(model: Any, module: Any) -> None:
    mine, theirs = Stream(), Stream()
    module.generate(IDS[:1], **GREEDY, streamer=theirs)
    with model.generate(IDS[:1], **GREEDY, streamer=mine) as tracer:
        tracer.result.save()
    assert mine.seen == theirs.seen


def test_without_a_block_and_with_edits(model: Any, module: Any) -> None:
    assert torch.equal(model.generate(IDS, **GREEDY, trace=False), hf(module))
    with hooked(module, "transformer.h.0", lambda step, h: h * 0.5):
        expected = hf(module)
    with model.edit(IDS) as edited:
        model.transformer.h[0].output = model.transformer.h[0].output * 0.5
    assert torch.equal(edited.generate(IDS, **GREEDY, trace=False), expected)
    with edited.generate(IDS, **GREEDY) as tracer:
        first = edited.lm_head.output.save()
        out = tracer.result.save()
    assert torch.equal(out, expected) and first.shape == (2, 1, 97)


def test_operations_of_each_step(model: Any) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        shapes = [
            tuple(model.transformer.h[0].attn.ops.attention_interface_0.output[0].save().shape) for _ in tracer.iter[:]
        ]
    assert shapes == [(2, 4, 2, 16), *[(2, 1, 2, 16)] * 3]


def test_only_ids_have_a_result_in_the_block(model: Any, module: Any) -> None:
    with model.generate(IDS, **GREEDY, return_dict_in_generate=True, output_logits=True) as tracer:
        reads: list[Callable[[], Any]] = [lambda: tracer.result, lambda: model.generator.output]
        for read in reads:
            with pytest.raises(TraceError, match="after the block"):
                read()
    assert torch.equal(tracer.result.sequences, hf(module)) and len(tracer.result.logits) == 4


def test_what_a_generation_does_not_do(model: Any) -> None:
    with pytest.raises(TraceError, match="generate needs a prompt"):
        model.generate(max_new_tokens=3, trace=False)
    with pytest.raises(TraceError, match="no backend"):
        model.generate(IDS, backend="fast")
    with pytest.raises(TraceError, match="only inside a generation"):
        model.generator.output  # noqa: B018


def test_browsing_shows_what_it_showed(module: Any) -> None:
    model: Any = LanguageModel(module)
    model.capture(IDS)
    before = model._captures.latest
    model.generate(IDS, **GREEDY, backend="eager").alone()
    assert model._captures.latest is before


def test_nothing_but_what_is_saved_is_kept(model: Any) -> None:
    gone: list[weakref.ref[Any]] = []
    vector = torch.ones(32)
    with model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.all():
            model.transformer.h[0].output += vector
            gone.append(weakref.ref(model.transformer.h[0].output))
        gone.append(weakref.ref(vector))
        del vector
    del tracer
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_nothing_is_said_twice(model: Any) -> None:
    with warnings.catch_warnings(record=True) as said, model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.all():
            model.transformer.h[0].output[:] = 0
    assert not said


def test_small_decode_steps_are_compiled_in_one_piece(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[str] = []
    compile_whole = Executable.compile_whole

    def noted(executable: Executable) -> None:
        whole.append(executable.program.text if len(executable.program.nodes) > 8 else "the ids")
        compile_whole(executable)

    monkeypatch.setattr(Executable, "compile_whole", noted)
    for smallest, count in ((SMALL, 1), (8, 0)):
        monkeypatch.setattr("fxsight.step.SMALL", smallest)
        whole.clear()
        with model.generate(IDS, backend="inductor", **GREEDY) as tracer:
            for _ in tracer.all():
                model.transformer.h[0].output[:, -1] += 1 + smallest
            ids = tracer.result.save()
        assert ids.shape == (2, 8)
        assert len({text for text in whole if text != "the ids"}) == count
