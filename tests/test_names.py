"""Names for the values of blocks, in every family: what they name is what the name says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fxsight import LanguageModel, UnknownAddress
from tests.coverage.recipes import inputs, make

DEMO = str(Path(__file__).parent.parent / "docs" / "demo" / "model")
PROMPT = "The Eiffel Tower is in the city of"
SEQUENTIAL = ("gpt2", "llama", "gemma2", "olmo2", "glm4", "mixtral", "bloom", "bert")
PARALLEL = ("gpt_neox", "phi")
FAST = ("llama", "bert", "phi")
WITHOUT_INTERFACE = ("bloom",)


def _marked(kinds: tuple[str, ...]) -> list[Any]:
    return [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@cache
def _model() -> Any:
    return LanguageModel(DEMO)


def _close(a: Any, b: Any) -> bool:
    return torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", _marked((*SEQUENTIAL, *PARALLEL)))
def test_what_the_names_say(kind: str) -> None:
    """The parts add up to the residual stream, and the pattern times the values is what the heads read."""
    model: Any = LanguageModel(make(kind))
    with torch.no_grad(), model.trace(inputs(kind, 2, 7)["input_ids"]):
        block = model.blocks[1]
        pre, attn, mlp, post = (getattr(block, n).save() for n in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        before = model.blocks[0].resid_post.save()
        found = [block.resid_mid.save()] if kind in SEQUENTIAL else []
        inside = None
        if kind not in WITHOUT_INTERFACE:
            inside = [getattr(block, name).save() for name in ("q", "k", "v", "z", "pattern")]
    mid = found[0] if found else pre + attn
    assert torch.equal(pre, before) and _close(mid, pre + attn)
    if kind == "bert":
        norm = model.bert.encoder.layer[1]
        hidden = norm["attention"]["output"]["LayerNorm"]._module(mid)
        assert _close(post, norm["output"]["LayerNorm"]._module(hidden + mlp))
    else:
        assert _close(post, mid + mlp)
    if inside is not None:
        q, k, v, z, pattern = inside
        assert (q.shape, pattern.shape) == ((2, 4, 7, 8), (2, 4, 7, 7)) and k.shape == v.shape
        assert _close(pattern.sum(-1), torch.ones(2, 4, 7))
        assert _close(pattern @ v.repeat_interleave(4 // v.shape[1], 1), z.transpose(1, 2))


def test_they_are_written_like_other_values() -> None:
    model = _model()
    with torch.no_grad(), model.trace(PROMPT):
        block = model.blocks[-1]
        block.attn_out = torch.zeros(64)
        block.mlp_out[:, :-1] *= 2
        mid, pre = block.resid_mid.save(), block.resid_pre.save()
        post, mlp = model.transformer.h[3].output.save(), block.mlp_out.save()
        before = model.transformer.h[3].mlp.output.save()
    assert torch.equal(mid, pre) and torch.equal(post, mid + mlp) and torch.equal(before, mlp)
    with torch.no_grad(), model.trace(PROMPT) as tracer:
        z = model.blocks[0].z.save()
        model.blocks[0].q = model.blocks[0].q * 0  # every key is looked at alike
        even = model.blocks[0].pattern.save()
        model.logits = 0
        out = tracer.result.logits.save()
    assert _close(even[0, 0, 3, :4], torch.full((4,), 0.25)) and z.shape == (1, 8, 4, 16) and not out.any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_patterns_are_written(attention: str) -> None:
    """One head looks at the first token alone; other layers stay fused."""
    model: Any = LanguageModel(DEMO, attn_implementation=attention)
    with torch.no_grad(), model.trace(PROMPT) as tracer:
        block = model.blocks[2]
        block.pattern[:, 1] = 0
        block.pattern[:, 1, :, 0] = 1
        z, v = block.z.save(), block.v.save()
    assert _close(z[:, :, 1], v[:, 1, :1].expand(1, 8, 16))
    fused = sum("scaled_dot_product_attention" in str(n.target) for n in tracer.program.program.graph.nodes)
    assert fused == (2 if attention == "sdpa" else 0)  # of the two blocks before it


def test_names_that_are_refused() -> None:
    model = _model()
    with model.trace(PROMPT):
        with pytest.raises(AttributeError, match=r"has no attribute .resid_pree.*resid_pre"):
            model.blocks[0].resid_pree  # noqa: B018
        assert model.blocks[0].mlp.output.shape == (1, 8, 64) and len(model.blocks[1:3]) == 2
        assert "resid_mid" in dir(model.blocks[0])
    parallel: Any = LanguageModel(make("phi"))
    with parallel.trace([[4, 5, 6]]):
        with pytest.raises(
            UnknownAddress, match=r"model.layers.0: no resid_mid, attention and MLP read the same residual"
        ):
            parallel.blocks[0].resid_mid  # noqa: B018
        with pytest.raises(UnknownAddress, match="no resid_mid"):
            parallel.blocks[0].resid_mid = 0
    scaled: Any = LanguageModel(make("granite"))
    with (
        scaled.trace([[4, 5, 6]]),
        pytest.raises(UnknownAddress, match=r"no attn_out, it is not known where[\s\S]*it has"),
    ):
        scaled.blocks[0].attn_out  # noqa: B018
    net = torch.nn.ModuleDict({n: torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))]) for n in "ab"})
    two: Any = LanguageModel(net)
    with pytest.raises(UnknownAddress, match=r"which are the blocks\? lists of modules: a, b; use"):
        two.blocks  # noqa: B018
