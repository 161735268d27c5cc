"""Backward passes compute the rows that are read, where that gives the same bits; and the whole where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import fxsight
from fxsight import bits
from fxsight.lower import TOLERANCE

IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))


def _net(frozen: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **sizes))
    return net.eval().requires_grad_(not frozen)


def _trace(model: Any, ids: Tensor, backend: Any = "eager") -> tuple[Any, list[Tensor]]:
    with model.trace(ids, backend=backend) as tracer:
        blocks = [block.output for block in model.transformer.h]
        blocks = [b[0] if isinstance(b, tuple) else b for b in blocks]
        model.output.logits[:, -1, 5].sum().backward()
        gradients = [b.grad.save() for b in blocks]
    return tracer, list(gradients)


def _hooked(net: Any, ids: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        kept.append(value if value.requires_grad else value.requires_grad_())

    handles = [block.register_forward_hook(keep) for block in net.transformer.h]
    loss = net(ids).logits[:, -1, 5].sum()
    for handle in handles:
        handle.remove()
    return list(torch.autograd.grad(loss, kept))


def _is_narrow(tracer: Any) -> bool:
    return any("NarrowReads" in line for line in tracer.program.history)


def test_the_unembedding_of_the_last_position_alone() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    for ids in (IDS, IDS, OTHER):
        tracer, found = _trace(model, ids)
        assert all(map(torch.equal, found, _hooked(net, ids)))
        assert _is_narrow(tracer)
    (again,) = tracer.program(IDS)[:1]
    assert torch.equal(again, _hooked(net, IDS)[0])


def test_what_a_body_makes_at_other_sizes() -> None:
    """Its shapes are known at its own sizes alone: at others the whole runs."""
    net = _net()
    model = fxsight.Model(net, cache=False)
    for ids in (IDS, OTHER, OTHER[:1, :4], IDS):
        with model.trace(ids):
            hidden = model.transformer.h[0].mlp.output
            model.transformer.ln_f.output = hidden.tanh()
            model.output.logits[:, -1, 5].sum().backward()
            found = hidden.grad.save()
        kept: list[Tensor] = []

        def keep(_module: Any, _args: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            kept.append(output.requires_grad_())

        handles = [
            net.transformer.h[0].mlp.register_forward_hook(keep),
            net.transformer.ln_f.register_forward_hook(lambda m, a, output, kept=kept: kept[0].tanh()),
        ]
        loss = net(ids).logits[:, -1, 5].sum()
        for handle in handles:
            handle.remove()
        assert torch.equal(found, torch.autograd.grad(loss, kept)[0])


def test_elsewhere_the_whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    _trace(model, IDS)
    monkeypatch.setattr(bits, "same_bits", lambda *_: False)
    tracer, found = _trace(model, OTHER)
    assert all(map(torch.equal, found, _hooked(net, OTHER)))
    narrowed = tracer.program._narrowed
    assert len(narrowed._wholes) == 1
    tracer, found = _trace(model, IDS)  # tried before
    assert narrowed.instead([IDS]) is None
    assert all(map(torch.equal, found, _hooked(net, IDS)))


def test_weights_that_learn_have_all_rows() -> None:
    net = _net(frozen=False)
    model = fxsight.Model(net, cache=False)
    with model.trace(IDS) as tracer:
        loss = model.output.logits[:, -1, 5].sum()
        loss.backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    net(IDS).logits[:, -1, 5].sum().backward()
    assert all(torch.equal(found[name], p.grad) for name, p in net.named_parameters() if p.grad is not None)
    assert not _is_narrow(tracer)


def test_gradients_of_gradients_have_all_rows() -> None:
    model = fxsight.Model(_net(), cache=False)
    model._module.set_attn_implementation("eager")
    with model.trace(IDS) as tracer:
        h = model.transformer.h[0].output
        h = h[0] if isinstance(h, tuple) else h
        (first,) = torch.autograd.grad(model.output.logits[:, -1, 5].sum(), h, create_graph=True)
        torch.autograd.grad(first.pow(2).sum(), h)[0].save()
    assert not _is_narrow(tracer)


def test_a_gradient_of_the_logits_is_whole() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(IDS) as tracer:
        logits = model.output.logits
        logits[:, -1, 5].sum().backward()
        found = logits.grad.save()
    wanted = torch.zeros_like(found)
    wanted[:, -1, 5] = 1
    assert torch.equal(found, wanted)
    assert not _is_narrow(tracer)


def test_compiled_it_is_always_so() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    rtol, atol = TOLERANCE[torch.float32]
    for ids in (IDS, OTHER):
        tracer, found = _trace(model, ids, "inductor")
        for one, other in zip(found, _hooked(net, ids), strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
        assert _is_narrow(tracer)
    with torch.no_grad(), model.trace(IDS, backend="inductor") as tracer:
        last = model.output.logits[:, -1].save()
    torch.testing.assert_close(last, net(IDS).logits[:, -1], rtol=rtol, atol=atol)
    assert _is_narrow(tracer)
