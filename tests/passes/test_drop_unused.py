"""What nobody reads is not computed, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxsight
from fxsight.passes import DropUnused
from fxsight.testing import check_pass, listing, program_of, random_program, run


def test_what_nobody_reads_goes() -> None:
    program = program_of(
        """
        x: 'input 0'                       # f32[batch, 8]
        relu = aten.relu.default(x)        # f32[batch, 8]
        neg = aten.neg.default(x)          # f32[batch, 8]
        exp = aten.exp.default(neg)        # f32[batch, 8]
        abs_1 = aten.abs.default(relu)     # f32[batch, 8]
        return (relu,)
        """
    )
    result = check_pass(DropUnused(), program, equals=lambda _, x: x.relu())
    assert listing(result) == "relu = aten.relu.default(x)\nreturn (relu,)"


def test_nothing_to_drop_is_the_same_program() -> None:
    program = program_of("x: 'input 0'  # f32[batch, 8]\nrelu = aten.relu.default(x)  # f32[batch, 8]\nreturn (relu,)")
    assert DropUnused()(program) is program


def test_placeholders_stay() -> None:
    program = program_of(
        """
        x: 'input 0'                       # f32[8]
        y: 'input 1'                       # f32[8]
        w: 'weight w'                      # f32[8]
        neg = aten.neg.default(y)          # f32[8]
        return (x,)
        """
    )
    assert list(check_pass(DropUnused(), program).bindings) == ["x", "y", "w"]


def test_a_change_of_memory_that_is_read_later_stays() -> None:
    program = program_of(
        """
        x: 'input 0'                           # f32[8]
        neg = aten.neg.default(x)              # f32[8]
        half = aten.slice.Tensor(neg, 0, 4)    # f32[4]  {shares='neg'}
        mul = aten.mul_.Tensor(half, 2)        # f32[4]  {shares='neg'}
        other = aten.exp.default(x)            # f32[8]
        add = aten.add_.Tensor(other, 1)       # f32[8]  {shares='other'}
        return (neg,)
        """
    )
    result = check_pass(DropUnused(), program, equals=lambda _, x: torch.cat([-x[:4], -2 * x[4:]]))
    assert listing(result).splitlines() == [
        "neg = aten.neg.default(x)",
        "half = aten.slice.Tensor(neg, 0, 4)",
        "mul = aten.mul_.Tensor(half, 2)",
        "return (neg,)",
    ]


def test_a_change_of_a_weight_stays() -> None:
    program = program_of(
        """
        x: 'input 0'                       # f32[8]
        count: 'weight count'              # i64[]
        add = aten.add_.Tensor(count, 1)   # i64[]  {shares='count'}
        return (x,)
        """
    )
    assert DropUnused()(program) is program


def test_a_draw_stays_while_a_later_one_is_needed() -> None:
    """Both draw from one stream: without the first, the second would draw other numbers."""
    pair = "(f32[8], b1[8])"
    program = program_of(
        f"""
        x: 'input 0'                                       # f32[8]
        first = aten.native_dropout.default(x, 0.5, True)  # {pair}
        unused = operator.getitem(first, 0)                # f32[8]  {{shares='first[0]'}}
        second = aten.native_dropout.default(x, 0.5, True) # {pair}
        used = operator.getitem(second, 0)                 # f32[8]  {{shares='second[0]'}}
        third = aten.native_dropout.default(x, 0.5, True)  # {pair}
        return (used,)
        """
    )
    assert listing(check_pass(DropUnused(), program)).splitlines() == [
        "first = aten.native_dropout.default(x, 0.5, True)",
        "second = aten.native_dropout.default(x, 0.5, True)",
        "used = operator.getitem(second, 0)",
        "return (used,)",
    ]


def test_a_trace_that_reads_the_first_layer_does_not_run_the_second() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).requires_grad_(False)
    model, x = fxsight.Model(net, cache=False), torch.randn(3, 4)
    with model.trace(x) as tracer:
        hidden = model[1].output.save()
    assert torch.equal(hidden, net[:2](x))
    assert sum("linear" in name for name in tracer.program.program.nodes) == 1


@pytest.mark.parametrize("seed", range(30))
def test_random_programs(seed: int) -> None:
    program = random_program(seed)
    result = check_pass(DropUnused(), program)
    assert DropUnused()(result) is result
    assert len(result.nodes) <= len(program.nodes)


def test_a_check_works_on_copies() -> None:
    program = random_program(1)
    x, y = torch.ones(2, 8), torch.ones(2, 8)
    run(program, [x, y])
    assert torch.equal(x, torch.ones(2, 8)) and torch.equal(y, torch.ones(2, 8))
