"""``h[part] += v`` reads the part, changes it and puts it back, which is nothing where it is the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsight import Model
from tests.oracle import Edit, run

INDEX = torch.tensor([2, 0])


def _whole(h: Tensor) -> None:
    h[:] += 1


def _column(h: Tensor) -> None:
    h[:, 0] *= 2
    h[..., 1:3] -= h[..., 2:4]


def _nested(h: Tensor) -> None:
    part = h[:, 1:]
    part[:, 1] += 3
    part[:] /= 2


def _copied(h: Tensor) -> None:  # an index with numbers is a copy: putting it back counts
    h[:, INDEX] += 1
    h[h[:, 0].argsort()] *= 2


def _crossed(h: Tensor) -> None:  # another part of the same memory
    h[:, 0] = h[:, 1]
    h[:, 2:4] = h[:, 1:3].clone()


def _itself(h: Tensor) -> None:
    part = h[:, 0]
    h[:, 0] = part
    h[:, 0] = 5
    h[:, 1] = part


@pytest.mark.parametrize("change", [_whole, _column, _nested, _copied, _crossed, _itself])
def test_as_hooks(change: Callable[[Tensor], None]) -> None:
    torch.manual_seed(0)
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False), cache=False)
    x = torch.randn(3, 4)
    want = run(model._module, (x,), {}, [Edit("0", "output", "inplace", change)])[0]
    for _ in range(2):
        with model.trace(x):
            change(model[0].output)
            out = model.output.save()
        assert torch.equal(out, want)


def test_nothing_is_put_back() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False), cache=False)
    with model.trace(torch.ones(3, 4)) as tracer:
        h: Any = model[0].output
        h[:, 1:] += 1
        model.output.save()
    text = str(tracer.program)
    assert "setitem" not in text and text.count("aten.clone") == 1
