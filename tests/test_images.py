"""Models that take images: the processor's words in traces, invokes and generations."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fxsight import InputError, LanguageModel, NotExecuted

IMAGE, PATCHES, SIZE = 100, 4, 16
TOLERANCE = 1e-6  # kernels for more rows round otherwise
PICTURE = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
ARRAY = (np.arange(SIZE * SIZE * 3).reshape(SIZE, SIZE, 3) % 256).astype(np.uint8)
TEXT, OTHER = "a <image> b c", "<image> d"


class Tokenizer:
    """Words are numbers by their first letter."""

    pad_token_id = eos_token_id = 0
    padding_side = "left"

    def __call__(self, text: list[str], max_length: int | None = None) -> dict[str, list[list[int]]]:
        rows = [[IMAGE if w == "<image>" else ord(w[0]) % 90 + 1 for w in t.split()][:max_length] for t in text]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}


class Processor:
    """A text with as many image tokens as there are patches; pictures as tensors between -1 and 1."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()

    def __call__(
        self, text: list[str], images: Any = None, padding: bool = False, return_tensors: str = "", **words: Any
    ) -> dict[str, Tensor]:
        assert return_tensors == "pt"
        if sum(t.count("<image>") for t in text) != len(images):
            raise ValueError(f"{len(images)} images for other texts")
        rows = self.tokenizer([t.replace("<image>", "<image> " * PATCHES) for t in text], **words)["input_ids"]
        most = max(map(len, rows))
        assert padding or {most} == set(map(len, rows))
        ids = torch.tensor([[0] * (most - len(row)) + row for row in rows])
        pixels = [torch.as_tensor(x).permute(2, 0, 1) / 255 if isinstance(x, np.ndarray) else x for x in images]
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.stack(pixels) * 2 - 1}


@cache
def _net() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    net = LlavaForConditionalGeneration(config).eval()
    net.generation_config.pad_token_id = 0
    return net


@cache
def _model() -> Any:
    return LanguageModel(_net(), processor=Processor())


def _plain(*texts: str, images: list[Any]) -> Tensor:
    with torch.no_grad():
        given = Processor()(list(texts), images, padding=True, return_tensors="pt")
        logits: Tensor = _net()(**given).logits
    return logits


@pytest.mark.parametrize("picture", [PICTURE, ARRAY], ids=["tensor", "array"])
def test_a_trace_has_the_bits_of_the_plain_call(picture: Any) -> None:
    model = _model()
    with torch.no_grad(), model.trace(TEXT, images=[picture]):
        seen = model.model.multi_modal_projector.output.save()
        logits = model.lm_head.output.save()
    assert torch.equal(logits, _plain(TEXT, images=[picture]))
    assert seen.shape[-2:] == (PATCHES, 32)
    assert torch.equal(model.trace(TEXT, images=[picture], trace=False).logits, logits)
    assert model.tokenizer is model.processor.tokenizer


def test_what_is_seen_can_be_edited() -> None:
    model, net = _model(), _net()
    with torch.no_grad(), model.trace(TEXT, images=[PICTURE]):
        model.model.multi_modal_projector.output[:] = 0
        logits = model.lm_head.output.save()
    handle = net.model.multi_modal_projector.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
    try:
        assert torch.equal(logits, _plain(TEXT, images=[PICTURE]))
    finally:
        handle.remove()


def test_several_texts_and_their_images() -> None:
    model = _model()
    with torch.no_grad(), model.trace([TEXT, OTHER], images=[PICTURE, ARRAY]):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, _plain(TEXT, OTHER, images=[PICTURE, ARRAY]))


def test_invokes_bring_images_of_their_own() -> None:
    model = _model()
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(TEXT, images=[PICTURE]):
            first = model.lm_head.output[:, -1].save()
        with tracer.invoke(OTHER, images=[ARRAY]):
            second = model.lm_head.output[:, -1].save()
    assert torch.allclose(first, _plain(TEXT, images=[PICTURE])[:, -1], atol=TOLERANCE)
    assert torch.allclose(second, _plain(OTHER, images=[ARRAY])[:, -1], atol=TOLERANCE)


def test_a_generation_with_an_image() -> None:
    model, net = _model(), _net()
    given = Processor()([TEXT], [PICTURE], return_tensors="pt")
    layer = model.model.language_model.layers[0]
    handle = net.model.language_model.layers[0].register_forward_hook(lambda m, a, out: out + 0.5)
    options = {"max_new_tokens": 3, "do_sample": False}
    try:
        expected = net.generate(**given, **options, return_dict_in_generate=True, output_logits=True)
    finally:
        handle.remove()
    with model.generate(TEXT, images=[PICTURE], **options) as tracer:
        logits = []
        for _ in tracer.all():
            layer.output += 0.5
            logits.append(model.lm_head.output[:, -1].save())
        ids = tracer.result.save()
    assert torch.equal(ids, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(logits, expected.logits, strict=True))


def test_generate_encodes_images_before_its_first_step() -> None:
    model, said = _model(), r"^model\.multi_modal_projector: this forward never calls the module"
    with pytest.raises(NotExecuted, match=said), model.generate(TEXT, images=[PICTURE], max_new_tokens=2):
        model.model.multi_modal_projector.output.save()


def test_the_words_of_the_tokenizer_go_with_it() -> None:
    model = _model()
    with torch.no_grad(), model.trace(TEXT, images=[PICTURE], max_length=6):
        logits = model.lm_head.output.save()
    assert logits.shape[1] == 6


def test_without_a_processor_or_a_text() -> None:
    bare = LanguageModel(_net(), tokenizer=Tokenizer())
    assert bare.processor is None
    with pytest.raises(InputError, match=r"^images= needs the model's processor, and there is none: LanguageModel\("):
        bare.trace(TEXT, images=[PICTURE]).__enter__()
    with pytest.raises(InputError, match=r"^images= needs the model's processor"):
        bare.generate(TEXT, images=[PICTURE], max_new_tokens=2)
    with pytest.raises(InputError, match=r"^images= needs a text to stand in, or a list of texts, not \(\)"):
        _model().trace(images=[PICTURE]).__enter__()
    with pytest.raises(InputError, match=r"^images= needs a text to stand in, or a list of texts, not \[\[1, 2\]\]"):
        _model().trace([[1, 2]], images=[PICTURE]).__enter__()
    with pytest.raises(ValueError, match=r"^2 images for other texts"):
        _model().trace(TEXT, images=[PICTURE, PICTURE]).__enter__()


def test_a_copy_has_the_processor() -> None:
    model = copy.copy(_model())
    assert model.processor is not None


def test_a_processor_is_looked_for_where_the_model_is() -> None:
    asked: list[str] = []

    def look() -> Any:
        asked.append("once")
        return Processor()

    model = LanguageModel(_net(), tokenizer=Tokenizer())
    model._inputs._look = look
    assert model.processor is model.processor and asked == ["once"]
