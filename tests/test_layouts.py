"""Inputs that lie otherwise in memory than those of the capture: the same bits as the model's, narrowed or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsight import fewer
from fxsight.model import Model
from tests.oracle import Edit, run


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 98)

    def forward(self, x: Tensor) -> Any:
        """f32[batch, length, width] to f32[batch, length, 98]."""
        return self.head(self.norm(x + torch.tanh(self.first(x))))


PLAIN = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
OTHERS = (
    PLAIN.transpose(1, 2).contiguous().transpose(1, 2),
    PLAIN.transpose(0, 1).contiguous().transpose(0, 1),
    torch.stack([PLAIN, PLAIN], -1)[..., 0],
    PLAIN[:1, :1].expand(2, 5, 16),
)


@pytest.mark.parametrize("order", [(PLAIN, *OTHERS, PLAIN), (*OTHERS, PLAIN)])
def test_sweeps(order: tuple[Tensor, ...]) -> None:
    net = Net().eval().requires_grad_(False)
    model = Model(net, cache=False)

    def body(row: int) -> Any:
        model.first.output[:, row] *= 2
        return model.output[:, -1, 3]

    for x in order:
        grid = model.sweep(body, x, row=[0, 1, 3])
        for number, row in enumerate((0, 1, 3)):
            assert torch.equal(grid.values[number], run(net, (x,), {}, [_doubled(row)])[0][:, -1, 3])


def _doubled(row: int) -> Edit:
    def change(h: Tensor) -> None:
        h[:, row] *= 2

    return Edit("first", "output", "inplace", change)


@pytest.mark.parametrize("learns", [False, True])
def test_traces(learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, rows are left out from the second run on; with a backward pass, from the first."""
    monkeypatch.setattr(fewer, "LEAST", 1)
    net = Net().eval().requires_grad_(learns)
    model = Model(net, cache=False)
    for x in (PLAIN, PLAIN, *OTHERS, *OTHERS, PLAIN):
        with model.trace(x):
            hidden = model.first.output
            logits, found = model.output[:, -1, 3].save(), None
            if learns:
                logits.sum().backward()
                found = hidden.grad.save()
        kept: list[Tensor] = []
        handle = net.first.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
        right = net(x)[:, -1, 3]
        handle.remove()
        assert torch.equal(logits, right)
        if found is not None:
            assert torch.equal(found, torch.autograd.grad(right.sum(), kept)[0])
