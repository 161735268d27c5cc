"""Only the columns of a linear layer that are read are computed, and have the same numbers."""

from __future__ import annotations

import pytest
import torch

from fxsight.bits import narrow_exactly, narrowing_columns
from fxsight.lower import eager
from fxsight.passes import NarrowColumns
from fxsight.spread import spread_columns
from fxsight.testing import check_pass, listing, program_of, random_program

TWO: str = """
    x: 'input 0'                                                                        # f32[batch, length, 8]
    w: 'weight w'                                                                       # f32[96, 8]
    b: 'weight b'                                                                       # f32[96]
    logits = aten.linear.default(x, w, b)                                               # f32[batch, length, 96]
    right = torch.Tensor.__getitem__(logits, (slice(None, None, None), -1, 5))          # f32[batch]
    wrong = torch.Tensor.__getitem__(logits, (..., -2))                                 # f32[batch, length]
    return (right, wrong)
"""


def test_two_tokens() -> None:
    result = check_pass(NarrowColumns(), program_of(TWO), tolerance=1e-5, neutral=NarrowColumns(but=("logits",)))
    assert listing(result).splitlines() == [
        "column = aten.slice.Tensor(w, 0, 5, 6)",
        "column_1 = aten.slice.Tensor(w, 0, 94, 95)",
        "columns = aten.cat.default([column, column_1])",
        "column_2 = aten.slice.Tensor(b, 0, 5, 6)",
        "column_3 = aten.slice.Tensor(b, 0, 94, 95)",
        "columns_1 = aten.cat.default([column_2, column_3])",
        "logits = aten.linear.default(x, columns, columns_1)",
        "right = torch.Tensor.__getitem__(logits, (slice(None, None, None), -1, 0))",
        "wrong = torch.Tensor.__getitem__(logits, (slice(None, None, None), slice(None, None, None), 1))",
        "return (right, wrong,)",
    ]
    assert "logits = aten.linear.default(x, columns, columns_1)  # f32[batch, length, 2]" in " ".join(
        result.text.split()
    ).replace(" # ", "  # ")


def test_more_columns_are_kept_where_asked() -> None:
    result = check_pass(NarrowColumns(8), program_of(TWO), tolerance=1e-5)
    assert "f32[batch, length, 8]" in result.text
    assert listing(result).count("column_2") == 7  # column 0, six times


@pytest.mark.parametrize(
    ("reading", "wanted"),
    [
        ("torch.Tensor.__getitem__(logits, (..., [3, 1, 3]))  # f32[batch, length, 3]", "[0, 1, 0]"),
        ("torch.Tensor.__getitem__(logits, (..., slice(4, 12, None)))  # f32[batch, length, 8]", "slice(0, 8, None)"),
        ("torch.Tensor.__getitem__(logits, (..., slice(4, 12, 3)))  # f32[batch, length, 3]", "slice(0, 3, None)"),
        ("aten.select.int(logits, 2, 7)  # f32[batch, length]", "aten.select.int(logits, 2, 0)"),
        ("aten.slice.Tensor(logits, -1, 90, 96)  # f32[batch, length, 6]", "aten.slice.Tensor(logits, -1, 0, 6)"),
    ],
)
def test_readings(reading: str, wanted: str) -> None:
    rows: list[str] = TWO.strip().splitlines()
    rows[4:] = [f"right = {reading}", "return (right,)"]
    result = check_pass(NarrowColumns(), program_of("\n".join(rows)), tolerance=1e-5)
    assert wanted in listing(result)


def test_columns_of_rows() -> None:
    program = program_of(
        """
        x: 'input 0'                                                                    # f32[batch, length, 8]
        w: 'weight w'                                                                   # f32[96, 8]
        logits = aten.linear.default(x, w)                                              # f32[batch, length, 96]
        border = aten.alias.default(logits)                                             # f32[batch, length, 96]
        last = torch.Tensor.__getitem__(border, (slice(None, None, None), -1))          # f32[batch, 96]
        right = torch.Tensor.__getitem__(last, (slice(None, None, None), 5))            # f32[batch]
        wrong = torch.Tensor.__getitem__(last, (slice(None, None, None), 7))            # f32[batch]
        out = torch.Tensor.sub(right, wrong)                                            # f32[batch]
        return (out,)
        """
    )
    result = check_pass(NarrowColumns(), program, tolerance=1e-5)
    assert "right = torch.Tensor.__getitem__(last, (slice(None, None, None), 0))" in listing(result)
    assert "f32[batch, 96]" not in result.text


def test_columns_that_a_tensor_says() -> None:
    program = program_of(
        """
        x: 'input 0'                                                                    # f32[3, length, 8]
        rows: 'constant 0'                                                              # i64[3]
        tokens: 'constant 1'                                                            # i64[3]
        pairs: 'constant 2'                                                             # i64[3, 2]
        w: 'weight w'                                                                   # f32[96, 8]
        logits = aten.linear.default(x, w)                                              # f32[3, length, 96]
        right = torch.Tensor.__getitem__(logits, (rows, -1, tokens))                    # f32[3]
        both = torch.Tensor.__getitem__(logits, (0, slice(None, None, None), pairs))    # f32[length, 3, 2]
        return (right, both)
        """
    )
    result = NarrowColumns()(program)
    assert listing(result).splitlines() == [
        "columns = aten.index.Tensor(w, [tokens])",
        "index = aten.reshape.default(pairs, [-1])",
        "columns_1 = aten.index.Tensor(w, [index])",
        "columns_2 = aten.cat.default([columns, columns_1])",
        "logits = aten.linear.default(x, columns_2)",
        "places = aten.arange.start(0, 3, device=torch.device('cpu'))",
        "right = torch.Tensor.__getitem__(logits, (rows, -1, places))",
        "places_1 = aten.arange.start(3, 9, device=torch.device('cpu'))",
        "places_2 = aten.reshape.default(places_1, [3, 2])",
        "both = torch.Tensor.__getitem__(logits, (0, slice(None, None, None), places_2))",
        "return (right, both,)",
    ]


@pytest.mark.parametrize(
    "other",
    [
        "aten.neg.default(logits)  # f32[batch, length, 96]",
        "torch.Tensor.__getitem__(logits, (slice(None, None, None), -1))  # f32[batch, 96]",
        "torch.Tensor.__getitem__(logits, (..., slice(0, 30, None)))  # f32[batch, length, 30]",
        "torch.Tensor.argmax(logits, -1)  # i64[batch, length]",
    ],
)
def test_columns_that_others_read_stay(other: str) -> None:
    rows: list[str] = TWO.strip().splitlines()
    rows[5] = f"wrong = {other}"
    program = program_of("\n".join(rows))
    assert NarrowColumns()(program) is program


def test_memory_that_is_changed_is_left_alone() -> None:
    rows: list[str] = TWO.strip().splitlines()
    rows.insert(4, "twice = aten.mul_.Tensor(logits, 2)  # f32[batch, length, 96]  {shares='logits'}")
    rows[-1] = "return (right, wrong, twice)"
    program = program_of("\n".join(rows))
    assert NarrowColumns()(program) is program


@pytest.mark.parametrize("seed", range(10))
def test_random_programs(seed: int) -> None:
    check_pass(NarrowColumns(), random_program(seed), tolerance=1e-6)


def test_strides_of_the_whole() -> None:
    result = check_pass(NarrowColumns(4, layout=True), program_of(TWO), tolerance=1e-5)
    assert listing(result).splitlines()[-5:] == [
        "logits = aten.linear.default(x, columns, columns_1)",
        "spread = spread_columns(logits, 96, [5, 94])",
        "right = torch.Tensor.__getitem__(spread, (slice(None, None, None), -1, 5))",
        "wrong = torch.Tensor.__getitem__(spread, (..., -2))",
        "return (right, wrong,)",
    ]


def test_columns_at_their_places() -> None:
    whole = torch.randn(2, 3, 20)
    rows = torch.tensor([[4, 19], [0, 7]])
    few = torch.cat([whole[..., [5]], whole[..., 1:9:4], whole[..., [4, 19, 0, 7]], whole[..., :2]], -1)
    found = spread_columns(few, 20, [5, slice(1, 9, 4), rows])
    assert found.stride() == whole.stride()
    for places in (5, [1, 5], rows):
        assert torch.equal(found[..., places], whole[..., places])


def test_the_bits_decide() -> None:
    """With as many columns as give the same bits; a layer for which none do keeps all."""
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(96, 8, generator=generator), "b": torch.randn(96, generator=generator)}
    program, known = program_of(TWO), dict[object, bool]()
    asked = narrowing_columns(program, {"batch": 3, "length": 5}, weights.__getitem__, known)
    assert asked is not None
    assert known
    assert narrow_exactly(program, {"batch": 3, "length": 5}, weights.__getitem__, known).history[-1] == repr(asked)
    never = dict.fromkeys(known, False)
    again = narrowing_columns(program, {"batch": 3, "length": 5}, weights.__getitem__, never)
    assert again is None or again.columns > asked.columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_number_is_not_the_same_by_chance(dtype: torch.dtype) -> None:
    """Sums of 16 products are often the same in another order: one result says nothing, so more are compared."""
    short = "f32" if dtype == torch.float32 else "f64"
    program = program_of(
        f"""
        x: 'input 0'                                                                    # {short}[1, 1, 16]
        w: 'weight w'                                                                   # {short}[98, 16]
        logits = aten.linear.default(x, w)                                              # {short}[1, 1, 98]
        one = torch.Tensor.__getitem__(logits, (0, 0, 3))                               # {short}[]
        return (one,)
        """
    )
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        w, given = (
            torch.randn(98, 16, generator=generator, dtype=dtype),
            torch.randn(20, 1, 1, 16, generator=generator, dtype=dtype),
        )
        known = dict[object, bool]()
        narrow_exactly(program, {}, {"w": torch.zeros(98, 16, dtype=dtype)}.__getitem__, known)  # it learns afterwards
        narrowed = narrow_exactly(program, {}, {"w": w}.__getitem__, known)
        for x in given:
            assert torch.equal(eager(narrowed)(x, w)[0], torch.nn.functional.linear(x, w)[0, 0, 3])
