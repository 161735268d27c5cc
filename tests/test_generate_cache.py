"""``tracer.cache()`` in a generation: what modules return at each step, as hooks see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxsight import LanguageModel
from fxsight.errors import NotCached, TraceError, UnknownAddress
from tests.generating import GREEDY, IDS, hf, hooked, keep, t5


def test_every_step(model: Any, module: Any) -> None:
    with (
        hooked(module, "transformer.h.0", lambda step, h: h * (step + 2)) as blocks,
        hooked(module, "transformer.h.1.mlp", keep) as inner,
    ):
        ids = hf(module)
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[0], "transformer.h.1.mlp"], include_inputs=True)
        for step in tracer.all():
            model.transformer.h[0].output *= step + 2
        with pytest.raises(TraceError, match="it is filled when its block ends"):
            cache["model.transformer.h.0"]
        out = tracer.result.save()
    assert torch.equal(out, ids) and list(cache) == ["model.transformer.h.0", "model.transformer.h.1.mlp"]
    entries = cache["model.transformer.h.0"]
    assert [entry.name for entry in entries] == [
        "model.transformer.h.0",
        *(f"model.transformer.h.0#{n}" for n in (1, 2, 3)),
    ]
    assert all(torch.equal(entry.output, h) for entry, h in zip(entries, blocks, strict=True))
    assert all(torch.equal(cache.step(n).model.transformer.h[1].mlp.output, h) for n, h in enumerate(inner))
    assert torch.equal(cache.model.transformer.h[1].mlp.call(2).output, inner[2])
    assert cache["transformer.h.0#3"].input.shape == (2, 1, 32) and not cache["transformer.h.0#3"].output.requires_grad
    with pytest.raises(NotCached, match=r"no step 4 in this cache; it has 0, 1, 2, 3"):
        cache.step(4)


def test_one_step_options_and_invokes(model: Any, module: Any) -> None:
    with hooked(module, "transformer.h.0", keep) as blocks:
        hf(module)
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS[:1]):
            first = tracer.cache("transformer.h.0", dtype=torch.float64)
        with tracer.invoke(IDS[1:]):
            pass
        for _ in tracer.iter[2]:
            second = tracer.cache(model.transformer.h[0])
    assert [entry.output.dtype for entry in first["transformer.h.0"]] == [torch.float64] * 4
    assert all(torch.equal(e.output, h[:1].double()) for e, h in zip(first["transformer.h.0"], blocks, strict=True))
    assert torch.equal(second["transformer.h.0"].output, blocks[2])
    with pytest.raises(UnknownAddress), model.generate(IDS, **GREEDY) as tracer:
        tracer.cache("transformer.nothing")
    with pytest.raises(TraceError, match="in `with` over steps"), model.generate(IDS, **GREEDY) as tracer, tracer.all():
        tracer.cache()


def test_all_modules_and_an_early_end(model: Any, module: Any) -> None:
    end = int(hf(module)[0, 5])
    with model.generate(IDS[:1], **GREEDY, eos_token_id=end) as tracer:
        cache = tracer.cache()
    assert (
        len(cache["model"]) == 2 and len(cache["model.lm_head"]) == 2 and "model.transformer.h.1.attn.c_proj" in cache
    )
    with pytest.raises(TraceError, match="belongs to step 2, and this generation ended after 2 steps"):
        cache.step(2)["model.lm_head"]


def test_an_encoder() -> None:
    module: Any = t5()
    with (
        hooked(module, "encoder.block.1.layer.1", keep) as encoded,
        hooked(module, "decoder.block.0.layer.2", keep) as h,
    ):
        hf(module)
    model: Any = LanguageModel(module)
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache()
    assert torch.equal(cache["encoder.block.1.layer.1"].output, encoded[0]) and len(cache["model"]) == 4
    assert all(torch.equal(e.output, x) for e, x in zip(cache["decoder.block.0.layer.2"], h, strict=True))
    assert list(cache.step(-1)) and "model.decoder" not in cache.step(-1)
