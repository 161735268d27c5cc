"""The sizes of given inputs, checked against what a program holds for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from fxsight.errors import InputError
from fxsight.program import Program
from fxsight.spec import SizeSpec, TensorSpec, number

AGAIN = "trace again with these inputs"


def bind_sizes(program: Program, leaves: Sequence[Any]) -> dict[str, int]:
    """The named sizes of some inputs.

    Raises: InputError when the inputs are not of the program's dtypes, ranks and sizes.
    """
    sizes: dict[str, int] = {}
    for number_, (spec, leaf) in enumerate(zip(program.input_leaves, leaves, strict=True)):
        if isinstance(spec, TensorSpec):
            _bind(sizes, spec, leaf, f"input {number_}")
        elif isinstance(spec, SizeSpec):
            _bind_dim(sizes, spec.expr, int(leaf), f"input {number_} is {leaf}", spec)
    for size in program.sizes:
        value = sizes.get(size.name)
        if value is not None and (value < size.low or (size.high is not None and value > size.high)):
            raise InputError(f"{size.name} is {value}, and this program holds for {size}; {AGAIN}")
    check_guards(program, sizes)
    return sizes


def check_guards(program: Program, sizes: Mapping[str, int]) -> None:
    """Whether the conditions of a program hold.

    Raises: InputError with the one that does not.
    """
    for guard in program.guards:
        names = sorted(s.name for s in guard.free_symbols)
        here = {name: sizes[name] for name in names if name in sizes}
        if _is_broken(guard, here):
            raise InputError(f"this program holds where {_condition(guard)}, and not for {_numbers(here)}; {AGAIN}")


def _is_broken(guard: Any, sizes: Mapping[str, int]) -> bool:
    try:
        return bool(guard.xreplace({s: sizes[s.name] for s in guard.free_symbols if s.name in sizes}) == False)  # noqa: E712
    except ZeroDivisionError:  # a multiple of nothing
        return True


def holds(program: Program, sizes: Mapping[str, int]) -> bool:
    """Whether the conditions of a program hold."""
    try:
        check_guards(program, sizes)
    except InputError:
        return False
    return True


def layouts(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Shapes and strides of the tensors among some inputs."""
    return tuple((leaf.shape, leaf.stride()) for leaf in leaves if isinstance(leaf, torch.Tensor))


def lie_as_captured(program: Program, leaves: Sequence[Any], sizes: Mapping[str, int]) -> bool:
    """Whether the inputs have the strides that the program says: kernels, and so the order of additions, go by them."""
    pairs = zip(program.input_leaves, leaves, strict=True)
    return all(_lies(spec, leaf, sizes) for spec, leaf in pairs if isinstance(spec, TensorSpec))


def _lies(spec: TensorSpec, leaf: torch.Tensor, sizes: Mapping[str, int]) -> bool:
    if not spec.dtype.is_floating_point:
        return True
    try:
        steps = spec.at(sizes).steps
    except InputError:  # there are gaps, of which no input tells the size
        return False
    return all(size < 2 or step == own for size, step, own in zip(leaf.shape, steps, leaf.stride(), strict=True))


def _bind(sizes: dict[str, int], spec: TensorSpec, leaf: Any, what: str) -> None:
    if not isinstance(leaf, torch.Tensor) or leaf.dtype != spec.dtype or leaf.ndim != len(spec.shape):
        raise InputError(f"{what} is {given_text(leaf)}, and this program takes {spec}; {AGAIN}")
    if str(leaf.device) != spec.device:
        raise InputError(f"{what} is on {leaf.device}, and this program runs on {spec.device}; {AGAIN}")
    for dim, value in zip(spec.shape, leaf.shape, strict=True):
        _bind_dim(sizes, dim, value, f"{what} is {given_text(leaf)}", spec)


def _bind_dim(sizes: dict[str, int], dim: Any, value: int, fact: str, spec: TensorSpec | SizeSpec) -> None:
    expected = sizes.setdefault(dim.name, value) if isinstance(dim, sympy.Symbol) else number(dim, sizes)
    if expected != value:
        known = f" with {_numbers(sizes)}" if sizes else ""
        raise InputError(f"{fact}, and this program takes {spec}{known}; {AGAIN}")


def given_text(leaf: Any) -> str:
    """An input in words: ``f32[2, 4]``, ``None``."""
    return str(TensorSpec(leaf.dtype, tuple(leaf.shape), ())) if isinstance(leaf, torch.Tensor) else repr(leaf)


def _numbers(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sizes.items())


def _condition(guard: Any) -> str:
    """``Ne(batch, 3)`` as ``batch != 3``."""
    sign = getattr(guard, "rel_op", "")
    return f"{guard.lhs} {sign} {guard.rhs}" if sign else str(guard)
