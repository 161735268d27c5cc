"""``JointGradient``: written-out backward passes compute what autograd does, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from fxsight.errors import CausalityError, TraceError
from fxsight.gradient import arrived, backward, gradient
from fxsight.passes import DropUnused, JointGradient
from fxsight.testing import listing, program_of, random_inputs, run

LINES = """
    x: 'input 0'                                                        # f32[batch, 8]
    w: 'weight w'                                                       # f32[8, 8]
    linear = aten.linear.default(x, w)                                  # f32[batch, 8]
    relu = aten.relu.default(linear)                                    # f32[batch, 8]
    loss = aten.sum.default(relu)                                       # f32[]
    at = gradient(linear, 0, loss)                                      # f32[batch, 8]
    {edit}
    back = backward(0, (loss,), (None,), {edits}, {leaves}, (False, False, '{unused}'), (w,), (), ())   # none
    return ({results})
"""


def _program(
    results: str = "at,", edit: str = "", edits: str = "()", leaves: str = "()", unused: str = "refuse"
) -> str:
    return LINES.format(results=results, edit=edit, edits=edits, leaves=leaves, unused=unused)


JOINT = JointGradient({"batch": 3})


def test_it_is_written_out_as_plain_operators() -> None:
    program = DropUnused()(JOINT(program_of(_program())))
    assert listing(program) == (
        "linear = aten.t.default(w)\n"
        "linear_1 = aten.mm.default(x, linear)\n"
        "relu = aten.relu.default(linear_1)\n"
        "loss = aten.sum.default(relu)\n"
        "back = aten.ones_like.default(loss, pin_memory=False, memory_format=torch.preserve_format)\n"
        "grad_loss = aten.sym_size.int(x, 0)\n"
        "grad_loss_1 = aten.expand.default(back, [grad_loss, 8])\n"
        "grad_relu = aten.threshold_backward.default(grad_loss_1, relu, 0)\n"
        "return (grad_relu,)"
    )


@pytest.mark.parametrize("seed", range(3))
def test_it_computes_what_autograd_does(seed: int) -> None:
    text = _program("at, changed, relu,", "changed = aten.mul.Tensor(at, 2)  # f32[batch, 8]", "((at, changed),)")
    program = program_of(text)
    inputs = random_inputs(program, seed)
    found, changed, relu = run(JOINT(program), inputs)
    weight = run(program_of("x: 'input 0'  # f32[batch, 8]\nw: 'weight w'  # f32[8, 8]\nreturn (w,)"), inputs)[0]
    h: torch.Tensor = torch.nn.functional.linear(inputs[0], weight).requires_grad_()
    torch.relu(h).sum().backward()  # type: ignore[no-untyped-call]
    assert h.grad is not None
    assert torch.equal(found, h.grad)
    assert torch.equal(changed, h.grad * 2)
    assert torch.equal(relu, h.relu())


def test_leaves_get_their_gradients_last() -> None:
    program = DropUnused()(JOINT(program_of(_program(leaves="None"))))
    assert listing(program).splitlines()[-2] == "accumulate = accumulate((w,), (grad_linear_3,))"


def test_a_program_without_backward_passes_stays() -> None:
    program = program_of("x: 'input 0'  # f32[batch, 8]\nrelu = aten.relu.default(x)  # f32[batch, 8]\nreturn (relu,)")
    assert JOINT(program) is program


def test_the_given_program_stays_as_it_is() -> None:
    program = program_of(_program())
    before = program.text
    assert JOINT(program).text == JOINT(program).text
    assert program.text == before


def test_it_holds_for_the_sizes_that_it_names() -> None:
    assert "batch >= 2" in map(str, JOINT(program_of(_program())).guards)
    assert "Eq(batch, 1)" in map(str, JointGradient({"batch": 1})(program_of(_program())).guards)


def test_a_gradient_without_a_path() -> None:
    text = (
        _program()
        .replace("gradient(linear,", "gradient(other,")
        .replace("    relu = ", "    other = aten.neg.default(x)  # f32[batch, 8]\n    relu = ")
    )
    with pytest.raises(TraceError, match="this gradient does not exist: the loss does not depend on the value"):
        JOINT(program_of(text))
    zeros = program_of(text.replace("'refuse'", "'zeros'"))
    assert not run(JOINT(zeros), random_inputs(zeros))[0].any()


def test_an_edit_that_needs_a_later_gradient() -> None:
    edit = "before = gradient(x, 0, loss)  # f32[batch, 8]"
    text = _program("before,", edit, "((at, before),)")
    with pytest.raises(CausalityError, match="this gradient arrives later than one that is edited with it"):
        JOINT(program_of(text))


@pytest.mark.parametrize(
    "function", [partial(gradient, *range(2)), partial(arrived, *range(3)), partial(backward, *range(9))]
)
def test_what_stands_for_a_pass_is_never_called(function: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="a backward pass is written out as plain operators before a program runs"):
        function()
