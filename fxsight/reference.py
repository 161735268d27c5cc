"""Fused operators written out: the formula of each as ordinary torch calls, one value a line.

``open_fused`` runs these functions on shapes when a fused operator is opened: the calls below are then the operations
*inside* it, each with an address made of its name in this text (``…/softmax_0``, ``…/operator_mul_0``). They compute
what torch documents for the operator; a kernel adds the same numbers in another order, so the last bits may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class NoFormula(Exception):
    """Called in a way that is not written out here."""


_NEVER = float("-inf")  # a score that softmax turns into a weight of 0


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention: each query's mean of the values, weighted by how well its key fits.

    query: f32[batch, heads, queries, width].  key, value: f32[batch, heads, keys, width]; with ``enable_gqa`` fewer
    heads, each for several of the query's.  attn_mask: true where a query may look (bool), or added to the scores.
    dropout_p: always applied, as in torch.  Returns: f32[batch, heads, queries, width of the values].

    ``softmax_0`` is the attention pattern, f32[batch, heads, queries, keys].
    """
    if enable_gqa:
        heads_per_key = query.size(-3) // key.size(-3)
        key = torch.repeat_interleave(key, heads_per_key, dim=-3)
        value = torch.repeat_interleave(value, heads_per_key, dim=-3)
    factor = query.size(-1) ** -0.5 if scale is None else scale
    fit = torch.matmul(query, key.transpose(-2, -1))
    scores = fit * factor
    if is_causal:
        square = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(torch.triu(square, diagonal=1), _NEVER)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), _NEVER)
    elif attn_mask is not None:
        scores = scores + attn_mask
    pattern = softmax(scores)
    if dropout_p > 0:
        pattern = torch.dropout(pattern, dropout_p, train=True)
    return torch.matmul(pattern, value)


def softmax(scores: Tensor) -> Tensor:
    """Weights over the keys that sum to 1; all 0 for a query that may look nowhere (padding), as in torch's kernels."""
    weights = torch.softmax(scores, dim=-1)
    nowhere = torch.isneginf(scores).all(dim=-1, keepdim=True)
    return weights.masked_fill(nowhere, 0.0)


def plain_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Exponentials over their sum along one dimension; computed in ``dtype`` where it is given."""
    if dtype is not None:
        input = input.to(dtype)
    highest = torch.amax(input, dim=dim, keepdim=True)  # taken off first: no exponential is above 1
    exponentials = torch.exp(input - highest)
    return exponentials / exponentials.sum(dim=dim, keepdim=True)


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Values less the logarithm of the sum of their exponentials along one dimension; in ``dtype`` if given."""
    if dtype is not None:
        input = input.to(dtype)
    below = input - torch.amax(input, dim=dim, keepdim=True)  # no exponential is above 1
    return below - torch.exp(below).sum(dim=dim, keepdim=True).log()


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Mean 0 and variance 1 over the last dimensions, then ``weight`` and ``bias``; 16-bit values in float32."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.float() if _is_short(input) else input
    mean = wide.mean(dims, keepdim=True)
    centered = wide - mean
    variance = centered.square().mean(dims, keepdim=True)
    normal = centered * torch.rsqrt(variance + eps)
    if weight is not None:
        normal = normal * weight
    if bias is not None:
        normal = normal + bias
    return normal.to(input.dtype) if _is_short(input) else normal


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Mean square 1 over the last dimensions, then ``weight``; 16-bit values in float32."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.float() if _is_short(input) else input
    mean_square = wide.square().mean(dims, keepdim=True)
    normal = wide * torch.rsqrt(mean_square + (torch.finfo(wide.dtype).eps if eps is None else eps))
    if weight is not None:
        normal = normal * weight
    return normal.to(input.dtype) if _is_short(input) else normal


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Mean 0 and variance 1 in each group of channels, then ``weight`` and ``bias``; 16-bit values in float32.

    input: f32[batch, channels, …].  weight, bias: f32[channels].
    """
    wide = input.float() if _is_short(input) else input
    grouped = torch.unflatten(wide, 1, (num_groups, input.size(1) // num_groups))
    dims = tuple(range(2, grouped.dim()))
    centered = grouped - grouped.mean(dims, keepdim=True)
    variance = centered.square().mean(dims, keepdim=True)
    normal = torch.flatten(centered * torch.rsqrt(variance + eps), 1, 2)
    if weight is not None:
        normal = normal * _by_channel(weight, input)
    if bias is not None:
        normal = normal + _by_channel(bias, input)
    return normal.to(input.dtype) if _is_short(input) else normal


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Each channel by its running mean and variance, then ``weight`` and ``bias``; 16-bit values in float32.

    input: f32[batch, channels, …].  All others: f32[channels].

    Raises: NoFormula in training, when it changes its running statistics.
    """
    if training or running_mean is None or running_var is None:
        raise NoFormula("in training it changes its running statistics; use model.eval()")
    wide = input.float() if _is_short(input) else input
    centered = wide - _by_channel(running_mean, input)
    normal = centered * _by_channel(torch.rsqrt(running_var + eps), input)
    if weight is not None:
        normal = normal * _by_channel(weight, input)
    if bias is not None:
        normal = normal + _by_channel(bias, input)
    return normal.to(input.dtype) if _is_short(input) else normal


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """``x`` times the probability that a normal number is below ``x``; "tanh" approximates that probability."""
    if approximate == "tanh":
        cubic = input + 0.044715 * torch.pow(input, 3)
        below = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic))
    else:
        below = 0.5 * (1 + torch.erf(input / math.sqrt(2)))
    return input * below


def silu(input: Tensor) -> Tensor:
    """``x`` times its sigmoid."""
    return input * torch.sigmoid(input)


def _by_channel(value: Tensor, input: Tensor) -> Tensor:
    """f32[channels] to f32[channels, 1, …], which fits f32[batch, channels, …]."""
    return value.reshape([-1, *[1] * (input.dim() - 2)])


def _is_short(value: Tensor) -> bool:
    return value.dtype in (torch.float16, torch.bfloat16)


aten = torch.ops.aten

REFERENCES: Mapping[Any, Callable[..., Tensor]] = {
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    aten.softmax.int: plain_softmax,
    aten.log_softmax.int: log_softmax,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.group_norm.default: group_norm,
    aten.batch_norm.default: batch_norm,
    aten.gelu.default: gelu,
    aten.silu.default: silu,
}
