"""The encoder of an encoder-decoder in a generation: read and edited as the decoder is, once, before its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxsight import LanguageModel
from fxsight.errors import CausalityError, EditError, FirstCallWarning, TraceError
from tests.generating import GREEDY, IDS, bart, hf, hooked, keep, t5

PATHS = {
    "t5": ("encoder.block.0", "decoder.block.1.layer.0"),
    "bart": ("model.encoder.layers.0", "model.decoder.layers.1.fc1"),
}
MODULES: dict[str, Callable[[], nn.Module]] = {"t5": t5, "bart": bart}


@pytest.fixture(scope="module", params=["t5", "bart"])
def pair(request: pytest.FixtureRequest) -> tuple[LanguageModel, str, str]:
    """A model, and the paths of a part of its encoder and of its decoder."""
    return LanguageModel(MODULES[request.param]()), *PATHS[request.param]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return t5()


@pytest.fixture(scope="module")
def model(module: nn.Module) -> LanguageModel:
    return LanguageModel(module)


def halved(step: int, output: Any) -> Any:
    """Half the output, or of a tuple half the first."""
    return (output[0] * -0.5, *output[1:]) if isinstance(output, tuple) else output * -0.5


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_reads_and_edits(pair: Any, options: dict[str, Any]) -> None:
    model, path, _ = pair
    module = model._module
    torch.manual_seed(1)
    with hooked(module, path, halved) as blocks, hooked(module, "lm_head", keep) as expected:
        ids = hf(module, **options)
    assert not torch.equal(ids, hf(module, **options))
    for _ in range(2):
        logits: list[Any] = []
        torch.manual_seed(1)
        with model.generate(IDS, **{**GREEDY, **options}) as tracer:
            model[path].output = halved(0, model[path].output)
            block = model[path].output
            kept = (block[0] if isinstance(block, tuple) else block).save()
            for _ in tracer.all():
                logits.append(model.lm_head.output.save())
            out = tracer.result.save()
        assert torch.equal(out, ids) and torch.equal(kept, blocks[0])
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


def test_edits_that_stay(pair: Any) -> None:
    model, path, other = pair
    module = model._module
    with model.edit({"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}) as edited:
        model[path].output = halved(0, model[path].output)
    with edited.edit(inplace=True):
        edited[other].output = halved(0, edited[other].output)
    with hooked(module, path, halved), hooked(module, other, halved):
        ids = hf(module)
    assert torch.equal(edited.generate(IDS, **GREEDY, trace=False), ids) and not torch.equal(ids, hf(module))


def test_values_of_the_encoder_in_the_decoder(model: Any, module: Any) -> None:
    kept: list[torch.Tensor] = []
    with (
        hooked(module, "encoder.block.0.layer.1", lambda step, h: kept.append(h.clone())),
        hooked(module, "decoder.block.0.layer.2", lambda step, h: h + kept[0][:, -1:] * (step + 1)),
    ):
        ids = hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        last = model.encoder.block[0].layer[1].output[:, -1:]
        for step in tracer.all():
            model.decoder.block[0].layer[2].output += last * (step + 1)
        out = tracer.result.save()
    assert torch.equal(out, ids) and not torch.equal(ids, hf(module))
    said = "at the encoder is written .* of step 0, which comes later"
    with pytest.raises(CausalityError, match=said), model.generate(IDS, **GREEDY):
        model.encoder.block[1].layer[1].output = model.decoder.block[0].layer[2].output.expand(2, 4, 32)


def test_operations_and_skipping(model: Any, module: Any) -> None:
    with hooked(module, "encoder.block.0.layer.0.SelfAttention.o", keep) as projected:
        hf(module)
    with hooked(module, "encoder.block.1.layer.1", lambda step, h: h * 0):
        ids = hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        operation = model.encoder.block[0].layer[0].SelfAttention.ops.find(name="self_o_0")[0]
        found = operation.output.save()
        part = model.encoder.block[1].layer[1]
        part.skip(part.input * 0)
        out = tracer.result.save()
    assert torch.equal(found, projected[0]) and torch.equal(out, ids)


def test_invokes(model: Any, module: Any) -> None:
    def change(step: int, h: torch.Tensor) -> None:
        h[1:] *= -3

    with hooked(module, "encoder.block.1.layer.1", change) as blocks:
        ids = hf(module)
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS[:1]):
            first = model.encoder.block[1].layer[1].output.save()
        with tracer.invoke(IDS[1:]):
            model.encoder.block[1].layer[1].output *= -3
        out = tracer.result.save()
    assert torch.equal(out, ids) and torch.equal(first, blocks[0][:1])


def test_what_belongs_to_both(model: Any) -> None:
    module: Any = t5()
    module.decoder.embed_tokens = module.encoder.embed_tokens
    tied: Any = LanguageModel(module, cache=False)
    said = "encoder.embed_tokens is called by the encoder and by the decoder"
    with pytest.raises(TraceError, match=said), tied.generate(IDS, **GREEDY):
        tied.encoder.embed_tokens.output.save()
    with pytest.warns(FirstCallWarning, match="2 times"), tied.edit() as edited:
        tied.encoder.embed_tokens.output = tied.encoder.embed_tokens.output * 0
    with pytest.raises(EditError, match=f"cannot be made in a generation: {said}"):
        edited.generate(IDS, **GREEDY, trace=False)
    with model.edit() as edited:
        first = model.encoder.block[0].layer[1].output
        model.decoder.block[0].layer[2].output = model.decoder.block[0].layer[2].output + first.mean()
    with pytest.raises(EditError, match="both the encoder and the decoder, which run one after the other"):
        edited.generate(IDS, **GREEDY, trace=False)


def test_the_encoder_has_one_step(model: Any) -> None:
    said = r"the encoder runs once, before step 0: .* outside the loop"
    with pytest.raises(TraceError, match=said), model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[1:]:
            model.encoder.block[0].layer[1].output *= 2
    with pytest.raises(TraceError, match=said), model.generate(IDS, **GREEDY) as tracer, tracer.all():
        model.encoder.block[0].layer[1].output *= 2
