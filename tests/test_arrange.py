"""What a body computes of gradients runs as soon as it makes little of them, and depth first; every bit stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxsight

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))).requires_grad_(False)


def _lines(tracer: Any) -> list[str]:
    return [n.name for n in tracer.program._plain.graph.nodes if n.op == "call_function"]


def test_a_gradient_is_used_up_before_the_next_one_comes() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    with model.trace(X) as tracer:
        values = [layer.output for layer in model]
        model.output.pow(2).sum().backward()
        scores = [(value * value.grad).sum().save() for value in values]
    lines = _lines(tracer)
    _, *sums = [place for place, name in enumerate(lines) if name.startswith("user_sum")]  # the loss is one
    backward = [place for place, name in enumerate(lines) if name.startswith("grad_tanh")]
    assert len(sums) == 4
    assert sums[0] < backward[0] < sums[1] < backward[1] < sums[2] < backward[2] < sums[3], lines
    kept: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, out: kept.append(out.requires_grad_())) for layer in net]
    gradients = torch.autograd.grad(net(X).pow(2).sum(), kept)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, (v * g).sum()) for a, v, g in zip(scores, kept, gradients, strict=True))


def test_what_is_large_waits_for_what_needs_it_depth_first() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    with model.trace(X) as tracer:
        values = [layer.output for layer in model]
        model.output.pow(2).sum().backward()
        large = [torch.einsum("bi,bj->bij", value.grad, value) for value in values]
        shifted = [(one - 1) * 2 for one in large]
        stacked: Any = torch.stack([one.tanh() for one in shifted])
        total = stacked.save()
    lines = _lines(tracer)
    tanhs = [place for place, name in enumerate(lines) if name.startswith("user_tanh")]
    products = [place for place, name in enumerate(lines) if name.startswith("user_mul")]
    assert sorted([*tanhs, *products]) == [x for pair in zip(products, tanhs, strict=True) for x in pair], lines
    assert total.shape == (4, 3, 8, 8)


def test_random_numbers_are_drawn_in_their_order() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)

    def drawn() -> tuple[Tensor, Tensor]:
        with model.trace(X):
            first, second = model[0].output, model[2].output
            model.output.sum().backward()
            one = (torch.rand_like(first.grad) * first.grad).sum().save()
            other = (torch.rand_like(second.grad) * second.grad).sum().save()
        return one, other

    torch.manual_seed(5)
    found = drawn()
    kept: list[Tensor] = []
    handles = [net[i].register_forward_hook(lambda m, a, out: kept.append(out.requires_grad_())) for i in (0, 2)]
    gradients = torch.autograd.grad(net(X).sum(), kept)
    for handle in handles:
        handle.remove()
    torch.manual_seed(5)
    assert all(torch.equal(a, (torch.rand_like(g) * g).sum()) for a, g in zip(found, gradients, strict=True))
