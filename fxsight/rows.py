"""The rows of one invoke in the batch of a trace: several inputs run as one, joined along their first dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from fxsight.errors import TraceError
from fxsight.program import Program
from fxsight.spec import TensorSpec, number
from fxsight.tree import flatten

Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a batch that has ``total`` so far.

    sizes: the batch as the program has it: a symbol, or a number where the program holds for one batch alone. Inputs
    of which the model's code does not say that they have one batch (tokens and their mask) have a symbol each.
    """

    start: int
    stop: int
    total: int
    sizes: frozenset[Any]

    @property
    def count(self) -> int:
        """How many rows."""
        return self.stop - self.start

    @property
    def names(self) -> set[str]:
        """The names of the sizes that the rows fix."""
        return {size.name for size in self.sizes if isinstance(size, sympy.Symbol)}

    def dim_of(self, spec: TensorSpec) -> int | None:
        """The dimension of a value that has one entry per row of the batch; None for a value that all rows share.

        Raises: TraceError for a value in which the batch is folded into another dimension.
        """
        if spec.shape and spec.shape[0] in self.sizes and not isinstance(spec.shape[0], sympy.Symbol):
            return 0
        holding = [d for d, size in enumerate(spec.shape) if self.sizes & getattr(size, "free_symbols", frozenset())]
        if not holding:
            return None
        if len(holding) > 1 or spec.shape[holding[0]] not in self.sizes:
            raise TraceError(
                f"its shape is {spec}: the rows of the batch are no dimension of their own there; read or write it "
                "for all rows, outside the invokes, or read another value"
            )
        return holding[0]


def overlap(one: Rows | None, other: Rows | None) -> bool:
    """Whether two parts of a batch share a row; None is the whole batch."""
    return one is None or other is None or (one.start < other.stop and other.start < one.stop)


def row_count(call: Call) -> int:
    """Rows of one call's inputs: the first dimension of the first tensor.

    Raises: TraceError without a tensor of at least one dimension.
    """
    first = next((x for x in flatten(call)[0] if isinstance(x, torch.Tensor) and x.ndim), None)
    if first is None:
        raise TraceError("the inputs of an invoke have no tensor with a batch dimension")
    return first.shape[0]


def join(calls: Sequence[Call]) -> Call:
    """One call with the rows of all: tensors that carry the batch are concatenated along dim 0, the rest must be equal.

    Raises: TraceError where the inputs cannot be one batch.
    """
    if len(calls) == 1:
        return calls[0]
    flat = [flatten((tuple(args), dict(kwargs))) for args, kwargs in calls]
    if any(tree != flat[0][1] for _, tree in flat):
        raise TraceError("the invokes of one trace have inputs of different structure: give all the same arguments")
    counts = [row_count(call) for call in calls]
    joined = [_join_leaf(list(leaves), counts) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    args, kwargs = flat[0][1].build(joined)
    return tuple(args), kwargs


def _join_leaf(leaves: list[Any], counts: Sequence[int]) -> Any:
    first = leaves[0]
    if not isinstance(first, torch.Tensor):
        if any(type(x) is not type(first) or x != first for x in leaves):
            raise TraceError(f"the invokes of one trace have different arguments {leaves}; they run as one batch")
        return first
    if all(x.ndim and x.shape[0] == n for x, n in zip(leaves, counts, strict=True)):
        if any(x.shape[1:] != first.shape[1:] or x.dtype != first.dtype or x.device != first.device for x in leaves):
            shapes = " and ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in leaves)
            raise TraceError(
                f"the invokes of one trace have inputs {shapes}: pad them to one length, or use two traces"
            )
        return torch.cat(leaves)
    if all(torch.equal(x, first) for x in leaves):
        return first
    raise TraceError("the invokes of one trace have different tensors that do not carry the batch; use two traces")


def batch_sizes(program: Program, sizes: Mapping[str, int]) -> frozenset[Any]:
    """The batch of a program: the first dimension of each tensor input that has an entry for each row."""
    first = [leaf.shape[0] for leaf in program.input_leaves if isinstance(leaf, TensorSpec) and leaf.shape]
    return frozenset(size for size in first if number(size, sizes) == number(first[0], sizes))


def batch_size(program: Program) -> Any:
    """The batch of a program: the first dimension of its first tensor input, a symbol or a number."""
    specs = (leaf for leaf in program.input_leaves if isinstance(leaf, TensorSpec) and leaf.shape)
    return next(specs).shape[0]
