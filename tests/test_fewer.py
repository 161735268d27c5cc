"""Rows that nobody reads are not computed from the second run on, and every bit is that of the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import fxsight
from fxsight import bits, fewer
from tests.test_auto import Case

VOCABULARY = 5003
IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is enough to be left out."""
    monkeypatch.setattr(fewer, "LEAST", 1000)


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def _last(model: Any, ids: Tensor) -> tuple[Any, Tensor, Tensor]:
    with model.trace(ids) as tracer:
        last = model.lm_head.output[:, -1].save()
        total = model.lm_head.output[:, -1].sum().save()
    return tracer, last, total


def _runs(tracer: Any) -> list[Any]:
    return [run for run in tracer.program._fewer._runs.values() if run is not None]


def test_the_last_logits_alone(net: Any) -> None:
    model = fxsight.Model(net, cache=False)
    for number, ids in enumerate((IDS, IDS, IDS, OTHER, OTHER)):
        tracer, last, total = _last(model, ids)
        expected = net(ids).logits[:, -1]
        assert torch.equal(last, expected)
        assert torch.equal(total, expected.sum())
        assert last.stride() == expected.stride()
        assert len(_runs(tracer)) == (0, 1, 1, 1, 2)[number]
    for run in _runs(tracer):
        assert any(line.startswith("NarrowReads") for line in run.program.history)
        assert "= spread(" in run.program.text
    assert not any(line.startswith("NarrowReads") for line in tracer.program.history)
    again = tracer.program(IDS)
    assert torch.equal(again[0], net(IDS).logits[:, -1])


@pytest.mark.parametrize("rows", [True, False])
def test_the_logits_of_two_tokens(net: Any, rows: bool) -> None:
    model, ids = fxsight.Model(net, cache=False), torch.arange(32).view(4, 8)

    def metric(logits: Any) -> Any:
        if rows:
            return logits[:, -1, 5] - logits[:, -1, 4000]
        return logits[..., 7:9].sum(1) + logits[:, 2, [5, 17]]

    for number in range(3):
        with model.trace(ids) as tracer:
            model.transformer.h[0].mlp.output[:, 1] = 0
            found = metric(model.lm_head.output).save()
        assert len(_runs(tracer)) == min(number, 1)
        handle = net.transformer.h[0].mlp.register_forward_hook(_zero_one)
        assert torch.equal(found, metric(net(ids).logits))
        handle.remove()
    (run,) = _runs(tracer)
    assert any("NarrowColumns" in line for line in run.program.history)
    assert any("NarrowReads" in line for line in run.program.history) == rows


def _zero_one(module: Any, given: Any, output: Tensor) -> Tensor:
    output[:, 1] = 0
    return output


def test_edits_and_saves_beside_it(net: Any) -> None:
    model = fxsight.Model(net, cache=False)
    for number in range(4):
        steer = torch.randn(32)
        with model.trace(IDS) as tracer:
            model.transformer.h[0].mlp.output += number * steer
            middle = model.transformer.h[0].mlp.output.save()
            last = model.lm_head.output[:, -1, 3:9].save()
        handle = net.transformer.h[0].mlp.register_forward_hook(lambda m, a, output, by=number * steer: output + by)
        expected = net(IDS).logits[:, -1, 3:9]
        handle.remove()
        assert torch.equal(last, expected)
        assert middle.shape == (3, 7, 32)
    assert _runs(tracer)


@pytest.mark.parametrize("place", ["transformer.h.1.mlp", "transformer.ln_f"])
def test_what_a_body_makes_is_of_other_sizes_at_other_sizes(net: Any, place: str) -> None:
    """Its shapes are known for the sizes alone at which the program was made; nothing is tried with them at others."""
    model = fxsight.Model(net, cache=False)
    once = torch.tensor([[7, 8, 9, 10]])
    module = net.get_submodule(place)
    for ids in (IDS, IDS, IDS, OTHER, OTHER, once, once, once, IDS):
        with model.trace(ids) as tracer:
            tracer.at(place).output = model.transformer.h[0].mlp.output.tanh()
            last = model.lm_head.output[:, -1, 5].save()
        kept: list[Tensor] = []
        handles = [
            net.transformer.h[0].mlp.register_forward_hook(lambda m, a, output, kept=kept: kept.append(output.tanh())),
            module.register_forward_hook(lambda m, a, output, kept=kept: kept[0]),
        ]
        expected = net(ids).logits[:, -1, 5]
        for handle in handles:
            handle.remove()
        assert torch.equal(last, expected)


def test_what_may_learn_has_all_rows(net: Any) -> None:
    model = fxsight.Model(net, cache=False)
    for _ in range(3):
        steer = torch.randn(32, requires_grad=True)
        with model.trace(IDS) as tracer:
            model.transformer.h[0].mlp.output = model.transformer.h[0].mlp.output + steer
            last = model.lm_head.output[:, -1].save()
        (found,) = torch.autograd.grad(last.sum(), steer)
        handle = net.transformer.h[0].mlp.register_forward_hook(lambda m, a, output, by=steer: output + by)
        (expected,) = torch.autograd.grad(net(IDS).logits[:, -1].sum(), steer)
        handle.remove()
        assert torch.equal(found, expected)
    assert _runs(tracer)  # ready for torch.no_grad()
    with torch.no_grad():
        assert torch.equal(tracer.program(IDS)[0], last)


def test_where_bits_would_differ_all_rows_run(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "same_bits", lambda *_: False)
    model = fxsight.Model(net, cache=False)
    for _ in range(3):
        tracer, last, _ = _last(model, IDS)
        assert torch.equal(last, net(IDS).logits[:, -1])
    assert not _runs(tracer)


def test_it_can_be_switched_off(net: Any) -> None:
    model = fxsight.Model(net, cache=False, narrow=False)
    for _ in range(3):
        tracer, last, _ = _last(model, IDS)
        assert torch.equal(last, net(IDS).logits[:, -1])
    assert tracer.program._fewer is None
    with model.trace(IDS) as tracer:
        hidden = model.transformer.h[0].output
        model.lm_head.output[:, -1, 5].sum().backward()
        hidden.grad.save()
    assert not any("NarrowReads" in line for line in tracer.program.history)


def test_little_is_not_worth_it(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewer, "LEAST", 10**9)
    model = fxsight.Model(net, cache=False)
    for _ in range(3):
        tracer, _, _ = _last(model, IDS)
    assert not _runs(tracer)


def test_all_that_is_read_of_the_rows_adds_up_as_ever(net: Any) -> None:
    """A sum over several rows depends on how they lie in memory: in gradients and sweeps, too."""
    model = fxsight.Model(net, cache=False)
    kept: list[Tensor] = []
    handle = net.transformer.h[0].mlp.register_forward_hook(lambda m, a, output: kept.append(output.requires_grad_()))
    loss = net(IDS).logits[:, -1].mean()
    handle.remove()
    (expected,) = torch.autograd.grad(loss, kept)
    with model.trace(IDS):
        hidden = model.transformer.h[0].mlp.output
        mean = model.lm_head.output[:, -1].mean().save()
        mean.backward()
        found = hidden.grad.save()
    assert torch.equal(mean, loss)
    assert torch.equal(found, expected)

    def body(layer: int) -> Any:
        model.transformer.h[layer].mlp.output[:, 0] = 0
        return model.lm_head.output[:, -1].sum()

    swept = model.sweep(body, IDS, layer=range(2))
    for layer in range(2):
        with model.trace(IDS):
            alone = body(layer).save()
        assert torch.equal(swept.values[layer], alone)


@pytest.mark.parametrize("after", [0.0, 3600.0])
def test_auto_leaves_them_out_until_it_is_compiled(net: Any, tmp_path: Path, after: float) -> None:
    case = Case(net, tmp_path, after=after)
    tiers = list[str]()
    for _ in range(4):
        with case.model.trace(IDS, backend="auto") as tracer:
            last = case.model.lm_head.output[:, -1].save()
        tiers.append(tracer.tier)
        torch.testing.assert_close(last, net(IDS).logits[:, -1], rtol=1e-4, atol=1e-4)
        assert tracer.tier == "inductor" or torch.equal(last, net(IDS).logits[:, -1])
    assert tiers[-1] == ("eager" if after else "inductor") and len(_runs(tracer)) == 1
