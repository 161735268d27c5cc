"""Many places with one expression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsight import Model
from fxsight.errors import SelectionError
from fxsight.selectors import calls, layers, of, path


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


class Wide(Mlp):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList([Mlp(), Wide(), Mlp()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        for block in self.h:
            x = x + block(x)
        return torch.tanh(self.head(x))


def _x() -> Tensor:
    return torch.randn((3, 4), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Model:
    return Model(Net().requires_grad_(False), cache=False)


def test_modules(model: Model) -> None:
    def paths(selector: Any) -> list[str]:
        return [view.path for view in model.select(selector)]

    assert paths(of(Mlp)) == ["h.0", "h.1", "h.2"]
    assert paths(of("Wide")) == ["h.1"]
    assert paths(of(nn.Linear) & ~layers(0, 2)) == ["h.1.up", "h.1.down", "head"]
    assert paths(path("h.*.up") | path("head")) == ["h.0.up", "h.1.up", "h.2.up", "head"]
    assert paths(path("**.down") & layers(range(1, 3))) == ["h.1.down", "h.2.down"]
    assert paths(layers([1]) & ~of(nn.Linear)) == ["h.1"]
    assert [view.path for view in model.h[1].select(of(nn.Linear))] == ["h.1.up", "h.1.down"]


def test_in_an_edit_and_in_a_trace(model: Model) -> None:
    with model.edit(_x()) as edited:
        for block in edited.select(of(Mlp) & layers(1, 2)):
            block.output = block.output * 0
    with model.trace(_x()):
        for view in model.select(of(Mlp) & layers(1, 2)):
            view.output[:] = 0
        out = model.output.save()
    assert torch.equal(edited(_x()), out)
    net = model._module
    assert torch.equal(out, torch.tanh(net.head(_x() + net.h[0](_x()))))


def test_operations(model: Model) -> None:
    model.capture(_x())
    found = model.select(calls("relu") & layers(0, 1))
    assert [str(op.address) for op in found] == ["h.0/torch_relu_0", "h.1/torch_relu_0"]
    assert model.select(calls(torch.tanh))[0].address == model.ops.torch_tanh_0.address
    with model.edit() as edited:
        for op in model.select(calls("relu")):
            op.output = torch.tanh(op.input)
    assert not torch.equal(edited(_x()), model(_x()))


def test_empty_and_wrong(model: Model) -> None:
    model.capture(_x())
    for selector, told in [
        (of("Mpl"), r"of\(Mpl\) selects nothing; did you mean 'Mlp'"),
        (path("h.*.upp"), r"path\('h.\*.upp'\) selects nothing; did you mean"),
        (layers(7), r"layers\(7\) selects nothing; 12 places were looked at"),
        (of(nn.Linear) & layers(9), r"selects nothing; 12 places"),
        (of(Wide) & layers(0), r"of\(Wide\) and layers\(0\) select something, and nothing in common"),
        (calls("gelu"), r"calls\('gelu'\) selects nothing; "),
    ]:
        with pytest.raises(SelectionError, match=told):
            model.select(selector)
    with pytest.raises(SelectionError, match=r"not a selector: 'h.0'; write of\(...\), path\(...\)"):
        model.select("h.0")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match=r"layers\(\): give numbers of blocks, from 0"):
        layers()
    with pytest.raises(SelectionError, match=r"of\(3\): give a class of modules, or its name"):
        of(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"combine with &, | and ~, not with and, or and not"):
        assert of(Mlp) and layers(0)
