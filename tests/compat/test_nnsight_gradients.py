"""Gradients as nnsight's documents write them, on ``fxsight.compat.nnsight``."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from fxsight.compat.nnsight import NNsight

net = torch.nn.Sequential(
    OrderedDict([("layer1", torch.nn.Linear(5, 10)), ("layer2", torch.nn.Linear(10, 2))])
).requires_grad_(False)
tiny_model: Any = NNsight(net, cache=False)
input = torch.rand((1, 5))


def test_get() -> None:
    with tiny_model.trace(input):
        # We need to explicitly have the tensor require grad
        # as the model we defined earlier turned off requiring grad.
        tiny_model.layer1.output.requires_grad = True
        layer1_output_grad = tiny_model.layer1.output.grad.save()
        layer2_output_grad = tiny_model.layer2.output.grad.save()
        loss = tiny_model.output.sum()
        loss.backward()
    assert torch.equal(layer1_output_grad, torch.ones(1, 2) @ net.layer2.weight)  # type: ignore[operator, union-attr]
    assert torch.equal(layer2_output_grad, torch.ones(1, 2))


def test_set() -> None:
    with tiny_model.trace(input):
        tiny_model.layer1.output.requires_grad = True
        tiny_model.layer1.output.grad[:] = 0
        tiny_model.layer2.output.grad = tiny_model.layer2.output.grad * 2
        layer1_output_grad = tiny_model.layer1.output.grad.save()
        layer2_output_grad = tiny_model.layer2.output.grad.save()
        loss = tiny_model.output.sum()
        loss.backward()
    assert torch.equal(layer1_output_grad, torch.zeros(1, 10))
    assert torch.equal(layer2_output_grad, torch.full((1, 2), 2.0))


def test_passes_in_blocks() -> None:
    with tiny_model.trace(input):
        l1 = tiny_model.layer1.output
        l1.requires_grad_()
        loss = tiny_model.output.sum()
        with loss.backward(retain_graph=True):
            l1_grad1 = l1.grad.save()
        modified_loss = loss * 2
        with modified_loss.backward():
            l1_grad2 = l1.grad.save()
    assert torch.equal(l1_grad2, l1_grad1 * 2)


def test_tensors_outside_of_blocks() -> None:
    with tiny_model.trace(input):
        l1 = tiny_model.layer1.output.requires_grad_()
        loss = tiny_model.output.sum()
        loss.backward()
        kept = l1.grad.save()
    assert kept.shape == (1, 10)
