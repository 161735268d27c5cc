"""How far results are from the exact ones: the largest difference, and whether it may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxsight.tolerance import TOLERANCE, Difference, difference

ONES = torch.tensor([1.0, -2.0, 4.0])


def test_the_largest_difference_of_all_results() -> None:
    found = difference([ONES, ONES.double()], [ONES + torch.tensor([0.0, 1.0, 0.0]), ONES.double()])
    assert found == Difference(1.0, 0.25, False)
    assert str(found) == "1, 0.25 of the largest number"
    assert difference([ONES, 3, None], [ONES.clone(), 3, None]) == Difference()
    assert difference([], []) == Difference()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_difference_counts_beside_the_largest_number(dtype: torch.dtype) -> None:
    relative, absolute = TOLERANCE[dtype]
    exact = torch.tensor([0.0, 1000.0], dtype=torch.float64)
    for factor, is_within in ((0.5, True), (2.0, False)):
        off = exact + torch.tensor([factor * (relative * 1000 + absolute), 0.0], dtype=torch.float64)
        assert difference([exact.to(dtype)], [off.to(dtype)]).is_within is is_within


def test_half_complex_numbers_have_the_tolerance_of_their_parts() -> None:
    exact = torch.complex(ONES, ONES)
    assert difference([exact], [exact * (1 + 1e-6)]).is_within
    assert not difference([exact], [exact * (1 + 1e-3)]).is_within


@pytest.mark.parametrize(
    ("exact", "found"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -float("inf")])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("inf")])),
        (ONES, ONES.double()),
        (ONES, ONES[:2]),
    ],
)
def test_what_must_be_the_same(exact: Tensor, found: Tensor) -> None:
    assert not difference([exact], [found]).is_within
    assert difference([exact], [exact.clone()]) == Difference(0.0, 0.0, True)


def test_a_plain_value_must_be_the_same() -> None:
    assert not difference([3], [4]).is_within
