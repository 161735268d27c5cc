"""Operators that can be opened: what they become, and plain PyTorch that computes the same, with one value edited."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsight.node_call import operator_name
from fxsight.place import Place, Places
from fxsight.program import Program
from fxsight.source import SourceReader

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One operator.

    label: of its node.  function: of inputs and weights.  inputs: for two sizes.  opened: the lines that come in the
    place of its own.  inner: a value inside.  twin: the same in plain torch, with the value inside edited.
    tolerance: of the result, relative and absolute; 0 where the arithmetic is the operator's own.
    """

    name: str
    label: str
    function: Callable[..., Any]
    inputs: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    opened: str
    inner: str
    twin: Callable[..., Any]
    weights: tuple[Tensor, ...] = ()
    tolerance: float = 1e-6

    @property
    def module(self) -> Apply:
        """A module that calls the function."""
        return Apply(self.function, *self.weights).eval()


class Apply(nn.Module):
    """A function of some inputs, then the module's weights."""

    def __init__(self, function: Callable[..., Any], *weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for number, weight in enumerate(weights):
            self.register_buffer(f"w{number}", weight)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.buffers())


def random(*shape: int) -> Tensor:
    """Normal numbers, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _two(*shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    first, second = zip(*shapes, strict=True)
    return tuple(random(*s) for s in first), tuple(random(*s) for s in second)


def _wide(*last: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return _two(((2, 5, *last), (3, 4, *last)))


def _gelu(edit: Edit, x: Tensor) -> Tensor:
    return x * (0.5 * (1 + edit(torch.erf(x / math.sqrt(2)))))


def _gelu_tanh(edit: Edit, x: Tensor) -> Tensor:
    return x * (0.5 * (1 + edit(torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))))


def _silu(edit: Edit, x: Tensor) -> Tensor:
    return x * edit(torch.sigmoid(x))


def _layer_norm(edit: Edit, x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * torch.rsqrt(edit((centered**2).mean(-1, keepdim=True)) + 1e-5) * weight + bias


def _rms_norm(edit: Edit, x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(edit((x**2).mean(-1, keepdim=True)) + 1e-5) * weight


def _group_norm(edit: Edit, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = x.reshape(x.shape[0], 2, -1)
    centered = groups - groups.mean(-1, keepdim=True)
    variance = edit((centered**2).mean(-1).view(-1, 2, 1, 1)).view(-1, 2, 1)
    return (centered / (variance + 1e-5).sqrt()).view(x.shape) * weight.view(-1, 1) + bias.view(-1, 1)


def _batch_norm(edit: Edit, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale = edit(torch.rsqrt(var + 1e-5)).view(-1, 1)
    return (x - mean.view(-1, 1)) * scale * weight.view(-1, 1) + bias.view(-1, 1)


def _softmax(edit: Edit, x: Tensor) -> Tensor:
    exponentials = edit(torch.exp(x - x.amax(-1, keepdim=True)))
    return exponentials / exponentials.sum(-1, keepdim=True)


def _log_softmax(edit: Edit, x: Tensor) -> Tensor:
    below = edit(x - x.amax(-1, keepdim=True))
    return below - below.exp().sum(-1, keepdim=True).log()


def _cross_entropy(edit: Edit, scores: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(edit(scores.log_softmax(-1)), target)


def _glu(edit: Edit, x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return first * edit(torch.sigmoid(second))


_TARGETS = (torch.tensor([0, 3, 1, 2, 7, 4]), torch.tensor([1, 0, 4, 4]))
_CHANNELS = (random(8), random(8).abs() + 0.5, random(8) + 1, random(8) * 2)

CASES = (
    Case(
        "gelu", "aten_gelu_0", lambda x: F.gelu(x), _wide(8),
        """
        div = aten.div.Tensor(alias, 1.4142135623730951)
        erf = aten.erf.default(div)
        add = aten.add.Tensor(erf, 1)
        mul = aten.mul.Tensor(add, 0.5)
        mul_1 = aten.mul.Tensor(alias, mul)
        gelu = aten.alias.default(mul_1)
        """,
        "torch_erf_0", _gelu,
    ),
    Case(
        "gelu tanh", "aten_gelu_0", lambda x: F.gelu(x, approximate="tanh"), _wide(8),
        """
        pow_1 = aten.pow.Tensor_Scalar(alias, 3)
        mul = aten.mul.Tensor(pow_1, 0.044715)
        add = aten.add.Tensor(alias, mul)
        mul_1 = aten.mul.Tensor(add, 0.7978845608028654)
        tanh = aten.tanh.default(mul_1)
        add_1 = aten.add.Tensor(tanh, 1)
        mul_2 = aten.mul.Tensor(add_1, 0.5)
        mul_3 = aten.mul.Tensor(alias, mul_2)
        gelu = aten.alias.default(mul_3)
        """,
        "torch_tanh_0", _gelu_tanh,
    ),
    Case(
        "silu", "aten_silu_0", lambda x: F.silu(x), _wide(8),
        """
        sigmoid = aten.sigmoid.default(alias)
        mul = aten.mul.Tensor(alias, sigmoid)
        silu = aten.alias.default(mul)
        """,
        "torch_sigmoid_0", _silu,
    ),
    Case(
        "layer_norm", "aten_layer_norm_0", lambda x, w, b: F.layer_norm(x, (8,), w, b), _wide(8),
        """
        mean = aten.mean.dim(alias, [-1], True)
        sub = aten.sub.Tensor(alias, mean)
        square = aten.square.default(sub)
        mean_1 = aten.mean.dim(square, [-1], True)
        add = aten.add.Tensor(mean_1, 1e-05)
        rsqrt = aten.rsqrt.default(add)
        mul = aten.mul.Tensor(sub, rsqrt)
        mul_1 = aten.mul.Tensor(mul, w0)
        add_1 = aten.add.Tensor(mul_1, w1)
        layer_norm = aten.alias.default(add_1)
        """,
        "mean_0", _layer_norm, (random(8), random(8) * 2),
    ),
    Case(
        "layer_norm without affine, free width", "aten_layer_norm_0", lambda x: F.layer_norm(x, x.shape[-1:]),
        _two(((2, 5, 8), (3, 4, 6))),
        """
        mean = aten.mean.dim(alias, [-1], True)
        sub = aten.sub.Tensor(alias, mean)
        square = aten.square.default(sub)
        mean_1 = aten.mean.dim(square, [-1], True)
        add = aten.add.Tensor(mean_1, 1e-05)
        rsqrt = aten.rsqrt.default(add)
        mul = aten.mul.Tensor(sub, rsqrt)
        layer_norm = aten.alias.default(mul)
        """,
        "mean_0", _layer_norm,
    ),
    Case(
        "rms_norm", "aten_rms_norm_0", lambda x, w: F.rms_norm(x, (8,), w, 1e-5), _wide(8),
        """
        square = aten.square.default(alias)
        mean = aten.mean.dim(square, [-1], True)
        add = aten.add.Tensor(mean, 1e-05)
        rsqrt = aten.rsqrt.default(add)
        mul = aten.mul.Tensor(alias, rsqrt)
        mul_1 = aten.mul.Tensor(mul, w0)
        rms_norm = aten.alias.default(mul_1)
        """,
        "mean_0", _rms_norm, (random(8),),
    ),
    Case(
        "group_norm", "aten_group_norm_0", lambda x, w, b: F.group_norm(x, 2, w, b), _two(((2, 8, 5), (3, 8, 4))),
        """
        unflatten = aten.unflatten.int(alias, 1, [2, 4])
        mean = aten.mean.dim(unflatten, [2, 3], True)
        sub = aten.sub.Tensor(unflatten, mean)
        square = aten.square.default(sub)
        mean_1 = aten.mean.dim(square, [2, 3], True)
        add = aten.add.Tensor(mean_1, 1e-05)
        rsqrt = aten.rsqrt.default(add)
        mul = aten.mul.Tensor(sub, rsqrt)
        flatten = aten.flatten.using_ints(mul, 1, 2)
        reshape = aten.reshape.default(w0, [-1, 1])
        mul_1 = aten.mul.Tensor(flatten, reshape)
        reshape_1 = aten.reshape.default(w1, [-1, 1])
        add_1 = aten.add.Tensor(mul_1, reshape_1)
        group_norm = aten.alias.default(add_1)
        """,
        "mean_0", _group_norm, (random(8), random(8) * 2),
    ),
    Case(
        "batch_norm in eval", "aten_batch_norm_0", lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b),
        _two(((2, 8, 5), (3, 8, 4))),
        """
        reshape = aten.reshape.default(w0, [-1, 1])
        sub = aten.sub.Tensor(alias, reshape)
        add = aten.add.Tensor(w1, 1e-05)
        rsqrt = aten.rsqrt.default(add)
        reshape_1 = aten.reshape.default(rsqrt, [-1, 1])
        mul = aten.mul.Tensor(sub, reshape_1)
        reshape_2 = aten.reshape.default(w2, [-1, 1])
        mul_1 = aten.mul.Tensor(mul, reshape_2)
        reshape_3 = aten.reshape.default(w3, [-1, 1])
        add_1 = aten.add.Tensor(mul_1, reshape_3)
        batch_norm = aten.alias.default(add_1)
        """,
        "torch_rsqrt_0", _batch_norm, _CHANNELS,
    ),
    Case(
        "softmax", "aten_softmax_0", lambda x: F.softmax(x, -1), _two(((2, 5, 8), (3, 4, 6))),
        """
        amax = aten.amax.default(alias, [-1], True)
        sub = aten.sub.Tensor(alias, amax)
        exp = aten.exp.default(sub)
        sum_1 = aten.sum.dim_IntList(exp, [-1], True)
        div = aten.div.Tensor(exp, sum_1)
        softmax = aten.alias.default(div)
        """,
        "torch_exp_0", _softmax,
    ),
    Case(
        "log_softmax", "aten_log_softmax_0", lambda x: F.log_softmax(x, -1), _two(((2, 5, 8), (3, 4, 6))),
        """
        amax = aten.amax.default(alias, [-1], True)
        sub = aten.sub.Tensor(alias, amax)
        exp = aten.exp.default(sub)
        sum_1 = aten.sum.dim_IntList(exp, [-1], True)
        log = aten.log.default(sum_1)
        sub_1 = aten.sub.Tensor(sub, log)
        log_softmax = aten.alias.default(sub_1)
        """,
        "operator_sub_0", _log_softmax,
    ),
    Case(
        "linear", "aten_linear_0", lambda x, w, b: F.linear(x, w, b), _wide(8),
        """
        sym_size_int = aten.sym_size.int(alias, 1)
        sym_size_int_1 = aten.sym_size.int(alias, 0)
        mul_4 = operator.mul(sym_size_int_1, sym_size_int)
        view = aten.view.default(alias, [mul_4, 8])
        t = aten.t.default(w0)
        addmm = aten.addmm.default(w1, view, t)
        view_1 = aten.view.default(addmm, [sym_size_int_1, sym_size_int, 6])
        linear = aten.alias.default(view_1)
        """,
        "aten_addmm_0", lambda edit, x, w, b: edit(torch.addmm(b, x.flatten(0, 1), w.t())).view(*x.shape[:2], 6),
        (random(6, 8), random(6)), 0.0,
    ),
    Case(
        "addcmul", "aten_addcmul_0", lambda x, y: torch.addcmul(x, x, y, value=0.5),
        _two(((4, 6), (3, 5)), ((4, 6), (3, 5))),
        """
        mul = aten.mul.Tensor(alias, 0.5)
        mul_1 = aten.mul.Tensor(mul, alias_1)
        add = aten.add.Tensor(alias, mul_1)
        addcmul = aten.alias.default(add)
        """,
        "aten_mul_1", lambda edit, x, y: x + edit(x * 0.5 * y),
    ),
    Case(
        "cross_entropy", "aten_cross_entropy_loss_0", lambda x, y: F.cross_entropy(x, y),
        ((random(6, 8), _TARGETS[0]), (random(4, 5), _TARGETS[1])),
        """
        _log_softmax = aten._log_softmax.default(alias, 1, False)
        nll_loss_forward = aten.nll_loss_forward.default(_log_softmax, alias_1, None, 1, -100)
        getitem = operator.getitem(nll_loss_forward, 0)
        cross_entropy_loss = aten.alias.default(getitem)
        """,
        "aten__log_softmax_0", _cross_entropy, (), 0.0,
    ),
    Case(
        "glu", "aten_glu_0", lambda x: F.glu(x), _two(((2, 5, 8), (3, 4, 6))),
        """
        sym_size_int = aten.sym_size.int(alias, 2)
        floordiv = operator.floordiv(sym_size_int, 2)
        add = operator.add(0, floordiv)
        slice_1 = aten.slice.Tensor(alias, 2, 0, add)
        add_1 = operator.add(0, floordiv)
        add_2 = operator.add(add_1, floordiv)
        slice_2 = aten.slice.Tensor(alias, 2, add_1, add_2)
        sigmoid = aten.sigmoid.default(slice_2)
        mul = aten.mul.Tensor(slice_1, sigmoid)
        glu = aten.alias.default(mul)
        """,
        "aten_sigmoid_0", _glu, (), 0.0,
    ),
    Case(
        "hardswish", "aten_hardswish_0", lambda x: F.hardswish(x), _two(((2, 5, 8), (3, 4, 6))),
        """
        add = aten.add.Tensor(alias, 3)
        clamp = aten.clamp.default(add, 0)
        clamp_1 = aten.clamp.default(clamp, None, 6)
        mul = aten.mul.Tensor(alias, clamp_1)
        div = aten.div.Tensor(mul, 6)
        hardswish = aten.alias.default(div)
        """,
        "aten_clamp_1", lambda edit, x: x * edit((x + 3).clamp(0).clamp(max=6)) / 6, (), 0.0,
    ),
    Case(
        "one of several operators of a call", "aten_mse_loss_0", lambda x, y: F.mse_loss(x, y),
        _two(((4, 6), (3, 5)), ((4, 6), (3, 5))),
        """
        sub = aten.sub.Tensor(getitem, getitem_1)
        pow_1 = aten.pow.Tensor_Scalar(sub, 2)
        mean = aten.mean.default(pow_1)
        mse_loss = aten.alias.default(mean)
        """,
        "aten_pow_0", lambda edit, x, y: edit((x - y) ** 2).mean(),
    ),
)  # fmt: skip


def assert_addresses_stay(before: Program, after: Program) -> None:
    """Every address of a program names the same value in the one with more opened: node, operator, inputs, times."""
    old, new = Places(before, SourceReader()), Places(after, SourceReader())
    for call in before.book.calls:
        assert _facts(old, old.place(call)) == _facts(new, new.find(before.book.address(call)))
        for place in old.node_places(call).values():
            assert _facts(old, old.find(place.address)) == _facts(new, new.find(place.address))


def _facts(places: Places, place: Place) -> tuple[Any, ...]:
    node = places.program.nodes.get(place.key.removeprefix("%"))
    name = None if node is None else operator_name(node)
    return place.address, place.key, place.inputs, place.output, place.start, place.end, name
