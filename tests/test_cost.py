"""What a program costs, counted by hand."""

from __future__ import annotations

from fxsight.cost import Cost, cost_of, peak_bytes
from fxsight.testing import program_of

SIZES = {"batch": 2, "length": 5}
PROGRAM = """
    x: 'input 0'                              # f32[batch, length, 8]
    w: 'weight w'                             # f32[16, 8]
    up = aten.linear.default(x, w)            # f32[batch, length, 16]
    relu = aten.relu.default(up)              # f32[batch, length, 16]
    half = aten.slice.Tensor(relu, 2, 0, 8)   # f32[batch, length, 8]  {stride='16*length, 16, 1', shares='relu'}
    out = aten.add.Tensor(x, half)            # f32[batch, length, 8]
    return (out,)
"""


def test_products_are_counted_exactly_and_the_rest_by_numbers_made() -> None:
    rows = 2 * 5
    expected = Cost(2 * rows * 8 * 16 + rows * 16 + rows * 8 + rows * 8, 4)
    assert cost_of(program_of(PROGRAM).graph.nodes, SIZES) == expected
    assert expected * 3 == expected + expected + expected


def test_attention() -> None:
    program = program_of(
        """
        q: 'input 0'                                                           # f32[batch, 4, length, 8]
        k: 'input 1'                                                           # f32[batch, 4, length, 8]
        out = aten.scaled_dot_product_attention.default(q, k, k)               # f32[batch, 4, length, 8]
        return (out,)
        """
    )
    assert cost_of(program.graph.nodes, SIZES).flops == 2 * (2 * 2 * 4 * 5 * 5 * 8)


def test_memory_is_freed_after_its_last_use() -> None:
    number = 2 * 5 * 4
    assert peak_bytes(program_of(PROGRAM).graph, SIZES) == number * (16 + 16)
