"""Inputs like some others, at other sizes: to see whether what holds for the one holds for the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch

from fxsight.errors import InputError
from fxsight.program import Program
from fxsight.sizes import bind_sizes
from fxsight.spec import TensorSpec, number


def resized(program: Program, leaves: Sequence[Any], sizes: Mapping[str, int], seed: int = 0) -> list[Any]:
    """The leaves at other sizes: numbers drawn from those that are there, so that an index stays an index.

    Raises: InputError where the program does not hold for these sizes.
    """
    dice = torch.Generator().manual_seed(seed)
    made = [_drawn(leaf, spec, sizes, dice) for leaf, spec in zip(leaves, program.input_leaves, strict=True)]
    bind_sizes(program, made)
    return made


def _drawn(leaf: Any, spec: Any, sizes: Mapping[str, int], dice: torch.Generator) -> Any:
    if not isinstance(spec, TensorSpec) or all(isinstance(dim, int) for dim in spec.shape):
        return leaf
    shape = [number(dim, sizes) for dim in spec.shape]
    if leaf.numel() == 0:
        return leaf.new_zeros(shape)
    which = torch.randint(leaf.numel(), shape, generator=dice)
    return leaf.detach().flatten()[which.to(leaf.device)].clone()


def other_sizes(program: Program, leaves: Sequence[Any], count: int) -> Iterator[tuple[dict[str, int], list[Any]]]:
    """Up to ``count`` other sizes for which a program holds, with inputs of these sizes."""
    own = bind_sizes(program, leaves)
    shapes = [spec.shape for spec in program.input_leaves if isinstance(spec, TensorSpec)]
    free = {dim.name for shape in shapes for dim in shape if isinstance(dim, sympy.Symbol)}
    for step in (1, 2, 3, -1, 4, 8, -2, 16):
        sizes = {name: own[name] + step + place if name in free else own[name] for place, name in enumerate(own)}
        if count <= 0 or not free:
            return
        try:
            made = resized(program, leaves, sizes, seed=step)
        except (InputError, RuntimeError):
            continue
        count -= 1
        yield sizes, made
