"""``edited.compile()``: an ``nn.Module`` that other people's code takes for the model, with the edits in it."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fxsight import Model
from fxsight.errors import TraceError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.drop, self.down = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        h = self.drop(torch.relu(self.up(x)))
        return {"out": self.down(h) * scale if not self.training else h}

    def twice(self, x: Tensor) -> Any:
        return self(x)["out"] * 2


def _x(rows: int = 3) -> Tensor:
    return torch.randn((rows, 4), generator=torch.Generator().manual_seed(rows))


def _edited(net: nn.Module) -> Model:
    model = Model(net, cache=False)
    with model.edit(_x()) as edited:
        model.up.output += edited_vector()
    assert isinstance(edited, Model)
    return edited


def edited_vector() -> Tensor:
    return torch.linspace(-1, 1, 8)


def _hooked(net: nn.Module, *args: Any, **kwargs: Any) -> Any:
    handle = net.get_submodule("up").register_forward_hook(lambda m, a, out: out + edited_vector())
    try:
        return net(*args, **kwargs)
    finally:
        handle.remove()


def test_the_module_in_all_but_its_call() -> None:
    net = Net().eval().requires_grad_(False)
    edited = _edited(net)
    module = edited.compile(backend="eager")
    assert isinstance(module, Net) and type(module).__name__ == "Net"
    assert inspect.signature(module.forward) == inspect.signature(net.forward)
    assert module.state_dict().keys() == net.state_dict().keys()
    for rows in (3, 6):
        assert torch.equal(module(_x(rows))["out"], _hooked(net, _x(rows))["out"])
    assert torch.equal(module(_x(), scale=3.0)["out"], _hooked(net, _x(), scale=3.0)["out"])
    assert torch.equal(module.twice(_x()), _hooked(net, _x())["out"] * 2)
    assert torch.equal(net(_x())["out"], Net().eval()(_x())["out"])


def test_state_is_shared() -> None:
    net = Net().eval().requires_grad_(False)
    edited = _edited(net)
    module = edited.compile(backend="eager")
    module.load_state_dict({name: tensor * 2 for name, tensor in net.state_dict().items()})
    assert torch.equal(module(_x())["out"], _hooked(net, _x())["out"])
    assert module.train() is module and net.training and net.drop.training
    torch.manual_seed(1)
    got = module(_x())["out"]
    torch.manual_seed(1)
    assert torch.equal(got, _hooked(net, _x())["out"]) and got.shape == (3, 8)
    module.eval().to(torch.float64)
    assert net.up.weight.dtype == torch.float64
    module.float()
    edited.edit_parameters[next(iter(edited.edit_parameters))] = torch.zeros(8)
    assert torch.equal(module(_x())["out"], net(_x())["out"])


def test_inside_another_module() -> None:
    net = Net().eval().requires_grad_(False)
    outer = nn.Sequential(_edited(net).compile(backend="eager"))
    assert torch.equal(outer(_x())["out"], _hooked(net, _x())["out"])
    assert [name for name, _ in outer.named_parameters()] == [f"0.{name}" for name, _ in net.named_parameters()]


def test_inductor() -> None:
    net = Net().eval().requires_grad_(False)
    module = _edited(net).compile()
    for rows in (3, 5, 8):
        torch.testing.assert_close(module(_x(rows))["out"], _hooked(net, _x(rows))["out"])


def test_gradients_flow() -> None:
    net, twin = Net().eval(), Net().eval()
    _edited(net).compile()(_x())["out"].sum().backward()
    _hooked(twin, _x())["out"].sum().backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_what_cannot_be() -> None:
    edited = _edited(Net().eval())
    module = edited.compile()
    for how in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TraceError, match="cannot be copied or pickled: copy the Model, and compile the copy"):
            how(module)
    with pytest.raises(TraceError, match="no backend 'fast'; one of auto, eager, inductor"):
        edited.compile(backend="fast")


@pytest.mark.slow
def test_generate() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval().requires_grad_(False)
    model, vector = Model(net, cache=False), torch.linspace(-3, 3, 16)
    ids = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    with model.edit(ids) as edited:
        model.transformer.h[1].output[:] += vector
    module = edited.compile(backend="eager")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    got = module.generate(ids, **options)
    handle = net.transformer.h[1].register_forward_hook(lambda m, a, out: out + vector)
    want = net.generate(ids, **options)
    handle.remove()
    assert torch.equal(got, want)
    assert not torch.equal(got, net.generate(ids, **options))
