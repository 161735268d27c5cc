"""Programs as straight-line Python: operators through torch's own bindings, values freed, the same bits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID251 - sees which operators run

from fxsight.direct import direct_calls
from fxsight.straight import straight

aten = torch.ops.aten
X, Y, I = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([[0, 1, 2, 3]] * 3)  # noqa: E741
Z, W = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
Q = torch.randn(1, 2, 3, 8)

# Arguments that captured programs give, all positions filled where a program may fill them.
EXAMPLES: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    aten.addmm.default: [((torch.randn(5), X, torch.randn(4, 5)), {}), ((X, X, torch.eye(4)), {"beta": 2, "alpha": 3})],
    aten.addbmm.default: [((torch.randn(3, 5), Z, W), {})],
    aten.argmax.default: [((X,), {}), ((X, -1, True), {})],
    aten.baddbmm.default: [((torch.randn(2, 3, 5), Z, W), {"beta": 0.5, "alpha": 0.25})],
    aten.bitwise_and.Tensor: [((X > 0, Y > 0), {})],
    aten.bitwise_or.Tensor: [((X > 0, Y > 0), {})],
    aten.bitwise_not.default: [((X > 0,), {})],
    aten.bmm.default: [((Z, W), {})],
    aten.cat.default: [(([X, Y],), {}), (([X, Y], -1), {})],
    aten.chunk.default: [((X, 2, -1), {})],
    aten.clamp.default: [((X, -0.5), {}), ((X, None, 0.5), {}), ((X,), {"min": 0})],
    aten.clone.default: [((X,), {}), ((X.T,), {"memory_format": torch.contiguous_format})],
    aten.conv1d.default: [((Z, torch.randn(6, 1, 2), torch.randn(6), [1], [1], [1], 3), {})],
    aten.contiguous.default: [((X.T,), {})],
    aten.cumsum.default: [((X, 1), {}), ((I, -1), {"dtype": torch.float32})],
    aten.embedding.default: [((X, torch.tensor([0, 2])), {}), ((X, torch.tensor([0, 2]), 1), {})],
    aten.expand.default: [((X, [2, 3, 4]), {}), ((X[:, :1], [-1, 4]), {})],
    aten.flatten.using_ints: [((Z, 1), {}), ((Z, 0, 1), {})],
    aten.gather.default: [((X, 1, I), {})],
    aten.gelu.default: [((X,), {}), ((X,), {"approximate": "tanh"})],
    aten.group_norm.default: [((Z.transpose(1, 2), 2, torch.ones(4), torch.zeros(4), 1e-5, False), {})],
    aten.index_select.default: [((X, 1, torch.tensor([1, 1])), {})],
    aten.layer_norm.default: [((X, [4], torch.ones(4), torch.zeros(4), 1e-5, False), {}), ((X, [4]), {})],
    aten.linear.default: [((X, Y), {}), ((X, Y, torch.randn(3)), {})],
    aten.masked_fill.Scalar: [((X, X > 0, -1e9), {})],
    aten.masked_fill.Tensor: [((X, X > 0, torch.tensor(1.0)), {})],
    aten.mean.dim: [((X, [-1], True), {}), ((X, [0]), {"dtype": torch.float64})],
    aten.matmul.default: [((Z, W), {})],
    aten.mm.default: [((X, Y.T), {})],
    aten.permute.default: [((Z, [2, 0, 1]), {})],
    aten.pow.Tensor_Scalar: [((X, 2), {}), ((X, 3.0), {})],
    aten.pow.Tensor_Tensor: [((X.abs(), Y), {})],
    aten.repeat_interleave.self_int: [((X, 2, 1), {})],
    aten.reshape.default: [((Z, [2, -1]), {}), ((Z.transpose(1, 2), [-1, 3]), {})],
    aten.rms_norm.default: [((X, [4], torch.ones(4), 1e-6), {})],
    aten.roll.default: [((X, [1], [0]), {})],
    aten.scaled_dot_product_attention.default: [
        ((Q, Q, Q), {"scale": 0.25}),
        ((Q, Q, Q, None, 0.0, True), {}),
        ((Q, Q[:, :1], Q[:, :1]), {"attn_mask": torch.ones(3, 3, dtype=torch.bool), "enable_gqa": True}),
    ],
    aten.softmax.int: [((X, -1), {}), ((X, -1, torch.float64), {})],
    aten.softplus.default: [((X,), {}), ((X, 2.0, 10.0), {})],
    aten.split.Tensor: [((X, 2, 1), {}), ((X, 2), {})],
    aten.split_with_sizes.default: [((X, [1, 3], -1), {})],
    aten.squeeze.dim: [((X[:, :1], 1), {})],
    aten.stack.default: [(([X, Y], -1), {})],
    aten.sum.dim_IntList: [((X, [-1], True), {}), ((X, [0, 1]), {"dtype": torch.float64})],
    aten.sym_size.int: [((X, 1), {}), ((X, -2), {})],
    aten.to.dtype: [((X, torch.float16), {}), ((X, torch.float32), {}), ((X, torch.float32, False, True), {})],
    aten.topk.default: [((X, 2, -1, True, True), {})],
    aten.transpose.int: [((Z, 1, 2), {})],
    aten.tril.default: [((X, -1), {})],
    aten.triu.default: [((X, 1), {})],
    aten.type_as.default: [((X, I), {}), ((X, Y), {})],
    aten.unsqueeze.default: [((X, 1), {})],
    aten.view.default: [((X, [-1, 2]), {}), ((X, [12]), {})],
    aten.where.self: [((X > 0, X, Y), {}), ((X > 0, X, torch.tensor(0.0)), {})],
    **{op: [((X,), {})] for op in (aten.abs.default, aten.cos.default, aten.exp.default, aten.neg.default)},
    **{op: [((X,), {})] for op in (aten.reciprocal.default, aten.relu.default, aten.sigmoid.default)},
    **{op: [((X,), {})] for op in (aten.silu.default, aten.sin.default, aten.square.default, aten.tanh.default)},
    **{op: [((X.abs(),), {})] for op in (aten.log.default, aten.rsqrt.default, aten.sqrt.default)},
    **{op: [((X > 0, Y > 0), {})] for op in (aten.logical_and.default, aten.logical_or.default)},
    aten.logical_not.default: [((X > 0,), {})],
    **{op: [((X, Y), {}), ((X, 2), {}), ((I, 0.5), {})] for op in (aten.mul.Tensor, aten.div.Tensor)},
    **{op: [((X, Y), {"alpha": 2}), ((X, 0.5), {}), ((I, True), {})] for op in (aten.add.Tensor, aten.sub.Tensor)},
    **{getattr(aten, n).Tensor: [((X, Y), {})] for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{getattr(aten, n).Scalar: [((X, 0.5), {}), ((I, 1), {})] for n in ("eq", "ne", "lt", "le", "gt", "ge")},
}
EXAMPLES[aten.sub.Tensor] = EXAMPLES[aten.sub.Tensor][:2]


class Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func, _plain(args), _plain(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape), value.stride())
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def _logged(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    with Log() as log, torch.no_grad():
        return call(*args, **kwargs), log.seen


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for x in value:
            yield from _leaves(x)
    else:
        yield value


@pytest.mark.parametrize("operator", list(direct_calls()), ids=str)
def test_a_binding_runs_its_operator_and_no_other(operator: Any) -> None:
    for args, kwargs in EXAMPLES[operator]:
        expected, log = _logged(operator, args, kwargs)
        found, seen = _logged(direct_calls()[operator], args, kwargs)
        assert seen == log
        for a, b in zip(_leaves(found), _leaves(expected), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, Tensor) else a == b
            assert any(a is x for x in args) == any(b is x for x in args)


@pytest.mark.parametrize("operator", list(direct_calls()), ids=str)
def test_every_position_is_taken(operator: Any) -> None:
    """An operator called with all its arguments by position, as passes and captures may call it."""
    args, kwargs = EXAMPLES[operator][0]
    places = [a for a in operator._schema.arguments if not a.kwarg_only]
    full = [*args, *(a.default_value for a in places[len(args) :])]
    rest = {name: value for name, value in kwargs.items() if name not in [a.name for a in places]}
    graph = fx.Graph()
    graph.output((graph.call_function(operator, tuple(full), rest),))
    (found,) = straight(graph)()
    for a, b in zip(_leaves(found), _leaves(operator(*full, **rest)), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("operator", list(direct_calls()), ids=str)
def test_gradients_come_from_the_same_formula(operator: Any) -> None:
    for args, kwargs in EXAMPLES[operator]:
        names = []
        for call in (operator, direct_calls()[operator]):
            given = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
            results = [x for x in _leaves(call(*given, **kwargs)) if isinstance(x, Tensor)]
            names.append([x.grad_fn.name() if x.grad_fn is not None else "" for x in results])
        assert names[0] == names[1]


def _graph(write: Callable[[fx.Graph, fx.Node], Any]) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(tuple(write(graph, x)))
    return graph


def test_arguments_of_every_kind() -> None:
    def write(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
        rows = graph.call_function(aten.sym_size.int, (x, 0))
        places: Any = (slice(1, rows, None), [0, 2], None, ...)
        part = graph.call_function(torch.Tensor.__getitem__, (x, places))
        inf = graph.call_function(aten.clamp.default, (x, -float("inf"), float("inf")))
        made = graph.call_function(torch.zeros, ((rows, 2),), {"dtype": torch.float16, "device": torch.device("cpu")})
        text = graph.call_function(torch.einsum, ("ij->ji", [x]))
        return [part, inf, made, text]

    x = torch.randn(3, 4)
    part, inf, made, text = straight(_graph(write))(x)
    assert torch.equal(part, x[1:3, [0, 2], None, ...])
    assert torch.equal(inf, x) and torch.equal(text, x.T)
    assert made.dtype == torch.float16 and made.shape == (3, 2)


def test_an_operator_that_returns_its_argument_is_not_called() -> None:
    def write(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
        first = graph.call_function(aten.dropout.default, (x, 0.5, False))
        graph.call_function(aten.add_.Tensor, (first, 1))
        last = graph.call_function(aten.dropout.default, (first, 0.5, True))
        return [first, graph.call_function(aten.mul.Tensor, (first, 2)), last]

    x = torch.zeros(2)
    with Log() as log, torch.no_grad():
        first, twice, last = straight(_graph(write))(x)
    assert first is x and torch.equal(first, torch.ones(2)) and torch.equal(twice, torch.full((2,), 2.0))
    assert last is not x and len(log.seen) > 2


def test_values_go_after_their_last_use() -> None:
    made: list[weakref.ref[Tensor]] = []

    def look(x: Tensor) -> Tensor:
        assert [r() is x for r in made if r() is not None] == [True] * bool(made)  # all but the argument are gone
        result = x + 1
        made.append(weakref.ref(result))
        return result

    def write(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
        first = graph.call_function(look, (x,))
        second = graph.call_function(look, (graph.call_function(aten.dropout.default, (first, 0.1, False)),))
        third = graph.call_function(look, (graph.call_function(aten.dropout.default, (second, 0.1, False)),))
        graph.call_function(look, (third,))  # of no use
        return [graph.call_function(aten.sum.default, (x,))]

    assert straight(_graph(write))(torch.zeros(2)) == [torch.tensor(0.0)]
    assert len(made) == 4 and all(r() is None for r in made)


def test_every_line_can_be_read() -> None:
    """A name of the graph never meets a name of ours."""
    graph = fx.Graph()
    x, f0 = graph.placeholder("v1"), graph.placeholder("f0")
    graph.output((graph.call_function(aten.add.Tensor, (x, f0), {"alpha": 2}),))
    assert straight(graph)(torch.ones(1), torch.ones(1)) == [torch.tensor([3.0])]
