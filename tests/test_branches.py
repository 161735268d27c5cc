"""Conditions, early stop and skip, against hooks; what a branch not taken has written down leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from tests.oracle import Edit, Read, run


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(x)))
        return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.inner(x), None


class Net(nn.Module):
    """Two blocks that return tuples, and a cell that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.cell, self.last = nn.ModuleList([Block(), Block()]), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        found: Tensor = self.last(x)
        return found


@cache
def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@cache
def _model() -> Any:
    return fxsight.Model(_net(), cache=False)


def _x() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def _out(*steps: Edit | Read) -> Any:
    out, found = run(_net(), (_x(),), {}, steps)
    return found[0] if found else out


def _linears(tracer: Any) -> int:
    return [str(n.target) for n in tracer.program.program.nodes.values()].count("aten.linear.default")


def _never() -> None:
    raise AssertionError("what follows is not done")


# -------------------------------------------------------------------------------------------------------------- cond


@pytest.mark.parametrize("rand_int", [2, 3])
def test_t19_a_condition(rand_int: int) -> None:
    with _model().trace(_x()) as tracer:
        with tracer.cond(rand_int % 2 == 0):
            _model().last.input = torch.zeros(3, 6)
        with tracer.cond(rand_int % 2 != 0):
            _model().last.input = torch.ones(3, 6)
        out = _model().output.save()
    assert torch.equal(out, _net().last(torch.full((3, 6), float(rand_int % 2))))


@pytest.mark.parametrize("non_rand_int", [4, 8, 9])
def test_t20_nested_conditions(non_rand_int: int) -> None:
    with _model().trace(_x()) as tracer:
        with tracer.cond(non_rand_int > 0), tracer.cond(non_rand_int > 5):
            _model().last.output *= 2
            with tracer.cond(non_rand_int > 8):
                _model().last.output *= 3
        out = _model().output.save()
    factor = {4: 1, 8: 2, 9: 6}[non_rand_int]
    expected = _out()
    assert torch.equal(out, expected * 2 * 3 if factor == 6 else expected * factor)


def test_a_condition_on_a_value_sees_the_edits_so_far() -> None:
    with _model().trace(_x()) as tracer:
        _model().blocks[0].inner.output[:] = 0
        with tracer.cond((_model().blocks[0].output[0] == _model().blocks[0].input).all()):
            _model().last.output += 1
        with tracer.cond(_model().blocks[0].inner.output.abs().sum()):
            _model().last.output += 10
        out = _model().output.save()
    zeroed = Edit("blocks.0.inner", "output", "inplace", Tensor.zero_)
    assert torch.equal(out, _out(zeroed, Edit("last", "output", "inplace", lambda live: live.add_(1))))


def test_a_branch_not_taken_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Reads, assignments, in-place edits, views, saves, logs, stops, skips and tensors of the user's."""
    mine, kept = torch.zeros(3, 6), []
    with _model().trace(_x()) as tracer:
        handle, cell = _model().blocks[1].output[0], _model().cell.output
        with tracer.cond(handle.sum() > 1e9):
            _model().blocks[0].inner.output = torch.zeros(3, 6)
            _model().blocks[0].inner.output[:, 0] = 3
            handle[:] = 1
            handle[:, 1:].mul_(2)
            cell *= 2
            mine.add_(handle)
            kept.append(_model().cell.output.save())
            tracer.log("not seen", handle)
            _model().last.skip(_model().last.input)
            handle.stop()
        _model().blocks[0].inner.up.output[:, 0] = 0
        view, inside = handle[:, 1:].save(), _model().blocks[0].inner.output.save()
        out = _model().output.save()
    edit = Edit("blocks.0.inner.up", "output", "inplace", lambda live: live[:, 0].zero_())
    assert torch.equal(out, _out(edit)) and torch.equal(view, _out(edit, Read("blocks.1", "output"))[:, 1:])
    assert torch.equal(inside, _out(edit, Read("blocks.0.inner", "output")))
    assert (mine == 0).all() and capsys.readouterr().out == ""
    with pytest.raises(fxsight.NotSavedError, match="belongs to a branch whose condition was false"):
        print(kept[0])


def test_a_value_from_a_branch_not_taken() -> None:
    with _model().trace(_x()) as tracer:
        with tracer.cond(False):
            lost = _model().cell.output * 2
            lost.save()
        with pytest.raises(fxsight.NotSavedError, match=r"torch\.Tensor\.mul .* branch whose condition was false"):
            print(lost + 1)
        with pytest.raises(fxsight.NotSavedError, match="condition was false"):
            _model().last.output = lost
        with pytest.raises(fxsight.NotSavedError, match="condition was false"):
            lost.save()
        out = _model().output.save()
    assert torch.equal(out, _out())


def test_a_value_from_a_branch_taken() -> None:
    with _model().trace(_x()) as tracer:
        with tracer.cond(_model().cell.output.sum() < 1e9):
            found = (_model().cell.output * 2).save()
        _model().last.output = found
        out = _model().output.save()
    assert torch.equal(found, _out(Read("cell", "output")) * 2) and torch.equal(out, found)


def test_conditions_inside_a_branch_not_taken_compute_nothing() -> None:
    seen = []
    with _model().trace(_x()) as tracer:
        with tracer.cond(False):
            with tracer.cond(_model().cell.output.sum() > 0):
                seen.append(1)
            with tracer.cond(True):
                _model().last.output *= 5
        out = _model().last.output.save()
        after = _model().last.output + 1
        after.save()
    assert torch.equal(out, _out()) and torch.equal(after, _out() + 1)


def test_an_edit_after_a_branch_of_what_was_edited_in_it() -> None:
    for taken in (True, False):
        with _model().trace(_x()) as tracer:
            hidden = _model().blocks[0].inner.output
            hidden += 1
            with tracer.cond(taken):
                hidden *= 2
                _model().blocks[0].inner.output[:, 0] = 7
            _model().blocks[0].inner.output[:, 1] = 5
            out = _model().output.save()

        def edit(live: Tensor, taken: bool = taken) -> None:
            live += 1
            if taken:
                live *= 2
                live[:, 0] = 7
            live[:, 1] = 5

        assert torch.equal(out, _out(Edit("blocks.0.inner", "output", "inplace", edit)))


def test_an_error_in_a_branch() -> None:
    for taken in (True, False):
        with _model().trace(_x()) as tracer:
            with pytest.raises(IndexError), tracer.cond(taken):
                print(_model().cell.output[:, 17])
            _model().last.output[:] = 1
            out = _model().output.save()
        assert (out == 1).all()


def test_a_number_in_a_branch_not_taken() -> None:
    """Python runs the block in any case; a number there is that of the model, as it would be."""
    with _model().trace(_x()) as tracer:
        with tracer.cond(False):
            number = _model().cell.output.sum().item()
        out = _model().output.save()
    assert number == _out(Read("cell", "output")).sum().item() and torch.equal(out, _out())


def test_conditions_in_invokes() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(_x()):
            with tracer.cond(False):
                _model().last.output *= 100
            a = _model().output.save()
        with tracer.invoke(_x()):
            with tracer.cond(_model().last.output.sum() < 1e9):
                _model().last.output *= 2
            b = _model().output.save()
    net, x = _net(), torch.cat([_x(), _x()])
    assert torch.equal(a, net(x)[:3]) and torch.equal(b, net(x)[3:] * 2)


# -------------------------------------------------------------------------------------------------------------- stop


def test_t17_a_value_stops_the_forward() -> None:
    with _model().trace(_x()) as tracer:
        hidden = _model().cell.output.save()
        _model().cell.output.stop()
    assert torch.equal(hidden, _out(Read("cell", "output"))) and _linears(tracer) == 5


def test_t18_what_is_computed_later_has_no_value() -> None:
    with _model().trace(_x()) as tracer:
        late = _model().last.output.save()
        hidden = _model().cell.output.save()
        _model().cell.output.stop()
    assert torch.equal(hidden, _out(Read("cell", "output"))) and _linears(tracer) == 5
    message = r"last:output .* is computed later than cell:output, where the forward is stopped \(.*test_branches"
    with pytest.raises(fxsight.NotSavedError, match=message):
        print(late)


def test_a_stop_at_a_value_made_from_others() -> None:
    with _model().trace(_x()):
        total = (_model().blocks[0].inner.output.sum() + _model().blocks[1].inner.output.sum()).save()
        early, late = _model().blocks[1].inner.output.save(), _model().cell.output.save()
        total.stop()
    assert torch.equal(early, _out(Read("blocks.1.inner", "output"))) and total.ndim == 0
    with pytest.raises(fxsight.NotSavedError, match="is computed later than the result of"):
        print(late)


def test_of_two_stops_the_earlier() -> None:
    for earlier_first in (True, False):
        with _model().trace(_x()):
            early, middle = _model().blocks[0].inner.output.save(), _model().cell.output.save()
            stops = [_model().blocks[0].inner.output, _model().last.output]
            for value in stops if earlier_first else stops[::-1]:
                value.stop()
        assert torch.equal(early, _out(Read("blocks.0.inner", "output")))
        with pytest.raises(fxsight.NotSavedError, match=r"later than blocks\.0\.inner:output"):
            print(middle)


def test_a_stop_after_edits() -> None:
    with _model().trace(_x()) as tracer:
        _model().blocks[0].inner.output[:, 0] = 0
        hidden = _model().blocks[1].inner.input.save()
        _model().last.output *= 2
        _model().blocks[1].inner.output.stop()
    edit = Edit("blocks.0.inner", "output", "inplace", lambda live: live[:, 0].zero_())
    assert torch.equal(hidden, _out(edit, Read("blocks.1.inner", "input"))) and _linears(tracer) <= 4


def test_tracer_stop_ends_the_block() -> None:
    kept = []
    with _model().trace(_x()) as tracer:
        for block in _model().blocks:
            kept.append(block.inner.output.save())
            if kept[-1].sum() < 1e9:
                tracer.stop()
        _never()
    assert len(kept) == 1 and torch.equal(kept[0], _out(Read("blocks.0.inner", "output")))
    assert _linears(tracer) == 0  # computed for the condition


def test_tracer_stop_in_conditions_and_functions() -> None:
    def deep(tracer: Any) -> None:
        with tracer.cond(True):
            tracer.stop()

    with _model().trace(_x()) as tracer:
        _model().last.output *= 2
        out = _model().output.save()
        deep(tracer)
        _never()
    assert torch.equal(out, _out() * 2)


def test_tracer_stop_of_an_outer_trace() -> None:
    other = fxsight.Model(_net(), cache=False)
    with _model().trace(_x()) as tracer:
        out = _model().output.save()
        with other.trace(_x()):
            lost = other.output.save()
            tracer.stop()
    assert torch.equal(out, _out())
    with pytest.raises(fxsight.NotSavedError):
        print(lost)


def test_tracer_stop_in_a_branch_not_taken() -> None:
    with _model().trace(_x()) as tracer:
        with tracer.cond(False):
            tracer.stop()
        out = _model().output.save()
    assert torch.equal(out, _out())


# -------------------------------------------------------------------------------------------------------------- skip


def test_a_skip() -> None:
    with _model().trace(_x()) as tracer:
        _model().blocks[0].skip((_model().blocks[0].input, None))
        out = _model().output.save()
    taken = _x()
    assert torch.equal(out, _out(Edit("blocks.0", "output", "assign", lambda live: taken))) and _linears(tracer) == 6


def test_all_blocks_skipped() -> None:
    with _model().trace(_x()) as tracer:
        for block in _model().blocks:
            block.skip((block.input, None))
        hidden, out = _model().cell.input.save(), _model().output.save()
    taken = _x()
    assert torch.equal(hidden, taken) and _linears(tracer) == 4
    assert torch.equal(out, _out(Edit("blocks.1", "output", "assign", lambda live: taken)))


@pytest.mark.filterwarnings("ignore:.*nothing uses the result")
@pytest.mark.parametrize(
    "value, message",
    [
        (lambda x: x, "is a tuple of 2, and what is written is one tensor"),
        (lambda x: (x, None, None), "is a tuple of 2, and what is written is a tuple of 3"),
        (lambda x: (x[:, :2], None), "the shapes cannot be broadcast"),
        (lambda x: (x.double(), None), r"write value\.to\(torch\.float32\)"),
        (lambda x: (x, x), "fixed when the model was captured"),
    ],
)
def test_the_structure_of_a_skip_is_checked(value: Callable[[Any], Any], message: str) -> None:
    with _model().trace(_x()):
        with pytest.raises(fxsight.WriteError, match=message):
            _model().blocks[0].skip(value(_model().blocks[0].input))
        inner = _model().blocks[0].inner.output.save()
        out = _model().output.save()
    assert torch.equal(inner, _out(Read("blocks.0.inner", "output"))) and torch.equal(out, _out())


def test_inner_modules_of_a_skipped_one() -> None:
    message = r"blocks\.0\.inner does not run: blocks\.0 around it is skipped \(.*test_branches\.py:\d+\)"
    with _model().trace(_x()):
        _model().blocks[0].skip((_model().blocks[0].input * 2, None))
        for use in (
            lambda: _model().blocks[0].inner.output,
            lambda: _model().blocks[0].inner.input,
            lambda: setattr(_model().blocks[0].inner, "output", torch.zeros(3, 6)),
        ):
            with pytest.raises(fxsight.NotExecuted, match=message):
                use()
        with pytest.raises(fxsight.NotExecuted, match=r"inner\.up does not run: blocks\.0 around it"):
            _model().blocks[0].inner.up.output.save()
        with pytest.raises(fxsight.NotExecuted, match="does not run"):
            _model().blocks[0].source.operator_add_0.output.save()
        kept = _model().blocks[0].output[0].save()
        _model().blocks[0].output[0][:, 0] = 1
        out = _model().blocks[1].input.save()
    expected = _x() * 2
    assert torch.equal(kept, expected) and torch.equal(out[:, 1:], expected[:, 1:]) and (out[:, 0] == 1).all()


def test_inner_modules_used_before_the_skip() -> None:
    message = r"blocks\.0 cannot be skipped: blocks\.0\.inner\.up:output inside it is used in this trace"
    with _model().trace(_x()):
        _model().blocks[0].inner.up.output[:, 0] = 0
        with pytest.raises(fxsight.TraceError, match=message):
            _model().blocks[0].skip((_model().blocks[0].input, None))
        out = _model().output.save()
    assert torch.equal(out, _out(Edit("blocks.0.inner.up", "output", "inplace", lambda live: live[:, 0].zero_())))


def test_a_skip_of_one_call() -> None:
    with _model().trace(_x()) as tracer:
        cell = _model().cell.call(1)
        cell.skip(cell.input)
        found = [_model().cell.call(n).output.save() for n in range(3)]
        out = _model().output.save()
    first = _out(Read("cell", "output"))
    assert torch.equal(found[0], first) and torch.equal(found[1], torch.tanh(first)) and _linears(tracer) == 7
    assert torch.equal(out, _net().last(torch.tanh(_net().cell(torch.tanh(torch.tanh(first))))))


def test_a_skip_with_a_later_value_is_not_causal() -> None:
    with pytest.raises(fxsight.CausalityError, match="downstream"), _model().trace(_x()):
        _model().blocks[0].skip((_model().blocks[1].output[0], None))


def test_a_skip_outside_a_trace() -> None:
    with pytest.raises(fxsight.TraceError, match="only inside a trace"):
        _model().blocks[0].skip(torch.zeros(3, 6))
