"""Training parameters of the user's in a body: every loss and every parameter as with hooks, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxsight
from fxsight.errors import NeedsValueError, TraceError
from tests.zoo import tiny_transformer

How = Literal["hooks", "traces", "session"]


class Lora(nn.Module):
    """A low-rank addition to a module of width 8."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.down, self.up = nn.Parameter(torch.randn(8, 2, generator=random)), nn.Parameter(torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down @ self.up


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(x).tanh())
        return out


def _net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def _batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(2)
    rows = [(torch.randn(8, generator=random), i % 3) for i in range(count * 3)]
    return [(x, y) for x, y in DataLoader(rows, batch_size=3)]  # type: ignore[arg-type]


def _step(model: Any, lora: Lora, x: Tensor, y: Tensor) -> Any:
    inner = model.inner
    inner.output = inner.output + lora(inner.input)
    loss = nn.functional.cross_entropy(model.output, y)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def _train(how: How, optimizer: type[torch.optim.Optimizer]) -> tuple[list[float], list[Tensor]]:
    net, lora, losses = _net(), Lora(), list[Any]()
    model: Any = fxsight.Model(net, cache=False)
    steps = optimizer(lora.parameters(), lr=0.1)  # type: ignore[call-arg]

    def done() -> None:
        steps.step()
        steps.zero_grad()

    if how == "session":
        with model.session() as session:
            for x, y in session.iter(_batches()):
                with model.trace(x):
                    losses.append(_step(model, lora, x, y).save())
                done()
    for x, y in _batches() if how != "session" else ():
        if how == "hooks":
            handle = net.inner.register_forward_hook(lambda module, args, output: output + lora(args[0]))
            losses.append(nn.functional.cross_entropy(net(x), y))
            losses[-1].backward()
            handle.remove()
        else:
            with model.trace(x):
                losses.append(_step(model, lora, x, y).save())
        done()
    return [float(loss.detach()) for loss in losses], [p.detach() for p in lora.parameters()]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("how", ["traces", "session"])
def test_a_lora_learns_as_with_hooks(how: How, optimizer: type[torch.optim.Optimizer]) -> None:
    expected, weights = _train("hooks", optimizer)
    losses, learned = _train(how, optimizer)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, learned, strict=True))
    assert losses[-1] != losses[0]


def test_a_step_that_repeats_is_neither_recorded_nor_compiled_again() -> None:
    model: Any = fxsight.Model(_net(), cache=False)
    lora, programs = Lora(), list[Any]()
    for x, y in _batches():
        with model.trace(x) as tracer:
            _step(model, lora, x, y)
        programs.append((tracer.program.program, tracer._recorder))
    assert all(program is programs[0][0] for program, _ in programs)
    assert [recorder is None for _, recorder in programs] == [False, True, True, True]


def test_what_requires_a_gradient_is_asked_each_time() -> None:
    net = _net()
    model: Any = fxsight.Model(net, cache=False)
    lora = Lora()
    (x, y), *_ = _batches()
    for frozen in (True, False, True, False):
        net.requires_grad_(not frozen)
        lora.down.requires_grad_(frozen)
        with model.trace(x):
            _step(model, lora, x, y)
        assert (net.outer.weight.grad is None) == frozen
        assert (lora.down.grad is None) != frozen
        net.zero_grad()
        lora.zero_grad()


def test_gradients_add_up_until_they_are_taken_away() -> None:
    model: Any = fxsight.Model(_net(), cache=False)
    lora = Lora()
    (x, y), *_ = _batches()
    seen: list[Tensor] = []
    for _ in range(2):
        with model.trace(x):
            _step(model, lora, x, y)
        assert lora.up.grad is not None
        seen.append(lora.up.grad.clone())
    assert torch.equal(seen[1], seen[0] + seen[0])


def test_a_steering_vector_that_is_computed_outside() -> None:
    net = _net()
    model: Any = fxsight.Model(net, cache=False)
    direction, scale = torch.randn(8, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    (x, _), *_ = _batches()
    net.outer(((net.inner(x)) + direction / direction.norm() * scale).tanh()).sum().backward()
    expected = direction.grad, scale.grad
    direction.grad = scale.grad = None
    with model.trace(x):
        model.inner.output = model.inner.output + direction / direction.norm() * scale
        model.output.sum().backward()
    assert torch.equal(direction.grad, expected[0])  # type: ignore[arg-type]
    assert torch.equal(scale.grad, expected[1])  # type: ignore[arg-type]


def test_the_model_and_its_input_may_learn() -> None:
    net = _net().requires_grad_(True)
    model: Any = fxsight.Model(net, cache=False)
    (x, _), *_ = _batches()
    x.requires_grad_()
    net(x).pow(2).sum().backward()
    expected = [x.grad, *(p.grad for p in net.parameters())]
    x.grad = None
    net.zero_grad()
    with model.trace(x):
        model.output.pow(2).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip([x.grad, *(p.grad for p in net.parameters())], expected, strict=True))  # type: ignore[arg-type]


def test_only_the_leaves_that_are_named() -> None:
    net = _net().requires_grad_(True)
    model: Any = fxsight.Model(net, cache=False)
    (x, _), *_ = _batches()
    with model.trace(x):
        model.output.sum().backward(inputs=[net.outer.weight])
    assert net.outer.weight.grad is not None
    assert net.inner.weight.grad is None


def test_tied_weights_get_one_gradient() -> None:
    net = tiny_transformer().eval()
    ids = torch.randint(0, 10, (2, 5))
    net(ids).pow(2).sum().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    model: Any = fxsight.Model(net, cache=False)
    with model.trace(ids):
        model.output.pow(2).sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in net.named_parameters())  # type: ignore[arg-type]


def test_a_block_that_is_written_once_gives_no_gradients_away() -> None:
    model: Any = fxsight.Model(_net(), cache=False)
    lora = Lora()
    message = r"backward\(\) gives a .grad to tensors of yours, and this block is written once for all elements"
    inputs = [x for x, _ in _batches()]
    with (
        pytest.raises(TraceError, match=message),
        model.session() as session,
        session.iter(inputs) as x,
        model.trace(x),
    ):
        model.inner.output = model.inner.output + lora(model.inner.input)
        model.output.sum().backward()


@pytest.mark.parametrize(
    "loss", [lambda out, y: nn.functional.cross_entropy(out, y), lambda out, y: out[:, 0] + y, lambda out, y: y + out]
)
def test_targets_are_not_known_in_a_block_that_is_written_once(loss: Callable[[Any, Any], Any]) -> None:
    model: Any = fxsight.Model(_net(), cache=False)
    with (
        pytest.raises(NeedsValueError, match=r"an argument of a torch call; write `for item in session.iter"),
        model.session() as session,
        session.iter([(x, torch.zeros(len(x), dtype=torch.long)) for x, _ in _batches()]) as batch,
        model.trace(batch[0]),
    ):
        loss(model.output, batch[1]).save()


def test_gradients_in_a_block_that_is_written_once() -> None:
    model: Any = fxsight.Model(_net(), cache=False)
    kept: list[Any] = []
    with model.session() as session, session.iter([torch.ones(3, 8), torch.ones(1, 8), torch.ones(2, 8)]) as x:
        with model.trace(x):
            model.output.sum().backward()
            gradient = model.inner.output.grad.save()
        session.do(lambda now: kept.append(gradient.shape))
    assert kept == [(3, 8), (1, 8), (2, 8)]


# ------------------------------------------------------------------------------------- what stays differentiable after


def test_saved_values_are_differentiable_outside() -> None:
    net = _net().requires_grad_(True)
    model: Any = fxsight.Model(net, cache=False)
    (x, _), *_ = _batches()
    vector = torch.randn(8, requires_grad=True)
    with model.trace(x):
        model.inner.output = model.inner.output + vector
        out = model.output.save()
    out.sum().backward()
    found = [p.grad for p in net.parameters()] + [vector.grad]
    vector.grad = None
    net.zero_grad()
    net.outer((net.inner(x) + vector).tanh()).sum().backward()
    expected = [p.grad for p in net.parameters()] + [vector.grad]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_nothing_is_kept_under_no_grad_and_after_a_backward_pass() -> None:
    net = _net().requires_grad_(True)
    model: Any = fxsight.Model(net, cache=False)
    (x, _), *_ = _batches()
    with torch.no_grad(), model.trace(x):
        out = model.output.save()
    with model.trace(x):
        after = model.output.save()
        after.sum().backward()
    assert not out.requires_grad
    assert not after.requires_grad
