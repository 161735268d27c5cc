"""Memoised recording: a body that goes a known way gives what it gave when it was recorded, and nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import fxsight
from fxsight import Model
from fxsight.record import Recorder


class Net(nn.Module):
    """Three linear layers, one with a tuple output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), Pair(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``(batch, 4)``; returns ``(batch, 3)``."""
        out: torch.Tensor = self.third(self.second(self.first(x))[0])
        return out


@dataclass
class Both:
    """What ``Structured`` returns."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, torch.Tensor]


class Structured(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> Both:
        """Of ``(batch, 4)``."""
        hidden = self.first(x)
        return Both(hidden * 2, (hidden, hidden + 1))


class Pair(nn.Module):
    """Returns two tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The input twice as large, and its sum."""
        return x * 2, x.sum()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def third(net: Net, hidden: torch.Tensor) -> torch.Tensor:
    """The last layer of it."""
    out: torch.Tensor = net.third(hidden)
    return out


def whole(net: Net, x: torch.Tensor) -> torch.Tensor:
    """The plain forward."""
    out: torch.Tensor = net(x)
    return out


@contextmanager
def recorded() -> Iterator[list[int]]:
    """Counts the recorders that are made inside."""
    made = [0]
    original = Recorder.__init__

    def init(self: Recorder, *args: Any, **kwargs: Any) -> None:
        made[0] += 1
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "__init__", init)
        yield made


def test_the_second_time_nothing_is_written_down(net: Net) -> None:
    model = Model(net, cache=False)

    def body(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with model.trace(x):
            hidden = model.first.output
            hidden[:, 0] = 0
            model.third.input = model.third.input + shift
            out = model.output.save()
            both = (hidden * 2).save()
        return out, both

    def by_hand(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = net.first(x)
        hidden[:, 0] = 0
        return third(net, hidden * 2 + shift), hidden * 2

    with recorded() as made:
        for seed in range(4):
            torch.manual_seed(seed)
            x, shift = torch.randn(2, 4), torch.randn(6)
            assert all(map(torch.equal, body(x, shift), by_hand(x, shift)))
    assert made == [1]


def test_another_size_another_number_another_dtype_is_another_way(net: Net) -> None:
    model = Model(net, cache=False)

    def body(x: torch.Tensor, column: int, factor: Any) -> torch.Tensor:
        with model.trace(x):
            model.first.output[:, column] *= factor
            out: torch.Tensor = model.output.save()
        return out

    def by_hand(x: torch.Tensor, column: int, factor: Any) -> torch.Tensor:
        hidden = net.first(x)
        hidden[:, column] *= factor
        return third(net, hidden * 2)

    for x in (torch.randn(2, 4), torch.randn(5, 4)):
        for column in (0, 3, -1):
            for factor in (2, 2.0, True, -0.0, 0.0, torch.tensor(2.0)):
                for _ in range(2):
                    found, wanted = body(x, column, factor), by_hand(x, column, factor)
                    assert torch.equal(found, wanted)
                    assert torch.equal(torch.signbit(found), torch.signbit(wanted))
    with pytest.raises(IndexError):
        body(torch.randn(2, 4), 6, 1)


def test_a_wrong_statement_on_a_known_way_is_still_an_error_at_its_line(net: Net) -> None:
    model = Model(net, cache=False)
    x = torch.randn(2, 4)

    def body(column: int) -> None:
        with model.trace(x):
            model.first.output[:, column] = 0
            model.output.save()

    body(1)
    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        body(9)
    body(1)


def test_weights_of_the_model_and_tensors_of_the_user_are_told_apart(net: Net) -> None:
    model = Model(net, cache=False)
    x = torch.randn(2, 4)

    def body(weight: torch.Tensor) -> torch.Tensor:
        with model.trace(x):
            out: torch.Tensor = (model.first.output @ weight.T).save()
        return out

    own = torch.randn(3, 6)
    for _ in range(3):
        assert torch.equal(body(net.third.weight), net.first(x) @ net.third.weight.T)
        assert torch.equal(body(own), net.first(x) @ own.T)
    net.third.weight.data = torch.randn(3, 6)
    assert torch.equal(body(net.third.weight), net.first(x) @ net.third.weight.T)


def test_members_of_tuples(net: Net) -> None:
    model = Model(net, cache=False)
    x = torch.randn(2, 4)
    for number in range(3):
        with model.trace(x):
            value, total = model.second.output
            out = (value + total).save()
        assert torch.equal(out, net.first(x) * 2 + net.first(x).sum()), number
    for number in range(3):
        with model.trace(x):
            model.second.output[0] = torch.ones(2, 6)
            out = model.output.save()
        assert torch.equal(out, third(net, torch.ones(2, 6))), number


def test_a_number_on_demand_leaves_the_way(net: Net) -> None:
    model = Model(net, cache=False)

    def body(x: torch.Tensor) -> torch.Tensor:
        with model.trace(x):
            hidden = model.first.output
            if hidden.sum() > 0:
                hidden[:] = 0
            out: torch.Tensor = model.output.save()
        return out

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        hidden = net.first(x)
        if hidden.sum() > 0:
            hidden[:] = 0
        return third(net, hidden * 2)

    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(2, 4)
        assert torch.equal(body(x), by_hand(x)), seed


def test_branches_stops_and_skips_are_not_remembered(net: Net) -> None:
    model = Model(net, cache=False)
    x = torch.randn(2, 4)

    def body(condition: bool) -> torch.Tensor:
        with model.trace(x) as tracer:
            hidden = model.first.output
            with tracer.cond(condition):
                hidden[:] = 0
            out: torch.Tensor = model.output.save()
        return out

    zero = third(net, torch.zeros(2, 6))
    for condition in (True, False, False, True, True):
        assert torch.equal(body(condition), zero if condition else whole(net, x))


def test_what_was_changed_after_its_use_is_refused_each_time(net: Net) -> None:
    model = Model(net, cache=False)
    x = torch.randn(2, 4)

    def body(late: bool) -> None:
        shift = torch.ones(6)
        with model.trace(x):
            model.first.output = model.first.output + shift
            model.output.save()
            if late:
                shift.add_(1)

    for late in (False, False, True, False, True):
        if late:
            with pytest.raises(fxsight.InputError, match="was changed in place afterwards"):
                body(late)
        else:
            body(late)


def test_a_tensor_changed_by_the_body_is_changed_each_time(net: Net) -> None:
    model = Model(net, cache=False)
    x = torch.randn(2, 4)
    for number in range(3):
        store = torch.zeros(2, 6)
        with model.trace(x):
            store[:] = model.first.output
        assert torch.equal(store, net.first(x)), number


def test_lost_edits_warn_each_time(net: Net) -> None:
    model = Model(net, cache=False)
    for _ in range(3):
        with pytest.warns(fxsight.FxsightWarning, match="nothing reads"), model.trace(torch.ones(2, 4)):
            model.first.output.clone()[:] = 0


def test_unsaved_values_say_so_each_time(net: Net) -> None:
    model = Model(net, cache=False)
    for _ in range(3):
        with model.trace(torch.ones(2, 4)):
            hidden = model.first.output
            model.output.save()
        with pytest.raises(fxsight.NotSavedError, match=r"first:output \(float32\[2, 6\]\), made at .*test_walk.py"):
            print(hidden + 1)


def test_what_the_forward_may_branch_on_is_watched(net: Net) -> None:
    net.drop = nn.Dropout(0.5)
    model = Model(net, cache=False)
    x = torch.randn(2, 4)

    def body() -> torch.Tensor:
        with model.trace(x):
            out: torch.Tensor = model.output.save()
        return out

    for _ in range(2):
        assert torch.equal(body(), whole(net, x))
    net.third = nn.Linear(6, 5).requires_grad_(False)
    for _ in range(2):
        assert torch.equal(body(), whole(net, x))
    net.double()
    x = x.double()
    for _ in range(2):
        assert torch.equal(body(), whole(net, x))
    net.train()
    assert torch.equal(body(), whole(net, x))
    net.third.weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.float64), requires_grad=False)
    assert torch.equal(body(), whole(net, x))


def test_the_backend_is_part_of_the_way(net: Net) -> None:
    model = Model(net, cache=False)
    tiers: list[str] = []
    for backend in ("eager", "eager", "auto"):
        with model.trace(torch.ones(2, 4), backend=backend) as tracer:
            model.output.save()
        tiers.append(tracer.tier)
    assert tiers == ["eager"] * 3
    assert tracer.program(torch.zeros(3, 4))[0].shape == (3, 3)


def test_nothing_but_the_saved_value_is_kept(net: Net) -> None:
    model = Model(net, cache=False)
    for _ in range(3):
        x = torch.randn(2, 4)
        seen = weakref.ref(x)
        with model.trace(x):
            hidden = model.first.output
            out = model.output.save()
        del x
        gc.collect()
        assert seen() is None
        assert type(out) is torch.Tensor
        del hidden


def test_an_exception_leaves_a_usable_way(net: Net) -> None:
    model = Model(net, cache=False)
    x = torch.randn(2, 4)

    def body(fails: bool) -> torch.Tensor:
        with model.trace(x):
            model.first.output[:] = 1
            if fails:
                raise KeyError("mine")
            out: torch.Tensor = model.output.save()
        return out

    for fails in (False, True, False, True, False):
        if fails:
            with pytest.raises(KeyError, match="mine"):
                body(fails)
        else:
            assert torch.equal(body(fails), third(net, torch.full((2, 6), 2.0)))


def test_structures_of_the_model_are_remembered() -> None:
    torch.manual_seed(0)
    net = Structured().eval().requires_grad_(False)
    model = Model(net, cache=False)
    with recorded() as made:
        for seed in range(4):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
            with model.trace(x):
                model.first.output[:, 0] = 0
                out = model.output
                last = out.logits[:, -1].save()
                whole_output = out.save()
                doubled = (out.hidden[1] * 2).save()
            hidden = net.first(x)
            hidden[:, 0] = 0
            assert torch.equal(last, hidden[:, -1] * 2)
            assert torch.equal(whole_output.logits, hidden * 2)
            assert all(map(torch.equal, whole_output.hidden, (hidden, hidden + 1)))
            assert torch.equal(doubled, (hidden + 1) * 2)
            assert not hasattr(whole_output, "save")
    assert made == [1]


def test_a_member_of_a_structure_is_assigned_in_vain_each_time() -> None:
    net = Structured().eval().requires_grad_(False)
    model, x = Model(net, cache=False), torch.randn(2, 4)

    def body(assigns: bool) -> torch.Tensor:
        with model.trace(x):
            out = model.output
            if assigns:
                out.logits = torch.zeros(2, 6)
            hidden: torch.Tensor = (model.first.output + 1).save()
        return hidden

    for assigns in (False, False, True, False, True, True, False):
        if assigns:
            with pytest.raises(fxsight.WriteError, match="which the model does not see"):
                body(assigns)
        else:
            assert torch.equal(body(assigns), net.first(x) + 1)


def test_a_structure_read_before_the_way_is_left() -> None:
    net = Structured().eval().requires_grad_(False)
    model = Model(net, cache=False)

    def body(x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        with model.trace(x):
            out = model.output
            shifted = (out.logits + number).save()
            if out.hidden[0].sum() > 0:
                shifted = (shifted * 2).save()
            kept = out.save()
        return shifted, kept.logits

    for number in (1, 1, 2, 1):
        for seed in range(3):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
            plain = net(x)
            wanted = plain.logits + number
            found, logits = body(x, number)
            assert torch.equal(found, wanted * 2 if plain.hidden[0].sum() > 0 else wanted)
            assert torch.equal(logits, plain.logits)
