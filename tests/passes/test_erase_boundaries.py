"""Module borders leave no trace in what runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxsight.capture import capture
from fxsight.passes import EraseBoundaries
from fxsight.testing import check_pass, listing, program_of, random_program


def test_borders_go() -> None:
    program = program_of(
        """
        x: 'input 0'                         # f32[batch, 8]
        enter = aten.alias.default(x)        # f32[batch, 8]  {shares='x'}
        again = aten.alias.default(enter)    # f32[batch, 8]  {shares='x'}
        relu = aten.relu.default(again)      # f32[batch, 8]
        leave = aten.alias.default(relu)     # f32[batch, 8]  {shares='relu'}
        return (leave, enter)
        """
    )
    result = check_pass(EraseBoundaries(), program, equals=lambda _, x: (x.relu(), x))
    assert listing(result) == "relu = aten.relu.default(x)\nreturn (relu, x,)"


def test_without_borders_nothing_changes() -> None:
    program = program_of(
        """
        x: 'input 0'                         # f32[8]
        detach = aten.detach.default(x)      # f32[8]  {shares='x'}
        return (detach,)
        """
    )
    assert EraseBoundaries()(program) is program


def test_a_change_through_a_border_stays_in_its_place() -> None:
    program = program_of(
        """
        x: 'input 0'                         # f32[8]
        neg = aten.neg.default(x)            # f32[8]
        enter = aten.alias.default(neg)      # f32[8]  {shares='neg'}
        before = aten.exp.default(neg)       # f32[8]
        add = aten.add_.Tensor(enter, 1)     # f32[8]  {shares='neg'}
        after = aten.exp.default(enter)      # f32[8]
        return (before, after)
        """
    )
    result = check_pass(EraseBoundaries(), program, equals=lambda _, x: ((-x).exp(), (1 - x).exp()))
    assert listing(result).splitlines() == [
        "neg = aten.neg.default(x)",
        "before = aten.exp.default(neg)",
        "add = aten.add_.Tensor(neg, 1)",
        "after = aten.exp.default(neg)",
        "return (before, after,)",
    ]


def test_a_captured_module_runs_as_plain_torch() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.ReLU(), nn.Linear(6, 2))
    program = capture(net, (torch.randn(2, 4),), {})
    inputs = [[torch.randn(3, 4)], [torch.randn(5, 4)]]
    result = check_pass(EraseBoundaries(), program, module=net, inputs=inputs, equals=lambda m, x: m(x).detach())
    assert listing(result).splitlines() == [
        "linear = aten.linear.default(input_1, m_0_weight, m_0_bias)",
        "relu = aten.relu.default(linear)",
        "linear_1 = aten.linear.default(relu, m_3_weight, m_3_bias)",
        "return (linear_1,)",
    ]


@pytest.mark.parametrize("seed", range(30))
def test_random_programs(seed: int) -> None:
    assert "alias" not in listing(check_pass(EraseBoundaries(), random_program(seed)))
