"""Where only the shape of a value is used, the value is not computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxsight
from fxsight.passes import DropUnused, SkipOverwritten
from fxsight.program import Program
from fxsight.testing import check_pass, listing, program_of


def test_the_shape_of_an_earlier_value_will_do() -> None:
    program = program_of(
        """
        x: 'input 0'                                   # f32[batch, 8]
        mul = aten.mul.Tensor(x, 2)                    # f32[batch, 8]
        zeros = torch.zeros_like(mul)                  # f32[batch, 8]
        exp = aten.exp.default(zeros)                  # f32[batch, 8]
        return (exp,)
        """
    )
    result = check_pass(SkipOverwritten(), program, equals=lambda _, x: torch.ones_like(x))
    assert listing(DropUnused()(result)) == (
        "zeros = torch.zeros_like(x)\nexp = aten.exp.default(zeros)\nreturn (exp,)"
    )


@pytest.mark.parametrize(
    "line",
    [
        "mul = aten.mul.Tensor(x, 2)  # f32[batch, 4]",  # another shape
        "mul = aten.gt.Scalar(x, 2)  # b1[batch, 8]",  # another dtype
        "mul = aten.mul.Tensor(x, 2)  # f32[batch, 8]  {stride='1, batch'}",  # other strides
    ],
)
def test_nothing_fits(line: str) -> None:
    program = program_of(
        f"""
        x: 'input 0'                                   # f32[batch, 8]
        {line}
        zeros = torch.zeros_like(mul)                  # f32[batch, 8]
        return (zeros,)
        """
    )
    assert SkipOverwritten()(program) is program


def test_memory_that_is_changed_does_not_stand_in() -> None:
    program = program_of(
        """
        x: 'input 0'                                   # f32[batch, 8]
        y: 'input 1'                                   # f32[batch, 4]
        exp = aten.exp.default(x)                      # f32[batch, 8]
        add = aten.add_.Tensor(x, 1)                   # f32[batch, 8]  {shares='x'}
        mul = aten.mul.Tensor(exp, 2)                  # f32[batch, 8]
        zeros = torch.zeros_like(exp)                  # f32[batch, 8]
        return (zeros,)
        """
    )
    assert SkipOverwritten()(program) is program


class Block(nn.Module):
    """A residual block, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``(batch, 8)``, and returns as much."""
        out: torch.Tensor = x + self.mlp(x)
        return out

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """The branch."""
        out: torch.Tensor = self.down(self.up(x).relu())
        return out


def _operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("form", ["number", "zeros", "whole", "fill", "row"])
def test_an_overwritten_output_is_not_run(form: str) -> None:
    net = nn.Sequential(Block(), Block()).eval().requires_grad_(False)
    model, x = fxsight.Model(net, cache=False), torch.randn(3, 8)
    row = torch.randn(8)
    with model.trace(x) as tracer:
        if form == "number":
            model[1].down.output = 2
        elif form == "zeros":
            model[1].down.output = torch.zeros_like(model[1].down.output)
        elif form == "whole":
            model[1].down.output[:] = 2
        elif form == "fill":
            model[1].down.output.fill_(2)
        else:
            model[1].down.output = row
        out = model.output.save()
    wanted = net[0](x) + {"zeros": torch.zeros(8), "row": row}.get(form, torch.full((8,), 2.0))
    assert torch.equal(out, wanted)
    operators = _operators(tracer.program.program)
    assert operators.count("aten.linear.default") == 2, operators
    assert "aten.relu.default" in operators
    assert torch.equal(tracer.program(x[:2])[0], wanted[:2])


def test_what_is_partly_overwritten_is_run() -> None:
    net = nn.Sequential(Block(), Block()).eval().requires_grad_(False)
    model, x = fxsight.Model(net, cache=False), torch.randn(3, 8)
    with model.trace(x) as tracer:
        model[1].down.output[:, 1:] = 2
        out = model.output.save()
    second = net[1]
    assert isinstance(second, Block)
    branch = second.mlp(net[0](x))
    branch[:, 1:] = 2
    assert torch.equal(out, net[0](x) + branch)
    assert _operators(tracer.program.program).count("aten.linear.default") == 4
