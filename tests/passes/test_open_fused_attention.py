"""Attention, opened: its pattern under every way of calling it, against attention written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsight
from fxsight.address import Address
from fxsight.passes import OpenFused
from fxsight.testing import check_pass, listing
from tests import zoo
from tests.passes.fused_cases import Apply, Edit, random

SDPA = "aten_scaled_dot_product_attention_0"
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Sizes:
    """Of attention; ``groups``: how many heads of the queries use one of the keys."""

    batch: int = 2
    heads: int = 4
    queries: int = 5
    keys: int = 7
    width: int = 8
    values: int = 8
    groups: int = 1


@dataclass(frozen=True)
class Way:
    """One way to call attention.

    options: its keyword arguments.  mask: made from the sizes.  sizes: two.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    mask: Callable[[Sizes], Tensor] | None = None
    sizes: tuple[Sizes, Sizes] = (Sizes(), Sizes(3, 6, 9, 4, 16, 16))
    dtype: torch.dtype = torch.float32

    def inputs(self, number: int) -> tuple[Tensor, ...]:
        """Queries, keys, values and the mask."""
        s = self.sizes[number]
        heads = s.heads // s.groups
        shapes = (s.heads, s.queries, s.width), (heads, s.keys, s.width), (heads, s.keys, s.values)
        made = tuple(random(s.batch, *shape).to(self.dtype) for shape in shapes)
        return made if self.mask is None else (*made, self.mask(s))

    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The fused operator."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)

    def pattern(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Written by hand."""
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        scores = scores * self.options.get("scale", q.shape[-1] ** -0.5)
        if self.options.get("is_causal"):
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        pattern: Tensor = scores.softmax(-1).nan_to_num(0.0)
        return pattern

    def twin(self, edit: Edit, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The result with the pattern edited."""
        return edit(self.pattern(q, k, mask)) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def _bool(*shape: str) -> Callable[[Sizes], Tensor]:
    return lambda s: random(*(getattr(s, name) for name in shape)) > 0


def _nowhere(s: Sizes) -> Tensor:
    mask = torch.ones(s.queries, s.keys, dtype=torch.bool)
    mask[1] = False
    return mask


GROUPED = (Sizes(groups=2), Sizes(3, 6, 9, 4, 16, 16, groups=3))
WIDE = (Sizes(values=12), Sizes(3, 6, 9, 4, 16, 5))
ONE = (Sizes(), Sizes(1, 1, 1, 1, 1, 1))
WAYS = (
    Way("plain"),
    Way("one of each", sizes=ONE),
    Way("values of another width", sizes=WIDE),
    Way("scale", {"scale": 0.3}),
    Way("dropout of 0", {"dropout_p": 0.0}),
    Way("causal", {"is_causal": True}),
    Way("grouped", {"enable_gqa": True}, sizes=GROUPED),
    Way("grouped, one key head", {"enable_gqa": True}, sizes=(Sizes(groups=4), Sizes(3, 6, 9, 4, 16, 16, groups=6))),
    Way("grouped, causal, scale", {"enable_gqa": True, "is_causal": True, "scale": 2.0}, sizes=GROUPED),
    Way("bool mask", mask=_bool("queries", "keys")),
    Way("bool mask for each head", mask=_bool("batch", "heads", "queries", "keys")),
    Way("a query that may look nowhere", mask=_nowhere),
    Way("float mask", mask=lambda s: random(s.queries, s.keys)),
    Way("float64", dtype=torch.float64),
    Way("bfloat16", dtype=torch.bfloat16),
)


@dataclass(frozen=True)
class Captured:
    """One way, captured at its first sizes."""

    way: Way
    model: fxsight.Model


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.name)
def captured(request: pytest.FixtureRequest) -> Captured:
    way: Way = request.param
    return Captured(way, fxsight.Model(Apply(way.call).eval(), cache=False))


def _close(way: Way, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[way.dtype], atol=TOLERANCE[way.dtype])


def test_result_is_the_fused_one(captured: Captured) -> None:
    way = captured.way
    program, _ = captured.model._captures.find(way.inputs(0), {})
    check_pass(
        OpenFused(Address.parse(f"/{SDPA}")),
        program,
        inputs=[way.inputs(0)],
        equals=lambda _, *inputs: way.call(*inputs),
        tolerance=TOLERANCE[way.dtype],
    )


@pytest.mark.parametrize("size", [0, 1])
def test_pattern_is_read_and_written(captured: Captured, size: int) -> None:
    way, inputs = captured.way, captured.way.inputs(size)
    with captured.model.trace(*inputs) as tracer:
        place = tracer.at(f"/{SDPA}/softmax_0")
        pattern = place.output.save()
        place.output = place.output * 0.5 + 0.125
        out = captured.model.output.save()
    _close(way, pattern, way.pattern(inputs[0], inputs[1], *inputs[3:]))
    _close(way, out, way.twin(lambda p: p * 0.5 + 0.125, *inputs))


@pytest.mark.parametrize("size", [0, 1])
def test_program_holds_for_other_sizes(captured: Captured, size: int) -> None:
    way = captured.way
    with captured.model.trace(*way.inputs(0)) as tracer:
        tracer.at(f"/{SDPA}/softmax_0").output.save()
        fxsight.save(captured.model.output)
    other = way.inputs(size)
    try:
        pattern, out = tracer.program(*other)
    except fxsight.InputError:
        assert captured.model._captures.find(other, {})[0] is not captured.model._captures.find(way.inputs(0), {})[0]
        return
    _close(way, pattern, way.pattern(other[0], other[1], *other[3:]))
    _close(way, out, way.call(*other))


# -- widths the program has names of its own for ---------------------------------------------------------------------


class Projected(nn.Module):
    """Queries, keys and values of inputs of their own."""

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        q, k, v = (torch.unflatten(x, -1, (2, x.shape[-1] // 2)).transpose(1, 2) for x in (a, b, c))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_free_head_width() -> None:
    model = fxsight.Model(Projected(), cache=False)
    for width in (8, 12):
        a, b, c = random(2, 5, width), random(2, 7, width), random(2, 7, width)
        with model.trace(a, b, c) as tracer:
            pattern = tracer.at(f"/{SDPA}/softmax_0").output.save()
            out = model.output.save()
        q, k = (torch.unflatten(x, -1, (2, width // 2)).transpose(1, 2) for x in (a, b))
        assert torch.allclose(pattern, (q @ k.mT / (width / 2) ** 0.5).softmax(-1), atol=1e-6)
        assert torch.allclose(out, Projected()(a, b, c), atol=1e-6)


# -- one layer of a model --------------------------------------------------------------------------------------------

SOFTMAX = "attention_interface_0/torch_nn_functional_scaled_dot_product_attention_0/softmax_0"


def _gpt2(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, attn_implementation=attention
    )
    return zoo.seeded(lambda: transformers.GPT2LMHeadModel(config)).eval()


@pytest.fixture(scope="module")
def gpt2() -> fxsight.Model:
    return fxsight.Model(_gpt2("sdpa"), cache=False)


IDS = zoo.token_ids(2, 6), zoo.token_ids(1, 4)


@pytest.mark.parametrize("ids", IDS)
def test_gpt2_patterns_are_those_of_eager_attention(gpt2: fxsight.Model, ids: Tensor) -> None:
    eager = _gpt2("eager")(ids, output_attentions=True, use_cache=False)
    with gpt2.trace(ids, use_cache=False):
        inside = [
            block.attn.source.attention_interface_0.source.torch_nn_functional_scaled_dot_product_attention_0.source
            for block in gpt2.transformer.h
        ]
        patterns = fxsight.save([source.softmax_0.output for source in inside])
        logits = gpt2.output.logits.save()
    for found, expected in zip(patterns, eager.attentions, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, eager.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ids", IDS)
def test_gpt2_one_edge_of_one_head_is_cut(gpt2: fxsight.Model, ids: Tensor) -> None:
    with gpt2.trace(ids, use_cache=False) as tracer:
        first = gpt2.transformer.h[0].output.save()
        attention = gpt2.transformer.h[1].attn.source.attention_interface_0.source
        fused = attention.torch_nn_functional_scaled_dot_product_attention_0.source
        fused.softmax_0.output[:, 2, 3, 1] = 0
        logits = gpt2.output.logits.save()
    torch.testing.assert_close(logits, _cut(ids), rtol=1e-6, atol=1e-6)
    assert (
        sum("aten.scaled_dot_product_attention" in line for line in listing(tracer.program.program).splitlines()) == 1
    )
    with gpt2.trace(ids, use_cache=False):
        plain = gpt2.transformer.h[0].output.save()
    assert torch.equal(first, plain)


def _cut(ids: Tensor) -> Tensor:
    """Logits of eager attention with one edge of one head of the last layer cut."""
    model = _gpt2("eager")
    attention = model.transformer.h[1].attn  # type: ignore[union-attr, index]

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in attention.c_attn(hidden).split(32, -1))
        causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
        pattern = (q @ k.mT / 8**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        pattern[:, 2, 3, 1] = 0
        return attention.c_proj((pattern @ v).transpose(1, 2).flatten(2)), None

    attention.forward = forward
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def test_gpt2_lists_what_attention_is_made_of(gpt2: fxsight.Model) -> None:
    with gpt2.trace(IDS[0], use_cache=False):
        gpt2.output.logits.save()
    attention = gpt2.transformer.h[0].attn.source.attention_interface_0.source
    inside = attention.torch_nn_functional_scaled_dot_product_attention_0.source
    assert [op.name for op in inside] == [
        "key_transpose_0", "torch_matmul_0", "operator_mul_0", "attn_mask_logical_not_0", "scores_masked_fill_1",
        "softmax_0", "torch_matmul_1",
    ]  # fmt: skip
    assert inside.softmax_0.type == "f32[batch, 4, length, length]"
