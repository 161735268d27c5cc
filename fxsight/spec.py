"""What a value is before it exists: dtype, symbolic shape, strides, device, and whose storage it shares.

Shapes are Python ints and ``sympy`` expressions over named sizes (``batch``, ``length``, …): data that prints
(``f32[batch, 12, length, 64]``), parses back, and needs no tensor and no shape environment.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch

from fxsight import _torch
from fxsight.errors import InputError, TextError

Dim = int | sympy.Expr

CODES: Mapping[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
DTYPES: Mapping[str, torch.dtype] = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype, shape, strides (in elements), device, and storage.

    storage: name of the first node that has this storage; a view, and an in-place result, has that of its base.
    """

    dtype: torch.dtype
    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    device: str = "cpu"
    storage: str = ""

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        """What a tensor is, in numbers."""
        return TensorSpec(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), str(tensor.device))

    def __str__(self) -> str:
        code = CODES.get(self.dtype) or str(self.dtype).removeprefix("torch.")
        return f"{code}[{', '.join(map(str, self.shape))}]"

    @property
    def contiguous(self) -> bool:
        """Whether the strides are those of a fresh tensor of this shape."""
        return self.stride == contiguous_stride(self.shape)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The shape, when it is known in numbers."""
        return cast(tuple[int, ...], self.shape)

    @property
    def steps(self) -> tuple[int, ...]:
        """The strides, when they are known in numbers."""
        return cast(tuple[int, ...], self.stride)

    def at(self, sizes: Mapping[str, int]) -> TensorSpec:
        """With every named size replaced by its number.

        Raises: InputError when a size is not among ``sizes``.
        """
        shape = tuple(number(d, sizes) for d in self.shape)
        return TensorSpec(self.dtype, shape, tuple(number(d, sizes) for d in self.stride), self.device, self.storage)


@dataclass(frozen=True)
class SizeSpec:
    """An integer that is computed from sizes (a ``SymInt``), a boolean or a float of sizes."""

    expr: Any

    def __str__(self) -> str:
        return f"size {self.expr}"


Spec = TensorSpec | SizeSpec | tuple["Spec", ...] | None


def contiguous_stride(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Row-major strides, in elements (``torch.empty(shape).stride()``; sizes of 0 and 1 count as 1)."""
    inner = [max(dim, 1) if isinstance(dim, int) else dim for dim in shape[1:]]
    return tuple(_product(inner[place:]) for place in range(len(shape)))


def _product(factors: Sequence[Any]) -> Any:
    """The product of sizes and numbers as sympy makes it from the right; where all are plain, without asking sympy.

    To multiply two products sympy asks whether one is zero, and imports much to find out.
    """
    known, powers = 1, dict[Any, int]()
    for factor in reversed(factors):
        if isinstance(factor, int):
            known *= factor
        elif factor.is_Symbol:
            powers[factor] = powers.get(factor, 0) + 1
        else:
            return functools.reduce(lambda product, other: product * other, reversed(factors))
    sizes = [size if power == 1 else size**power for size, power in powers.items()]
    return known if not sizes else sympy.Mul(known, *sizes)


def symbol(name: str) -> sympy.Symbol:
    """The named size: a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def number(dim: Any, sizes: Mapping[str, int]) -> int:
    """The value of one dimension or size expression.

    Raises: InputError when it depends on a size not among ``sizes`` (one that only running the model tells).
    """
    if isinstance(dim, int):
        return dim
    plain = _plain_number(dim, sizes)
    if plain is not None:
        return plain
    value = dim.xreplace({s: sympy.Integer(sizes[s.name]) for s in dim.free_symbols if s.name in sizes})
    if value.free_symbols:
        names = ", ".join(sorted(s.name for s in value.free_symbols))
        raise InputError(f"the size {dim} is only known when the model runs (it depends on {names})")
    return int(value)


def _plain_number(dim: Any, sizes: Mapping[str, int]) -> int | None:
    """That of sizes and integers, their sums, products and smallest, without asking sympy; None for all else."""
    if dim.is_Symbol:
        return sizes.get(dim.name)
    if dim.is_Integer:
        return int(dim)
    is_least = isinstance(dim, sympy.Min)
    if not (dim.is_Add or dim.is_Mul or is_least):
        return None
    parts = [_plain_number(part, sizes) for part in dim.args]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return min(known) if is_least else sum(known) if dim.is_Add else math.prod(known)


def spec_of(value: Any, names: Mapping[Any, sympy.Symbol], storages: dict[int, str], node: str) -> Spec:
    """The spec of a (fake) value, with its shape symbols renamed by ``names`` and its storage by ``storages``."""
    if isinstance(value, torch.Tensor):
        key = _torch.storage_key(value)
        storage = storages.setdefault(key, node) if key is not None else node
        dims = tuple(_dim(d, names) for d in value.shape)
        strides = () if value.layout is not torch.strided else tuple(_dim(d, names) for d in value.stride())
        return TensorSpec(value.dtype, dims, strides, str(value.device), storage)
    if isinstance(value, (tuple, list)):
        return tuple(spec_of(v, names, storages, f"{node}[{i}]") for i, v in enumerate(value))
    if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return SizeSpec(_rename(_torch.size_expr(value), names))
    if isinstance(value, (int, float, bool)):
        return SizeSpec(sympy.sympify(value))
    return None


def _dim(value: Any, names: Mapping[Any, sympy.Symbol]) -> Dim:
    if isinstance(value, int):
        return value
    expr = _rename(_torch.size_expr(value), names)
    return int(expr) if expr.is_Integer else expr


def _rename(expr: Any, names: Mapping[Any, sympy.Symbol]) -> Any:
    return expr.xreplace({s: names.get(s) or symbol(str(s)) for s in expr.free_symbols})


def renamed(spec: Any, names: Mapping[str, str]) -> Any:
    """A spec with the memory it may share under another name."""
    if isinstance(spec, tuple):
        return tuple(renamed(part, names) for part in spec)
    if not isinstance(spec, TensorSpec):
        return spec
    name, bracket, rest = spec.storage.partition("[")
    known = names.get(spec.storage) or (f"{names[name]}{bracket}{rest}" if name in names else spec.storage)
    return spec if known == spec.storage else replace(spec, storage=known)


_TENSOR = re.compile(r"(?P<dtype>\w+)\[(?P<shape>.*)\]")


def parse_tensor(text: str) -> tuple[torch.dtype, tuple[Dim, ...]]:
    """Dtype and shape from ``f32[batch, 2*length, 768]``.

    Raises: TextError.
    """
    match = _TENSOR.fullmatch(text.strip())
    if match is None:
        raise TextError(f"not a tensor type: {text!r}; write for example f32[batch, 768]")
    dtype = DTYPES.get(match["dtype"]) or getattr(torch, match["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise TextError(f"not a dtype: {match['dtype']!r}; one of {', '.join(DTYPES)}")
    return dtype, parse_dims(match["shape"])


def parse_dims(text: str) -> tuple[Dim, ...]:
    """Dimensions from ``batch, 2*length, 768``."""
    try:
        body = ast.parse(f"({text},)" if text.strip() else "()", mode="eval").body
        assert isinstance(body, ast.Tuple)
        found = tuple(int(e) if (e := parse_expr(x)).is_Integer else e for x in body.elts)
        if any(not isinstance(e, int) and e.is_finite is False for e in found):
            raise TextError(f"not sizes: {text!r}: not finite")
        return found
    except (SyntaxError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise TextError(f"not sizes: {text!r}: {error}") from None


_OPERATORS: Mapping[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.FloorDiv: _torch.floor_div,
    ast.Mod: _torch.mod,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.BitAnd: sympy.And,
    ast.BitOr: sympy.Or,
}


def parse_expr(node: ast.expr) -> Any:
    """A size expression from parsed Python; only arithmetic, comparisons and ``torch``'s own size functions."""
    match node:
        case ast.Constant(value=int() | float() | bool()):
            return sympy.sympify(node.value)
        case ast.Name(id=name):
            return symbol(name)
        case ast.BinOp(op=ast.Mult()):
            factors = [parse_expr(factor) for factor in _factors(node)]
            if not all(x.is_Integer or x.is_Symbol for x in factors):
                return sympy.Mul(*factors)  # at once: two by two, a number and a sum would be multiplied out
            return sympy.sympify(_product([int(x) if x.is_Integer else x for x in reversed(factors)]))
        case ast.BinOp():
            return _OPERATORS[type(node.op)](parse_expr(node.left), parse_expr(node.right))
        case ast.UnaryOp(op=ast.USub()):
            return -parse_expr(node.operand)
        case ast.UnaryOp(op=ast.Invert()):
            return sympy.Not(parse_expr(node.operand))
        case ast.Compare(ops=[op], comparators=[right]):
            return _relation(_OPERATORS[type(op)], parse_expr(node.left), parse_expr(right))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _torch.SIZE_FUNCTIONS:
            return _torch.SIZE_FUNCTIONS[name](*map(parse_expr, node.args))
        case _:
            raise TextError(f"not a size: {ast.unparse(node)!r}")


def _factors(node: ast.expr) -> list[ast.expr]:
    """``a`` and ``b`` and ``c`` of ``a * b * c``."""
    match node:
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            return [*_factors(left), right]
        case _:
            return [node]


def _relation(kind: Any, left: Any, right: Any) -> Any:
    """A comparison; of a size with a positive number nothing is known, and sympy imports much to find that out."""
    is_open = left.is_Symbol and right.is_Integer and right > 0
    return kind(left, right, evaluate=False) if is_open else kind(left, right)
