"""``unbind(stack(xs))[i]`` is ``xs[i]``, where nobody could tell the two apart."""

from __future__ import annotations

import pytest

from fxsight.passes import CancelStack
from fxsight.program import Program
from fxsight.testing import check_pass, listing, program_of, random_program


def stacked(take: str, dtype: str = "f32") -> Program:
    """Two values stacked, and one of them taken out by some lines that end with the member ``m``."""
    return program_of(
        f"""
        x: 'input 0'                            # f32[batch, 8]
        y: 'input 1'                            # {dtype}[batch, 8]
        stack = aten.stack.default([x, y])      # f32[2, batch, 8]
        {take}
        neg = aten.neg.default(m)               # f32[batch, 8]
        return (neg,)
        """
    )


TAKES = (
    "m = aten.select.int(stack, 0, 1)           # f32[batch, 8]  {shares='stack'}",
    "m = aten.select.int(stack, -3, -1)         # f32[batch, 8]  {shares='stack'}",
    "m = torch.Tensor.__getitem__(stack, 1)     # f32[batch, 8]  {shares='stack'}",
)


@pytest.mark.parametrize("take", TAKES)
def test_a_member_is_the_value_that_was_stacked(take: str) -> None:
    assert listing(check_pass(CancelStack(), stacked(take))) == "neg = aten.neg.default(y)\nreturn (neg,)"


@pytest.mark.parametrize("unbind", ["aten.unbind.int(stack)", "torch.unbind(stack, 0)", "torch.Tensor.unbind(stack)"])
def test_unbind(unbind: str) -> None:
    two = "(f32[batch, 8], f32[batch, 8])  {parts=[{'shares': 'stack'}, {'shares': 'stack'}]}"
    take = f"u = {unbind}  # {two}\nm = operator.getitem(u, 0)  # f32[batch, 8]  {{shares='stack'}}"
    assert listing(check_pass(CancelStack(), stacked(take))) == "neg = aten.neg.default(x)\nreturn (neg,)"


def test_the_stack_stays_for_others() -> None:
    program = program_of(
        """
        x: 'input 0'                            # f32[8]
        stack = aten.stack.default([x, x])      # f32[2, 8]
        m = aten.select.int(stack, 0, 0)        # f32[8]  {shares='stack'}
        neg = aten.neg.default(m)               # f32[8]
        return (neg, stack)
        """
    )
    assert listing(check_pass(CancelStack(), program)).splitlines() == [
        "stack = aten.stack.default([x, x])",
        "neg = aten.neg.default(x)",
        "return (neg, stack,)",
    ]


@pytest.mark.parametrize(
    "take",
    [
        "m = aten.select.int(stack, 2, 1)       # f32[2, batch]  {stride='8*batch, 8', shares='stack'}",
        "m = aten.slice.Tensor(stack, 0, 1)     # f32[1, batch, 8]  {shares='stack'}",
    ],
    ids=["another dimension", "not one member"],
)
def test_what_is_no_member_stays(take: str) -> None:
    program = stacked(take)
    assert CancelStack()(program) is program


def test_a_member_of_another_dtype_stays() -> None:
    program = stacked(TAKES[0], dtype="f16")
    assert CancelStack()(program) is program


@pytest.mark.parametrize("changed", ["x", "m"])
def test_memory_that_changes_is_left_alone(changed: str) -> None:
    """A stack is a copy: what is written into one of the two, the other does not see."""
    program = program_of(
        f"""
        given: 'input 0'                        # f32[8]
        x = aten.neg.default(given)             # f32[8]
        stack = aten.stack.default([x, x])      # f32[2, 8]
        m = aten.select.int(stack, 0, 0)        # f32[8]  {{shares='stack'}}
        add = aten.add_.Tensor({changed}, 1)    # f32[8]  {{shares='{"x" if changed == "x" else "stack"}'}}
        return (m, x)
        """
    )
    assert CancelStack()(program) is program
    check_pass(CancelStack(), program, equals=lambda _, v: (-v + (changed == "m"), -v + (changed == "x")))


@pytest.mark.parametrize("seed", range(30))
def test_random_programs(seed: int) -> None:
    check_pass(CancelStack(), random_program(seed))
