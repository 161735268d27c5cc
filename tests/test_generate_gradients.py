"""Gradients at the steps of a generation: a loss is differentiated in its step, as in a loop with autograd."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fxsight import LanguageModel
from fxsight.errors import TraceError
from tests.generating import GREEDY, IDS, hf, hooked


@contextmanager
def differentiated(module: Any, loss: Callable[[Any], Any]) -> Iterator[list[torch.Tensor]]:
    """While open, each step is made once more with autograd, on a copy of its cache; the gradients of block 0."""
    original, found = module.forward, list[torch.Tensor]()

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        kept: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            kept.append(output.requires_grad_())
            output.retain_grad()
            return output

        past = copy.deepcopy(kwargs.get("past_key_values"))
        handle = module.transformer.h[0].register_forward_hook(keep, prepend=True)
        with torch.enable_grad():
            loss(original(*args, **{**kwargs, "past_key_values": past}).logits).backward()
        handle.remove()
        assert kept[0].grad is not None
        found.append(kept[0].grad.clone())
        return original(*args, **kwargs)

    module.forward = forward
    try:
        yield found
    finally:
        del module.forward


def loss_of(logits: Any) -> Any:
    return logits[:, -1].logsumexp(-1).sum()


def test_gradients_of_every_step(model: Any, module: Any) -> None:
    mine: Any = torch.zeros(32, requires_grad=True)
    theirs: Any = torch.zeros(32, requires_grad=True)
    with differentiated(module, loss_of) as expected, hooked(module, "transformer.h.0", lambda step, h: h + theirs):
        ids = hf(module)
    for _ in range(2):
        mine.grad = None
        gradients: list[Any] = []
        losses: list[Any] = []
        with model.generate(IDS, **GREEDY) as tracer:
            for _ in tracer.all():
                h = model.transformer.h[0].output
                gradients.append(h.grad.save())
                model.transformer.h[0].output = h + mine
                losses.append(loss_of(model.lm_head.output).save())
                losses[-1].backward()
        assert torch.equal(tracer.result, ids) and not any(loss.requires_grad for loss in losses)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
        assert torch.equal(mine.grad, theirs.grad)


def test_gradients_of_one_step_and_of_weights(module: Any) -> None:
    trained: Any = copy.deepcopy(module)
    other: Any = copy.deepcopy(module)
    for net in (trained, other):
        net.lm_head.weight.requires_grad_(True)
    steps: list[int] = []

    def loss(logits: Any) -> Any:
        steps.append(1)
        return loss_of(logits) * (len(steps) == 3)

    with differentiated(other, loss) as expected:
        ids = hf(other)
    model: Any = LanguageModel(trained)
    with model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[2]:
            h = model.transformer.h[0].output
            loss_of(model.lm_head.output).backward()
            gradient = h.grad.save()
    assert torch.equal(tracer.result, ids) and torch.equal(gradient, expected[2])
    assert torch.equal(trained.lm_head.weight.grad, other.lm_head.weight.grad)


def test_in_an_invoke_and_with_numbers(model: Any, module: Any) -> None:
    with differentiated(module, lambda logits: loss_of(logits[:1])) as expected:
        hf(module)
    gradients: list[Any] = []
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS[:1]):
            for _ in tracer.all():
                h = model.transformer.h[0].output
                loss_of(model.lm_head.output).backward()
                gradients.append(h.grad.save())
        with tracer.invoke(IDS[1:]):
            pass
    assert all(torch.equal(a, b[:1]) for a, b in zip(gradients, expected, strict=True))
    with model.generate(IDS, **GREEDY) as tracer:
        for step in tracer.iter[:2]:
            h = model.transformer.h[0].output
            loss = loss_of(model.lm_head.output[:1])
            loss.backward()
            assert float(h.grad.sum()) == float(expected[step].sum())


def test_nothing_flows_from_step_to_step(model: Any, module: Any) -> None:
    losses: list[Any] = []
    said = "backward.* of step 3 .* of an earlier step, .* no gradient flows from step to step.*detach"
    with pytest.raises(TraceError, match=said), model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.all():
            losses.append(loss_of(model.lm_head.output))
        total: Any = torch.stack(losses).sum()
        total.backward()
    with model.generate(IDS, **GREEDY) as tracer:
        first = model.transformer.h[0].output[:, -1].detach()
        for _ in tracer.iter[1]:
            h = model.transformer.h[0].output
            (h[:, -1] * first).sum().backward()
            gradient = h.grad.save()
        kept = first.save()
    assert torch.equal(gradient[:, -1], kept)
