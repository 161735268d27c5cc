"""Reads of one row move before what works row by row, and give the same numbers."""

from __future__ import annotations

import pytest
import torch

from fxsight import bits
from fxsight.bits import narrow_exactly
from fxsight.passes import NarrowReads
from fxsight.passes.narrow_reads import Move, moves
from fxsight.testing import check_pass, listing, program_of, random_program, run

LAST = """
    x: 'input 0'                                                    # f32[batch, length, 8]
    w: 'weight w'                                                   # f32[16, 8]
    norm = aten.layer_norm.default(x, [8])                          # f32[batch, length, 8]
    half = aten.mul.Tensor(norm, 0.5)                               # f32[batch, length, 8]
    logits = aten.linear.default(half, w)                           # f32[batch, length, 16]
    last = torch.Tensor.__getitem__(logits, (slice(None, None, None), -1, 3))    # f32[batch]
    other = torch.Tensor.__getitem__(logits, (..., -1, slice(2, 5, None)))       # f32[batch, 3]
    return (last, other)
"""


def test_the_last_row_is_taken_first() -> None:
    result = check_pass(NarrowReads(), program_of(LAST), tolerance=1e-5, neutral=NarrowReads(but=("logits",)))
    assert listing(result).splitlines() == [
        "narrow_2 = aten.slice.Tensor(x, 1, -1, 9223372036854775807)",
        "norm = aten.layer_norm.default(narrow_2, [8])",
        "narrow_1 = aten.slice.Tensor(norm, 1, -1, 9223372036854775807)",
        "half = aten.mul.Tensor(narrow_1, 0.5)",
        "narrow = aten.slice.Tensor(half, 1, -1, 9223372036854775807)",
        "rows = aten.clone.default(narrow, memory_format=torch.contiguous_format)",
        "logits = aten.linear.default(rows, w)",
        "last = torch.Tensor.__getitem__(logits, (slice(None, None, None), -1, 3))",
        "other = torch.Tensor.__getitem__(logits, (slice(None, None, None), -1, slice(2, 5, None)))",
        "return (last, other,)",
    ]


def test_readers_see_the_strides_of_the_whole() -> None:
    program = program_of(LAST)
    result = check_pass(NarrowReads(layout=True), program, tolerance=1e-5)
    assert listing(result).splitlines()[6:] == [
        "logits = aten.linear.default(rows, w)",
        "spread = spread(logits, x, -2, -1, 9223372036854775807)",
        "last = torch.Tensor.__getitem__(spread, (slice(None, None, None), -1, 3))",
        "other = torch.Tensor.__getitem__(spread, (..., -1, slice(2, 5, None)))",
        "return (last, other,)",
    ]
    leaves = [torch.randn(3, 5, 8)]
    for found, expected in zip(run(result, leaves), run(program, leaves), strict=True):
        assert found.stride() == expected.stride()


def test_what_is_moved_is_told() -> None:
    program = program_of(LAST).graph
    assert moves(program, NarrowReads()) == [Move(name, 1, -1, 1) for name in ("logits", "half", "norm")]
    assert moves(program, NarrowReads(but=("half",))) == [Move("logits", 1, -1, 1)]


def test_more_rows_are_kept_where_asked() -> None:
    result = check_pass(NarrowReads(4), program_of(LAST), tolerance=1e-5)
    assert "narrow_2 = aten.slice.Tensor(x, 1, -4, 9223372036854775807)" in listing(result)
    assert "f32[batch, Min(4, length), 16]" in result.text


@pytest.mark.parametrize(
    ("index", "start", "end"), [("0", 0, 1), ("2", 2, 3), ("-2", -2, -1), ("slice(-2, None, None)", -2, 2**63 - 1)]
)
def test_rows_anywhere(index: str, start: int, end: int) -> None:
    program = program_of(
        f"""
        x: 'input 0'                                                                  # f32[batch, 5, 8]
        neg = aten.neg.default(x)                                                     # f32[batch, 5, 8]
        row = torch.Tensor.__getitem__(neg, (slice(None, None, None), {index}))       # f32[batch, 8]
        return (row,)
        """
    )
    result = check_pass(NarrowReads(), program)
    assert f"narrow = aten.slice.Tensor(x, 1, {start}, {end})" in listing(result)


@pytest.mark.parametrize(
    "other",
    [
        "torch.Tensor.__getitem__(logits, (slice(None, None, None), 0, 3))  # f32[batch]",
        "torch.Tensor.__getitem__(logits, (slice(None, None, None), None, -1, 3))  # f32[batch, 1]",
        "aten.neg.default(logits)  # f32[batch, length, 16]",
    ],
)
def test_rows_that_others_read_stay(other: str) -> None:
    rows = LAST.strip().splitlines()
    rows[-2] = f"other = {other}"
    program = program_of("\n".join(rows))
    assert NarrowReads()(program) is program


def test_both_sides_of_a_sum_and_what_broadcasts() -> None:
    program = program_of(
        """
        x: 'input 0'                                    # f32[batch, length, 8]
        y: 'input 1'                                    # f32[batch, length, 8]
        b: 'weight b'                                   # f32[8]
        total = aten.add.Tensor(x, y)                     # f32[batch, length, 8]
        out = aten.add.Tensor(total, b)                   # f32[batch, length, 8]
        row = aten.select.int(out, 1, 0)                # f32[batch, 8]
        return (row,)
        """
    )
    result = check_pass(NarrowReads(), program)
    assert [n for n in listing(result).splitlines() if "(x" in n or "(y" in n or ", b)" in n] == [
        "narrow_1 = aten.slice.Tensor(x, 1, 0, 1)",
        "narrow_2 = aten.slice.Tensor(y, 1, 0, 1)",
        "out = aten.add.Tensor(narrow, b)",
    ]


def test_memory_that_is_changed_is_left_alone() -> None:
    program = program_of(
        """
        x: 'input 0'                                    # f32[batch, length, 8]
        neg = aten.neg.default(x)                       # f32[batch, length, 8]
        size = aten.abs.default(neg)                     # f32[batch, length, 8]
        mul = aten.mul_.Tensor(neg, 2)                  # f32[batch, length, 8]  {shares='neg'}
        row = aten.select.int(size, 1, 0)                # f32[batch, 8]
        return (row, neg)
        """
    )
    assert NarrowReads()(program) is program


@pytest.mark.parametrize("seed", range(10))
def test_random_programs(seed: int) -> None:
    check_pass(NarrowReads(), random_program(seed), tolerance=1e-6)


def test_exactly_means_the_same_bits() -> None:
    program, tried = program_of(LAST), dict[object, bool]()
    w, x, sizes = torch.randn(16, 8), torch.randn(3, 40, 8), {"batch": 3, "length": 40}
    result = narrow_exactly(program, sizes, lambda name: w, tried)
    assert tried
    for found, expected in zip(run(result, [x]), run(program, [x]), strict=True):
        assert torch.equal(found, expected)


def test_where_bits_differ_rows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    program, sizes, w = program_of(LAST), {"batch": 3, "length": 40}, torch.randn(16, 8)
    same = {"logits": 4, "half": 1, "norm": 1}
    monkeypatch.setattr(bits, "same_bits", lambda node, move, *others: move.rows >= same[node.name])
    monkeypatch.setattr(bits, "same_columns", lambda *asked: False)
    assert narrow_exactly(program, sizes, lambda name: w, {}).history[-1] == "NarrowReads(rows=4)"
    same["logits"] = 100
    assert narrow_exactly(program, sizes, lambda name: w, {}) is program
    same["half"], same["logits"] = 100, 1
    assert "logits" in listing(narrow_exactly(program, sizes, lambda name: w, {}))
