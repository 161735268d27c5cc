"""A trace whose numbers vary is one program, and its numbers are those of hooks all the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


@cache
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def expected(x: Tensor, column: int, factor: float) -> Tensor:
    def change(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, column] *= factor
        return output

    with net().up.register_forward_hook(change):
        result: Tensor = net()(x)
    return result


def scale(model: Any, x: Tensor, column: int, factor: float, backend: Any = "eager") -> tuple[Tensor, Any]:
    with model.trace(x, backend=backend) as tracer:
        model.up.output[:, column] *= factor
        out = model.output.save()
    return out, tracer.program


def test_from_the_third_number_on_nothing_is_woven() -> None:
    model, x = fxsight.Model(net(), cache=False), torch.randn(3, 4)
    texts = []
    for column, factor in [(0, 0.5), (1, 2.0), (2, -1.0), (0, 0.0), (1, -0.0), (5, 2.5)]:
        out, program = scale(model, x, column, factor)
        assert torch.equal(out, expected(x, column, factor))
        texts.append(program.program)
    assert "number_0" not in texts[0].text and "number_0" in texts[1].text
    assert all(program is texts[1] for program in texts[1:])


def test_the_program_keeps_its_numbers() -> None:
    model, x, other = fxsight.Model(net(), cache=False), torch.randn(3, 4), torch.randn(5, 4)
    programs = [(column, scale(model, x, column, 2.0)[1]) for column in (0, 1, 2)]
    for column, program in programs:
        assert torch.equal(program(other)[0], expected(other, column, 2.0))


def test_a_number_that_begins_to_vary_later() -> None:
    model, x = fxsight.Model(net(), cache=False), torch.randn(3, 4)
    for column, factor in [(0, 2.0), (1, 2.0), (1, 3.0), (4, 5.0)]:
        assert torch.equal(scale(model, x, column, factor)[0], expected(x, column, factor))


def test_sizes_of_slices_vary() -> None:
    model, x = fxsight.Model(net(), cache=False), torch.randn(5, 4)
    for count in (1, 2, 4, 5):
        with model.trace(x, backend="eager"):
            model.up.output[:count] = 0
            out, part = model.output.save(), model.up.output[:, : count - 1].sum(1).save()
        whole = net().up(x)
        whole[:count] = 0
        assert torch.equal(out, net().down(torch.relu(whole)))
        assert torch.equal(part, whole[:, : count - 1].sum(1))


def test_a_number_that_a_pass_must_see() -> None:
    """What is taken out of a stack of later values is causal only where its number is known."""
    model, x = fxsight.Model(net(), cache=False), torch.randn(3, 4)
    for member in (0, 1, 0):
        with model.trace(x, backend="eager"):
            both = torch.stack([model.up.input, model.up.input * 2])
            model.up.input = both[member]
            out = model.output.save()
        assert torch.equal(out, net()(x * (1 + member)))


def test_an_index_out_of_range_is_an_error_at_its_line() -> None:
    model, x = fxsight.Model(net(), cache=False), torch.randn(3, 4)
    for column in (0, 1, 2):
        scale(model, x, column, 2.0)
    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        scale(model, x, 9, 2.0)
