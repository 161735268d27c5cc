"""One tensor under two names at one place: what is changed in place under one is changed under the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.errors import TraceError
from tests.zoo import seeded

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Twice(nn.Module):
    """Returns a tensor, its first columns, the tensor again, and two parts of another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.linear(x)
        left, right = self.linear(x + 1).chunk(2, -1)
        return h, h[:, :2], h, left, right


class Attends(nn.Module):
    """Takes one tensor three times."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.attends = Twice(), Attends()

    def forward(self, x: Tensor) -> Tensor:
        h, part, again, left, right = self.twice(x)
        return self.attends(h, h, h) + part.sum() * 10 + again.sum() * 100 + (left - right).sum()  # type: ignore[no-any-return]


Body = Callable[[Any], dict[str, Any]]


def net() -> nn.Module:
    return seeded(Net).eval().requires_grad_(False)


def traced(body: Body) -> tuple[dict[str, Tensor], Tensor]:
    model = fxsight.Model(net(), cache=False)
    with model.trace(X):
        saved = {name: value.save() for name, value in body(model).items()}
        out = model.output.save()
    return saved, out


def hooked(change: Callable[[Any], dict[str, Tensor]], *, at_input: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """change: of a module's outputs or inputs; what it gives is cloned at once."""
    module, kept = net(), dict[str, Tensor]()

    def keep(values: Any) -> None:
        kept.update({name: value.clone() for name, value in change(values).items()})

    if at_input:
        module.attends.register_forward_pre_hook(lambda _m, args: keep(args))  # type: ignore[union-attr]
    else:
        module.twice.register_forward_hook(lambda _m, _a, out: keep(out))  # type: ignore[union-attr]
    return kept, module(X)


def same(found: tuple[dict[str, Tensor], Tensor], expected: tuple[dict[str, Tensor], Tensor]) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name
    assert torch.equal(found[1], expected[1])


def test_a_read_after_a_change_under_the_other_name() -> None:
    def change(values: Any) -> dict[str, Any]:
        values[0][:, 0] *= 3
        return {"changed": values[0], "again": values[2]}

    def body(model: Any) -> dict[str, Any]:
        model.twice.output[0][:, 0] *= 3
        return {"changed": model.twice.output[0], "again": model.twice.output[2]}

    same(traced(body), hooked(change))


def test_changes_under_both_names_are_both_made() -> None:
    def change(values: Any) -> dict[str, Any]:
        values[0][:, 0] *= 3
        values[2][:, 1] += 5
        values[0][:, 0] -= 1
        return {"again": values[2], "first": values[0]}

    def body(model: Any) -> dict[str, Any]:
        model.twice.output[0][:, 0] *= 3
        model.twice.output[2][:, 1] += 5
        model.twice.output[0][:, 0] -= 1
        return {"again": model.twice.output[2], "first": model.twice.output[0]}

    same(traced(body), hooked(change))


def test_an_input_given_three_times() -> None:
    def change(values: Any) -> dict[str, Any]:
        values[0][:, 0] *= 3
        values[1][:, 1] += 5
        return {"value": values[2]}

    def body(model: Any) -> dict[str, Any]:
        model.attends.inputs[0][0][:, 0] *= 3
        model.attends.inputs[0][1][:, 1] += 5
        return {"value": model.attends.inputs[0][2]}

    same(traced(body), hooked(change, at_input=True))


def test_what_was_read_before_is_what_it_was() -> None:
    def change(values: Any) -> dict[str, Any]:
        before = values[2].clone()
        values[0][:, 0] *= 3
        return {"before": before}

    def body(model: Any) -> dict[str, Any]:
        before = model.twice.output[2]
        model.twice.output[0][:, 0] *= 3
        return {"before": before}

    same(traced(body), hooked(change))


def test_an_assignment_is_of_one_name() -> None:
    def change(values: Any) -> dict[str, Any]:
        values[0][:, 0] *= 3
        return {"again": values[2]}

    saved, _ = hooked(change)

    def body(model: Any) -> dict[str, Any]:
        model.twice.output[0][:, 0] *= 3
        model.twice.output[2] = model.twice.output[2] * 0
        return {"first": model.twice.output[0], "again": model.twice.output[2]}

    found, _ = traced(body)
    assert torch.equal(found["first"], saved["again"]) and not found["again"].any()


def test_parts_of_one_tensor_are_changed_apart() -> None:
    def change(values: Any) -> dict[str, Any]:
        values[3][:] *= 2
        values[4][:] *= 3
        return {"left": values[3], "right": values[4]}

    def body(model: Any) -> dict[str, Any]:
        model.twice.output[3][:] *= 2
        model.twice.output[4][:] *= 3
        return {"left": model.twice.output[3], "right": model.twice.output[4]}

    same(traced(body), hooked(change))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("twice:output[0]", "twice:output[1]"),
        ("twice:output[1]", "twice:output[0]"),
        ("twice:output[0]", "twice:output[2]"),
    ],
)
def test_two_changes_of_what_overlaps_are_refused_where_one_would_be_lost(first: str, second: str) -> None:
    def body(model: Any) -> dict[str, Any]:
        both = {name: model.twice.output[int(name[-2])] for name in (first, second)}
        both[first][:, 0] *= 3
        both[second][:, 1] += 5
        return both

    with pytest.raises(TraceError) as error:
        traced(body)
    text = str(error.value)
    assert f"{second} is in the memory of {first}, which has been changed in place (" in text
    assert text.endswith(f"change {second} before that, or change the same numbers in {first}")
    assert "test_one_memory.py" in text
