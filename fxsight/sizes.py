"""The sizes of given inputs, checked against what a program holds for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from fxsight.errors import InputError
from fxsight.program import Program
from fxsight.spec import TensorSpec, number


def bind_sizes(program: Program, leaves: Sequence[Any]) -> dict[str, int]:
    """The named sizes of some inputs.

    Raises: InputError when the inputs are not of the program's dtypes, ranks and sizes.
    """
    sizes: dict[str, int] = {}
    for number_, (spec, leaf) in enumerate(zip(program.input_leaves, leaves, strict=True)):
        if isinstance(spec, TensorSpec):
            _bind(sizes, spec, leaf, f"input {number_}")
    for size in program.sizes:
        value = sizes.get(size.name)
        if value is not None and (value < size.low or (size.high is not None and value > size.high)):
            raise InputError(f"{size.name} is {value}, and this program holds for {size}")
    check_guards(program, sizes)
    return sizes


def check_guards(program: Program, sizes: Mapping[str, int]) -> None:
    """Whether the conditions of a program hold.

    Raises: InputError with the one that does not.
    """
    for guard in program.guards:
        if guard.xreplace({s: sizes[s.name] for s in guard.free_symbols if s.name in sizes}) == False:  # noqa: E712
            raise InputError(f"sizes {sizes} break the condition {guard} of this program")


def _bind(sizes: dict[str, int], spec: TensorSpec, leaf: Any, what: str) -> None:
    if not isinstance(leaf, torch.Tensor) or leaf.dtype != spec.dtype or leaf.ndim != len(spec.shape):
        got = f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
        raise InputError(f"{what} is {got}, and this program takes {spec}")
    if str(leaf.device) != spec.device:
        raise InputError(f"{what} is on {leaf.device}, and this program runs on {spec.device}")
    for dim, value in zip(spec.shape, leaf.shape, strict=True):
        expected = sizes.setdefault(dim.name, value) if isinstance(dim, sympy.Symbol) else number(dim, sizes)
        if expected != value:
            raise InputError(f"{what} is {list(leaf.shape)}, and this program takes {spec} with {sizes}")
