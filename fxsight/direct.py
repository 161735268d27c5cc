"""Operators as torch's own Python bindings: the same kernels, and half the time of a call through ``torch.ops``.

Only those whose binding takes the arguments of the operator, in its order, and calls this operator and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxsight import _torch

aten = torch.ops.aten

_SAME_NAME = {
    torch: (
        "abs.default addmm.default addbmm.default argmax.default baddbmm.default bitwise_and.Tensor "
        "bitwise_not.default bitwise_or.Tensor bmm.default cat.default chunk.default clamp.default clone.default "
        "cos.default cumsum.default exp.default gather.default group_norm.default index_select.default "
        "layer_norm.default log.default logical_and.default logical_not.default logical_or.default "
        "masked_fill.Scalar masked_fill.Tensor matmul.default mean.dim mm.default neg.default permute.default "
        "pow.Tensor_Scalar pow.Tensor_Tensor reciprocal.default relu.default repeat_interleave.self_int "
        "reshape.default rms_norm.default roll.default rsqrt.default sigmoid.default sin.default softmax.int "
        "sqrt.default square.default squeeze.dim stack.default sum.dim_IntList tanh.default topk.default "
        "transpose.int tril.default triu.default unsqueeze.default where.self conv1d.default embedding.default "
        "add.Tensor sub.Tensor mul.Tensor div.Tensor "
        "eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor "
        "eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar"
    ),
    Tensor: "contiguous.default expand.default to.dtype type_as.default view.default",
    functional: "gelu.default linear.default scaled_dot_product_attention.default",
}
_OTHER_NAME: Mapping[Any, Callable[..., Any]] = {
    aten.flatten.using_ints: torch.flatten,
    aten.sym_size.int: Tensor.size,
    aten.split.Tensor: _torch.split,
    aten.split_with_sizes.default: Tensor.split_with_sizes,
    aten.silu.default: functional.silu,
    aten.softplus.default: functional.softplus,
}


# The binding takes what comes after these by name alone.
_POSITIONS = {aten.to.dtype: 4}


def direct(target: Any, arguments: int) -> Callable[..., Any] | None:
    """The binding of an operator that is called with so many arguments by position; None where it has none."""
    return direct_calls().get(target) if arguments <= _POSITIONS.get(target, arguments) else None


@cache
def direct_calls() -> Mapping[Any, Callable[..., Any]]:
    """The binding of each operator that has one."""
    named = {
        getattr(getattr(aten, packet), overload): getattr(owner, packet)
        for owner, names in _SAME_NAME.items()
        for packet, _, overload in (name.partition(".") for name in names.split())
    }
    return {**named, **_OTHER_NAME}
