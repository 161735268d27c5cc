"""Traces of a session that change tensors of the user's in place: in order, with what plain PyTorch says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.lent import share_memory
from tests.executed import Count


class Net(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


class Adds(nn.Module):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1) * 2


@cache
def _net() -> Net:
    return Net().requires_grad_(False)


@cache
def _model() -> Any:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()):
        model.output.save()
    return model


def _x(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def _first(seed: int = 0) -> Tensor:
    found: Tensor = _net().first(_x(seed))
    return found


def _out(seed: int = 0) -> Tensor:
    found: Tensor = _net()(_x(seed))
    return found


# -- in order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
def test_three_traces_and_reads_in_between(share: bool) -> None:
    model = _model()
    total, right = torch.zeros(2, 4), torch.zeros(2, 4)
    seen, expected = [], []
    with model.session(share=share):
        for seed in range(3):
            with model.trace(_x(seed)):
                total += model.first.output
                total *= model.output
                model.output.save()
            seen.append((total.clone(), total.sum().item()))
    for seed in range(3):
        right += _first(seed)
        right *= _out(seed)
        expected.append((right.clone(), right.sum().item()))
    assert torch.equal(total, right)
    assert all(torch.equal(a, b) and m == n for (a, m), (b, n) in zip(seen, expected, strict=True))


def test_traces_before_and_after_that_only_read_it() -> None:
    model = _model()
    total, right = torch.ones(2, 4), torch.ones(2, 4)
    with model.session() as session:
        with model.trace(_x()):
            before = (model.first.output + total).save()
            hidden = model.output
        with model.trace(_x(1)):
            total += hidden * model.first.output
        with model.trace(_x()):
            model.first.output[:] += total
            after = model.output.save()
            same = fxsight.save(hidden + total)  # both are plain tensors by now
        with model.trace(total):
            of_it = model.output.save()
        with model.trace(_x()):
            total.mul_(model.output)
    assert torch.equal(before, _first() + right)
    right += _out() * _first(1)
    assert torch.equal(after, _net().second((_first() + right).tanh())) and torch.equal(same, _out() + right)
    assert torch.equal(of_it, _net()(right))
    right.mul_(_out())
    assert torch.equal(total, right) and "5 traces have run" in session.explain()


def test_plain_code_changes_it_between_the_traces() -> None:
    model = _model()
    total, right = torch.zeros(2, 4), torch.zeros(2, 4)
    with model.session():
        with model.trace(_x()):
            total += model.first.output
        total.div_(3)
        with model.trace(_x()):
            total += model.output
        total += 1
    right.add_(_first()).div_(3).add_(_out()).add_(1)
    assert torch.equal(total, right)


def test_several_tensors() -> None:
    model = _model()
    sums, squares = torch.zeros(4), torch.zeros(4)
    right = [torch.zeros(4), torch.zeros(4)]
    with model.session():
        for seed in range(3):
            with model.trace(_x(seed)):
                sums += model.output.sum(0)
                squares.add_((model.output**2).sum(0), alpha=0.5)
                squares[0] = model.output[0, 0]
    for seed in range(3):
        right[0] += _out(seed).sum(0)
        right[1].add_((_out(seed) ** 2).sum(0), alpha=0.5)
        right[1][0] = _out(seed)[0, 0]
    assert torch.equal(sums, right[0]) and torch.equal(squares, right[1])


def test_views_of_one_memory() -> None:
    model = _model()

    def run(block: Callable[[int, Callable[[Tensor, Tensor], None]], None]) -> tuple[Tensor, Tensor]:
        total = torch.zeros(3, 2, 4)
        row, column = total[1], total.transpose(0, 2)[0]
        block(0, lambda a, b: (total.add_(a), None)[1])
        block(1, lambda a, b: (row.mul_(b), None)[1])
        kept = row.clone()
        block(2, lambda a, b: (column.add_(a[0, 0] + total[0, 0, 0]), None)[1])
        block(0, lambda a, b: (row.add_(a + column[0, 0]), None)[1])
        return total, kept

    def plain(seed: int, change: Callable[[Tensor, Tensor], None]) -> None:
        change(_first(seed), _out(seed))

    def traced(seed: int, change: Callable[[Tensor, Tensor], None]) -> None:
        with model.trace(_x(seed)):
            change(model.first.output, model.output)

    with model.session():
        total, seen = run(traced)
    right, kept = run(plain)
    assert torch.equal(total, right) and torch.equal(seen, kept)


def test_invokes() -> None:
    model = _model()
    totals = torch.zeros(2, 4)
    rows = list(totals)
    with model.session():
        for _ in range(2):
            with model.trace() as tracer:
                for seed, row in enumerate(rows):
                    with tracer.invoke(_x(seed)):
                        row += model.first.output.sum(0)
    both = _net().first(torch.cat([_x(0), _x(1)]))
    right = torch.zeros(2, 4)
    for _ in range(2):
        right[0] += both[:2].sum(0)
        right[1] += both[2:].sum(0)
    assert torch.equal(totals, right)


def test_a_tensor_that_is_the_input() -> None:
    model = _model()
    x, right = _x(), _x()
    with model.session():
        for _ in range(3):
            with model.trace(x):
                x += model.first.output
    for _ in range(3):
        right += _net().first(right)
    assert torch.equal(x, right)


def test_a_model_that_changes_its_input() -> None:
    model = fxsight.Model(Adds(), cache=False)
    x = _x()
    with model.session():
        with model.trace(x):
            first = model.output.save()
        seen = x.clone()
        with model.trace(x):
            second = model.output.save()
    assert torch.equal(seen, _x() + 1) and torch.equal(x, _x() + 1 + 1)
    assert torch.equal(first, seen * 2) and torch.equal(second, x * 2)


def test_what_changes_nothing_still_waits() -> None:
    model, counts = _model(), []
    total = torch.zeros(2, 4)
    with Count() as count, model.session():
        with model.trace(_x()):
            hidden = model.output
        with model.trace(_x()):
            hidden += total + model.first.output  # a value of the session, not a tensor of the user's
        counts.append(count.linears)
        with model.trace(_x()):
            total += hidden
        counts.append(count.linears)
    assert counts[0] == 0 and counts[1] > 0
    right = _out()
    right += torch.zeros(2, 4) + _first()
    assert torch.equal(total, right)


def test_in_a_block_that_is_written_once() -> None:
    model = _model()
    total, right = torch.zeros(2, 4), torch.zeros(2, 4)
    inputs = [_x(0), _x(1)]
    with model.session() as session:
        found = fxsight.list().save()
        with session.iter(inputs) as item:
            with model.trace(item):
                total += model.first.output
            with model.trace(_x()):
                total *= model.output
                found.append(total + model.first.output)
        with session.cond(True), model.trace(total):
            total -= model.output
    expected = []
    for x in inputs:
        right += _net().first(x)
        right *= _out()
        expected.append(right + _first())
    right -= _net()(right)
    assert torch.equal(total, right)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- what is refused -------------------------------------------------------------------------------------------------


def test_the_user_s_own_changes_are_still_errors() -> None:
    model = _model()
    used = torch.zeros(4)
    with pytest.raises(fxsight.InputError, match=r"a tensor \[4\] used in this body was changed"), model.session():
        with model.trace(_x()):
            (model.output + used).save()
        used += 1
        with model.trace(_x()):
            used += model.output.sum(0)
    with (
        pytest.raises(fxsight.InputError, match=r"a tensor \[4\] used in this body was changed"),
        model.session() as session,
        session.iter([0, 1]),
    ):
        with model.trace(_x()):
            used += model.output.sum(0)
        used += 1
        with model.trace(_x()):
            used += model.output.sum(0)
    rows = torch.zeros(2, 4)
    message = r"for `t\[i\] \+= value` write t\[i\]\.add_\(value\)"
    with pytest.raises(fxsight.InputError, match=message), model.session(), model.trace(_x()):
        rows[0] += model.output[0]
    with model.session(), model.trace(_x()):
        rows[0].add_(model.output[0])
    assert torch.equal(rows[0], _out()[0])


@pytest.mark.parametrize("written", [False, True])
def test_an_input_that_the_user_changes(written: bool) -> None:
    model, x = _model(), _x()
    message = r"a tensor \[2, 4\] that is an input of this trace was changed in place before the session ran it; use a"
    with pytest.raises(fxsight.InputError, match=message), model.session() as session:
        if written:
            with session.cond(True):
                with model.trace(x):
                    model.output.save()
                x.zero_()
        else:
            with model.trace(x):
                model.output.save()
            x.zero_()


def test_a_failure_caught_in_the_session() -> None:
    """What could not run has no value; what comes later runs."""
    model, used, total = _model(), torch.zeros(4), torch.zeros(2, 4)
    with model.session():
        with model.trace(_x()):
            lost = model.output + used
        used += 1
        with pytest.raises(fxsight.InputError), model.trace(_x()):
            total += model.output
        with pytest.raises(fxsight.NotSavedError):
            print(lost + 1)
        assert not total.any()
        with model.trace(_x()):
            total += model.output
    assert torch.equal(total, _out())


def test_a_part_of_a_tensor_that_the_trace_has_changed() -> None:
    model = _model()

    def change(total: Tensor, first: Tensor, out: Tensor) -> Tensor:
        total += first
        row, column = total[0], total.t()[1]
        row += out[0]
        column.mul_(out[:, 0] + column)
        found = out + row
        total[1].add_(out[1])
        total *= out
        row.sub_(first[1])
        return found - column[0]

    total, right = torch.zeros(2, 4), torch.zeros(2, 4)
    with model.session(), model.trace(_x()):
        found = change(total, model.first.output, model.output)
        found = (found * model.output).save()
    assert torch.equal(found, change(right, _first(), _out()) * _out())
    assert torch.equal(total, right)


def test_a_tensor_of_which_a_part_has_been_changed() -> None:
    model, total = _model(), torch.zeros(2, 4)
    message = r"a tensor \[2, 4\] of yours shares memory with another that this block has changed in place; use"
    with pytest.raises(fxsight.TraceError, match=message), model.trace(_x()):
        total[0].add_(model.first.output[0])
        (model.output + total).save()
    assert not total.any()
    with model.trace(_x()):
        found = (model.output + total[0]).save()  # read before the change
        total += model.first.output
    assert torch.equal(found, _out()) and torch.equal(total, _first())


def test_a_weight_is_not_changed() -> None:
    model, weight = _model(), _net().first.weight
    before = weight.clone()
    message = r"first\.weight is a parameter or buffer of the model"
    with pytest.raises(fxsight.TraceError, match=message), model.trace(_x()):
        weight += model.output.sum()
    assert torch.equal(weight, before)


def test_which_tensors_share_memory() -> None:
    base = torch.zeros(4, 6)
    assert share_memory(base, base) and share_memory(base, base.t()) and share_memory(base[1], base[:, 2])
    assert share_memory(base[0].expand(3, 6), base[:, 5]) and share_memory(base.view(torch.int32)[2], base[2])
    assert share_memory(base.view(torch.int16), base[2]) and share_memory(base.detach(), base)
    assert not share_memory(base[:, 0], base[:, 1]) and not share_memory(base[:2], base[2:])
    assert not share_memory(base, torch.zeros(4, 6)) and not share_memory(base, torch.zeros(0))
    sparse = base.to_sparse()
    assert share_memory(sparse, sparse) and not share_memory(sparse, base)


def test_tensors_of_which_nobody_counts_the_changes() -> None:
    model = _model()
    with torch.inference_mode():
        given, x = torch.ones(2, 4), _x()
    with model.session(), model.trace(x):
        out = (model.output + given).save()
    assert torch.equal(out, _out() + 1)
