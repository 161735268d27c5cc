"""Rows stay rows: through reshapes, and when they are taken and put back."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxsight.along import Along, join, put, reshaped, take
from fxsight.rowset import RowSet, changed_rows, reach

ROWS = 4
SHAPES = [
    (2, ROWS, 6),
    (2 * ROWS, 6),
    (2, ROWS, 2, 3),
    (ROWS * 2, 2, 3),
    (2, ROWS * 6),
    (2, 1, ROWS, 6),
    (1, 2, ROWS, 1, 6),
    (48,),
    (2, 2, 2, 6),
    (3, 16),
]


@pytest.mark.parametrize(("old", "new"), list(itertools.product(SHAPES, SHAPES)))
def test_reshape_and_take_in_either_order(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    whole, rows = torch.arange(48.0).reshape(2, ROWS, 6), torch.tensor([3, 0, 0])
    start = reshaped(Along(1), whole.shape, old, ROWS)
    if start is None:
        return
    value = whole.reshape(old)
    found = reshaped(start, old, new, ROWS)
    if found is None:  # only where the rows are torn apart
        assert new in ((2, 2, 2, 6), (3, 16))
        return
    taken = whole.index_select(1, rows)
    assert torch.equal(take(value.reshape(new), found, rows).flatten(), taken.flatten())
    changed = put(value.reshape(new), found, rows[:2], take(value.reshape(new), found, rows[:2]) + 1)
    assert torch.equal(changed.flatten(), (whole.index_add(1, rows[:2], torch.ones(2, 2, 6))).flatten())
    both = join([value.reshape(new), value.reshape(new)], found)
    assert torch.equal(both.flatten(), torch.cat([whole, whole], 1).flatten())


def test_a_view_that_tears_rows_apart() -> None:
    assert reshaped(Along(1), (2, ROWS, 6), (3, 16), ROWS) is None
    assert reshaped(Along(1), (2, ROWS, 6), (2 * ROWS, 6), ROWS) == Along(0, outer=2)
    assert reshaped(Along(1), (2, ROWS, 6), (2, ROWS * 6), ROWS) == Along(1, inner=6)


def test_rows_within_others() -> None:
    full = RowSet([torch.tensor([1, 2, 3]), torch.tensor([0, 3])])
    last = RowSet([torch.tensor([3]), torch.tensor([3])])
    assert full.rows.tolist() == [1, 2, 3, 0, 3] and full.cells.tolist() == [0, 0, 0, 1, 1]
    assert last.within(full).tolist() == [2, 4]
    assert last.alike and not full.alike


def test_what_an_edit_can_reach() -> None:
    window = torch.ones(5, 5, dtype=torch.bool).tril() & ~torch.ones(5, 5, dtype=torch.bool).tril(-2)
    assert reach([window], 5)[:, 2].tolist() == [False, False, True, True, True]  # through two layers, and more
    assert reach([], 5)[:, 2].tolist() == [False, False, True, False, False]
    assert reach([torch.ones(5, 5, dtype=torch.bool)], 5).all()


def test_changed_rows() -> None:
    clean = torch.zeros(2, 3, 4)
    value = clean.clone()
    value[1, 2, 0] = 1
    assert changed_rows(value, clean, 1).tolist() == [False, False, True]
    assert changed_rows(torch.tensor([float("nan"), 0.0]), torch.tensor([float("nan"), 0.0]), 0).tolist() == [
        True,
        False,
    ]
