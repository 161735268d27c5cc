"""In-place calls of a body as plain in-place nodes."""

from __future__ import annotations

import pytest
import torch

from fxsight.passes import ExpandMutations
from fxsight.testing import check_pass, listing, program_of, random_program


def test_an_in_place_call_is_a_copy_and_the_call() -> None:
    program = program_of(
        """
        x: 'input 0'                                                    # f32[batch, 8]
        m = mutate(x, (), 'torch.Tensor.mul_', ('%self', 2), {})        # f32[batch, 8]
        neg = aten.neg.default(m)                                       # f32[batch, 8]
        return (neg, x)
        """
    )
    result = check_pass(ExpandMutations(), program, equals=lambda _, x: (-2 * x, x))
    assert listing(result).splitlines() == [
        "m = aten.clone.default(x)",
        "user_mul = torch.Tensor.mul_(m, 2)",
        "neg = aten.neg.default(m)",
        "return (neg, x,)",
    ]


def test_a_change_of_a_view_is_a_copy_its_views_and_the_call() -> None:
    views = (
        "('torch.Tensor.transpose', ('%self', 0, 1), {}, ()), "
        "('torch.Tensor.split', ('%self', 4), {'dim': 0}, (1,)), "
        "('torch.Tensor.__getitem__', ('%self', (0, slice(None, None, None))), {}, ())"
    )
    program = program_of(
        f"""
        x: 'input 0'                                                                 # f32[batch, 8]
        y: 'input 1'                                                                 # f32[batch]
        m = mutate(x, ({views}), 'torch.Tensor.add_', ('%self', y), {{'alpha': 3}})  # f32[batch, 8]
        return (m,)
        """
    )

    def equals(_: object, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x[:, 4].add_(y, alpha=3)
        return x

    assert listing(check_pass(ExpandMutations(), program, equals=equals)).splitlines() == [
        "m = aten.clone.default(x)",
        "user_transpose = torch.Tensor.transpose(m, 0, 1)",
        "user_split = torch.Tensor.split(user_transpose, 4, dim=0)",
        "user_getitem = operator.getitem(user_split, 1)",
        "user_getitem_1 = torch.Tensor.__getitem__(user_getitem, (0, slice(None, None, None)))",
        "user_add = torch.Tensor.add_(user_getitem_1, y, alpha=3)",
        "return (m,)",
    ]


def test_the_value_itself_among_the_arguments() -> None:
    program = program_of(
        """
        x: 'input 0'                                                            # f32[8]
        m = mutate(x, (), 'torch.Tensor.mul_', ('%self', '%self'), {})          # f32[8]
        n = mutate(m, (), 'torch.Tensor.copy_', ('%self', x), {})               # f32[8]
        return (m, n)
        """
    )
    check_pass(ExpandMutations(), program, equals=lambda _, x: (x * x, x))


def test_each_change_stays_where_it_is() -> None:
    """What is read between two changes sees the first only."""
    program = program_of(
        """
        x: 'input 0'                                                            # f32[8]
        m = mutate(x, (), 'torch.Tensor.add_', ('%self', 1), {})                # f32[8]
        between = aten.neg.default(m)                                           # f32[8]
        n = mutate(m, (), 'torch.Tensor.zero_', ('%self',), {})                 # f32[8]
        after = aten.neg.default(n)                                             # f32[8]
        return (between, after, m)
        """
    )
    check_pass(ExpandMutations(), program, equals=lambda _, x: (-(x + 1), -torch.zeros_like(x), x + 1))


@pytest.mark.parametrize("seed", range(10))
def test_a_program_without_is_the_same(seed: int) -> None:
    program = random_program(seed)
    assert ExpandMutations()(program) is program
    check_pass(ExpandMutations(), program, neutral=ExpandMutations())
