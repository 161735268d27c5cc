"""Types and sizes as text: they print as they are read; sizes become numbers."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fxsight.errors import InputError, TextError
from fxsight.spec import (
    CODES,
    SizeSpec,
    TensorSpec,
    contiguous_stride,
    number,
    parse_dims,
    parse_expr,
    parse_tensor,
    symbol,
)

BATCH, LENGTH = symbol("batch"), symbol("length")

_LEAF = st.one_of(st.integers(1, 64).map(sympy.Integer), st.sampled_from([BATCH, LENGTH]))
_EXPR = st.recursive(
    _LEAF,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] * p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] - p[1]),
        st.tuples(inner, st.integers(2, 9)).map(lambda p: _parsed(f"({p[0]}) // {p[1]}")),
        st.tuples(_LEAF, st.integers(2, 9)).map(lambda p: _parsed(f"({p[0]}) % {p[1]}")),
    ),
    max_leaves=5,
)


def _parsed(text: str) -> sympy.Expr:
    expr: sympy.Expr = parse_expr(ast.parse(text, mode="eval").body)
    return expr


@example(2 * ((BATCH + 1) * (LENGTH + 1)))
@example((2 * (BATCH + 1)) * (LENGTH + 1))
@given(_EXPR)
def test_sizes_print_as_they_are_read(expr: sympy.Expr) -> None:
    assert _parsed(str(expr)) == expr


@given(_EXPR, st.integers(1, 7), st.integers(1, 7))
def test_a_size_has_the_number_that_its_text_has_in_python(expr: sympy.Expr, batch: int, length: int) -> None:
    floor = {"FloorDiv": lambda a, b: a // b, "PythonMod": lambda a, b: a % b, "Mod": lambda a, b: a % b}
    expected = eval(str(expr), {"batch": batch, "length": length, **floor})
    assert number(expr, {"batch": batch, "length": length}) == expected


@given(st.sampled_from(list(CODES)), st.lists(st.one_of(st.integers(0, 99), st.just(BATCH), _EXPR), max_size=4))
def test_types_print_as_they_are_read(dtype: torch.dtype, shape: list[int | sympy.Expr]) -> None:
    dims = parse_dims(", ".join(map(str, shape)))
    spec = TensorSpec(dtype, dims, contiguous_stride(dims))
    assert parse_tensor(str(spec)) == (dtype, dims)


@pytest.mark.parametrize(
    "text", ["f32[]", "f32[0]", "i64[batch]", "bf16[batch, 12, length, 64]", "b1[2*length, length + 1]", "c64[3]"]
)
def test_types_by_example(text: str) -> None:
    dtype, shape = parse_tensor(text)
    assert str(TensorSpec(dtype, shape, ())) == text


def test_rare_dtypes_have_torch_s_own_name() -> None:
    spec = TensorSpec(torch.float8_e4m3fn, (2,), (1,))
    assert str(spec) == "float8_e4m3fn[2]"
    assert parse_tensor("float8_e4m3fn[2]") == (torch.float8_e4m3fn, (2,))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0, 3), (1, 1), (2, 3, 4, 5)])
def test_contiguous_stride_is_torch_s(shape: tuple[int, ...]) -> None:
    assert contiguous_stride(shape) == torch.empty(shape).stride()


def test_strides_of_free_sizes_are_products() -> None:
    """Written as sympy itself would have multiplied them."""
    for shape in ((2, BATCH, LENGTH, LENGTH), (LENGTH, 64, LENGTH, 3), (2 * LENGTH, LENGTH + 1, LENGTH + 1, LENGTH)):
        step: Any = 1
        expected: list[Any] = []
        for dim in reversed(shape):
            expected.append(step)
            step = step * dim
        assert contiguous_stride(shape) == tuple(reversed(expected))


@pytest.mark.parametrize("kind", [sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le, sympy.Eq, sympy.Ne])
@pytest.mark.parametrize("bound", [0, 1, 3, LENGTH])
def test_a_condition_is_read_as_sympy_makes_it(kind: Any, bound: Any) -> None:
    """That on one size and a number is not looked into: all it could find out is known."""
    made = kind(BATCH, bound)
    read = parse_expr(ast.parse(str(made), mode="eval").body)
    assert read == made
    for batch in range(5):
        sizes = {BATCH: batch, LENGTH: 2}
        assert bool(read.xreplace(sizes)) == bool(kind(sympy.Integer(batch), sympy.sympify(bound).xreplace(sizes)))


def test_at_puts_numbers_for_names() -> None:
    spec = TensorSpec(torch.float32, (BATCH, 2 * LENGTH), (2 * LENGTH, 1), "cpu", "x")
    assert spec.at({"batch": 3, "length": 5}) == TensorSpec(torch.float32, (3, 10), (10, 1), "cpu", "x")
    assert spec.contiguous and str(SizeSpec(2 * LENGTH)) == "size 2*length"


def test_an_unknown_size() -> None:
    with pytest.raises(InputError) as caught:
        number(BATCH + symbol("u0"), {"batch": 2})
    message = "the size batch + u0 is only known when the model runs (it depends on u0)"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text, message",
    [
        ("f32", "not a tensor type: 'f32'; write for example f32[batch, 768]"),
        ("f33[2]", f"not a dtype: 'f33'; one of {', '.join(CODES.values())}"),
        ("save[2]", f"not a dtype: 'save'; one of {', '.join(CODES.values())}"),
        ("f32[open('x')]", "not a size: \"open('x')\""),
        ("f32[batch.real]", "not a size: 'batch.real'"),
        ("f32['a']", "not a size: \"'a'\""),
    ],
)
def test_errors_of_types(text: str, message: str) -> None:
    with pytest.raises(TextError) as caught:
        parse_tensor(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", ["f32[", "f32[(]", "f32[a b]", "f32[2 << 3]", "f32[1 if batch else 2]", "f32[~~]", "f32[1/0]"]
)
def test_text_that_is_no_type_is_a_text_error(text: str) -> None:
    with pytest.raises(TextError):
        parse_tensor(text)
