"""``torch.compile(model, backend="fxsight", options={"edits": edited})``: edits inside Dynamo's graphs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsight import Model
from fxsight.backend import backend
from fxsight.errors import EditError


@pytest.fixture(autouse=True)
def _fresh() -> Generator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, size), nn.Linear(size, 4)
        self.drop, self.same = nn.Dropout(0.5), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.down(self.same(torch.tanh(self.up(self.norm(x))))))
        return out


class Net(nn.Module):
    def __init__(self, between: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = Block(8), Block(16), nn.Linear(4, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.between()
        h = self.b(h)
        out: Tensor = self.head(h)
        return out


def _x(rows: int = 3) -> Tensor:
    return torch.randn((rows, 4), generator=torch.Generator().manual_seed(rows))


def _compiled(net: nn.Module, edited: Model, **options: Any) -> Any:
    return torch.compile(net, backend=backend, options={"edits": edited, "inner": "eager", **options})


def _seeded(call: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(5)
    return call(*args)


def _hooked(net: nn.Module, path: str, change: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    handle = net.get_submodule(path).register_forward_hook(lambda m, args, out: change(out))
    try:
        return _seeded(net, x)
    finally:
        handle.remove()


def _keep_from_dynamo(part: Any) -> None:
    disable: Any = torch.compiler.disable
    part.forward = disable(part.forward)


def _break() -> None:
    torch._dynamo.graph_break()  # noqa: TID251


VECTOR = torch.linspace(-1, 1, 4)


def _steered(net: nn.Module, path: str = "b") -> Model:
    model = Model(net, cache=False)
    with model.edit(_x()) as edited:
        model.get(path).output[:] += VECTOR
    assert isinstance(edited, Model)
    return edited


@pytest.mark.parametrize("path", ["a", "b.norm", "b.down", "head"])
def test_numbers_of_hooks(path: str) -> None:
    net = Net().requires_grad_(False)
    vector = VECTOR[:2] if path == "head" else VECTOR
    model = Model(net, cache=False)
    with model.edit(_x()) as edited:
        model.get(path).output[:] += vector
    compiled = _compiled(net, edited)
    for training in (False, True):
        net.train(training)
        for rows in (3, 6, 1):
            got = _seeded(compiled, _x(rows))
            assert torch.equal(got, _hooked(net, path, lambda out: out + vector, _x(rows)))
            assert not torch.equal(got, _seeded(net, _x(rows)))


def test_reads_here_and_writes_there() -> None:
    net = Net().eval().requires_grad_(False)
    model = Model(net, cache=False)
    with model.edit(_x()) as edited:
        early = model.a.up.output[:, :4]
        model.b.input = model.b.input * 2
        model.b.down.output = early + model.b.norm.input
    compiled = _compiled(net, edited)
    for rows in (3, 5):
        x = _x(rows)
        h = net.a(x)
        want = net.head(h * 2 + (net.a.up(net.a.norm(x))[:, :4] + h * 2))
        assert torch.equal(compiled(x), want)


def test_gradients_and_tensors_of_the_edit() -> None:
    net = Net().eval()
    edited = _steered(net)
    (name,) = edited.edit_parameters
    edited.edit_parameters[name] = vector = VECTOR.clone().requires_grad_()
    compiled = _compiled(net, edited)
    compiled(_x()).sum().backward()
    assert vector.grad is not None
    assert torch.equal(vector.grad, (net.head.weight.sum(0) * 3).detach())
    found = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    _hooked(net, "b", lambda out: out + VECTOR, _x()).sum().backward()
    for n, p in net.named_parameters():
        assert p.grad is not None and torch.equal(found[n], p.grad)


def test_tensors_are_replaced_without_compiling() -> None:
    net = Net().eval().requires_grad_(False)
    edited, graphs = _steered(net), []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    compiled = _compiled(net, edited, inner=inner)
    for factor in (1, 2, 3):
        edited.edit_parameters[next(iter(edited.edit_parameters))] = vector = VECTOR * factor
        assert torch.equal(compiled(_x()), _hooked(net, "b", vector.add, _x()))
    assert len(graphs) == 1


def test_inductor() -> None:
    net = Net().eval().requires_grad_(False)
    edited = _steered(net)
    compiled = torch.compile(net, backend=backend, options={"edits": edited})
    for rows in (3, 5):
        torch.testing.assert_close(compiled(_x(rows)), _hooked(net, "b", lambda out: out + VECTOR, _x(rows)))


# -- graph breaks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a", "b", "b.down", "a.norm"])
def test_graph_breaks_survive(path: str) -> None:
    net = Net(_break).eval().requires_grad_(False)
    compiled = _compiled(net, _steered(net, path))
    for rows in (3, 5):
        assert torch.equal(compiled(_x(rows)), _hooked(net, path, lambda out: out + VECTOR, _x(rows)))


def test_edits_of_several_graphs() -> None:
    net = Net(_break).eval().requires_grad_(False)
    model = Model(net, cache=False)
    with model.edit(_x()) as once:
        model.a.output[:] += VECTOR
    with once.edit(_x()) as edited:
        model.output = model.output * 2
    assert isinstance(edited, Model)
    want = _hooked(net, "a", lambda out: out + VECTOR, _x()) * 2
    assert torch.equal(_compiled(net, edited)(_x()), want)


def test_an_edit_across_a_break() -> None:
    net = Net(_break).eval().requires_grad_(False)
    model = Model(net, cache=False)
    with model.edit(_x()) as edited:
        model.b.output = model.a.output
    compiled = _compiled(net, edited)
    for _ in range(2):
        with pytest.raises(EditError) as raised:
            compiled(_x())
        text = str(raised.value)
        assert "cannot be made in one graph of Dynamo's: a:output is in this one, and others are not" in text
        assert "b:output: not in this graph" in text and "edited.compile() makes every edit" in text


def test_no_graph() -> None:
    net = Net(_break).eval().requires_grad_(False)
    edited = _steered(net, "a")
    _keep_from_dynamo(net.a)
    with pytest.raises(EditError, match=r"the edit of a:output .* falls in no graph of Dynamo's"):
        _compiled(net, edited)(_x())


def test_the_end_is_kept_from_dynamo() -> None:
    net = Net().eval().requires_grad_(False)
    edited = Model(net, cache=False)
    with edited.edit(_x(), inplace=True):
        edited.head.output[:] *= 2
    _keep_from_dynamo(net.head)
    with pytest.raises(EditError, match=r"head is kept from it by torch\.compiler\.disable"):
        _compiled(net, edited)(_x())


def test_code_that_dynamo_shares() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.h:
                x = block(x)
                torch._dynamo.graph_break()  # noqa: TID251
            return x

    net = Deep().eval().requires_grad_(False)
    for path in ("h.0", "h.1", "h.2.down"):
        torch.compiler.reset()
        with pytest.raises(EditError, match=r"Dynamo runs the code that it has compiled for h.0 for h.[12] as well"):
            _compiled(net, _steered(net, path))(_x())


# -- what is refused -------------------------------------------------------------------------------------------------


def test_values_that_cannot_be_told() -> None:
    net = Net().eval().requires_grad_(False)
    model = Model(net, cache=False)
    with model.edit(_x()) as edited:
        model.b.same.output[:] = 0
    with pytest.raises(EditError, match=r"b\.same:output.* falls in no graph of Dynamo's") as raised:
        _compiled(net, edited)(_x())
    assert "this graph has a, a.down" in str(raised.value)


def test_a_module_that_returns_what_it_is_given() -> None:
    class Pass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.up(x)
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Pass()

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            out: Tensor = self.inner(h) + h
            return out

    net = Outer().eval().requires_grad_(False)
    with pytest.raises(EditError, match="does not return a value that an operator of it makes"):
        _compiled(net, _steered(net, "inner"))(_x())


def test_edits_that_change_later() -> None:
    net = Net().eval().requires_grad_(False)
    edited = _steered(net)
    compiled = _compiled(net, edited)
    compiled(_x())
    with edited.edit(_x(), inplace=True):
        edited.head.output[:] *= 2
    with pytest.raises(EditError, match=r"have changed since .* call torch.compiler.reset\(\)"):
        compiled(_x())
    torch.compiler.reset()
    assert torch.equal(compiled(_x()), _hooked(net, "b", lambda out: out + VECTOR, _x()) * 2)
    edited.edit_parameters.requires_grad_()
    with pytest.raises(EditError, match="has another shape, dtype or device"):
        compiled(_x())


def test_two_models_of_one_class() -> None:
    nets = [Net().eval().requires_grad_(False) for _ in range(2)]
    first, second = _compiled(nets[0], _steered(nets[0], "a")), _compiled(nets[1], _steered(nets[1], "b"))
    bare = torch.compile(nets[0], backend="eager")
    for _ in range(2):
        assert torch.equal(first(_x()), _hooked(nets[0], "a", lambda out: out + VECTOR, _x()))
        assert torch.equal(second(_x()), _hooked(nets[1], "b", lambda out: out + VECTOR, _x()))
        assert torch.equal(bare(_x()), nets[0](_x()))


def test_sizes_that_the_edit_looks_at() -> None:
    net = Net().eval().requires_grad_(False)
    model, rows = Model(net, cache=False), torch.arange(12.0).reshape(3, 4)
    with model.edit(_x()) as edited:
        model.a.output = model.a.output + rows
    compiled = _compiled(net, edited)
    assert torch.equal(compiled(_x()), _hooked(net, "a", lambda out: out + rows, _x()))
    with pytest.raises(EditError, match="cannot be made in this forward"):
        compiled(_x(5))
    assert torch.equal(compiled(_x()), _hooked(net, "a", lambda out: out + rows, _x()))


def test_too_many_graphs() -> None:
    net = Net().eval().requires_grad_(False)
    compiled = torch.compile(net, backend=backend, dynamic=False, options={"edits": _steered(net), "inner": "eager"})
    with pytest.raises(EditError, match=r"would run it without edits .* raise torch._dynamo.config.recompile_limit"):
        for rows in range(2, 20):
            assert torch.equal(compiled(_x(rows)), _hooked(net, "b", lambda out: out + VECTOR, _x(rows)))


@pytest.mark.parametrize(("given", "said"), [({}, "is given none"), ({"edits": "steer.json"}, "is given a str")])
def test_options(given: Any, said: str) -> None:
    options = {"inner": "eager", **given}
    with pytest.raises(EditError, match=rf"options=\{{\"edits\": edited\}}, and {said}.*load_edits"):
        torch.compile(Net(), backend=backend, options=options)(_x())
