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


def test_in_find(model: Model) -> None:
    model.capture(_x())

    def found(selector: Any, **others: Any) -> list[str]:
        return [str(op.address) for op in model.ops.find(selector, **others)]

    assert found("op:relu and layer:0-1") == found(calls(torch.relu) & layers(0, 1))
    assert found("op:relu", recursive=True) == ["h.0/torch_relu_0", "h.1/torch_relu_0", "h.2/torch_relu_0"]
    assert found("op:aten.relu.*") == found("op:relu") == found(calls(torch.ops.aten.relu.default))
    assert found("op:self_*_0 and class:Wide") == ["h.1/self_up_0", "h.1/self_down_0"]
    assert found("layer:1", name="self_*") == ["h.1/self_up_0", "h.1/self_down_0"]
    assert found("op:tanh", shape=(99,)) == []
    assert [op.name for op in model.h[2].ops.find("op:Linear")] == ["self_up_0", "self_down_0"]
    with pytest.raises(SelectionError, match="op:rleu selects nothing; did you mean 'relu'"):
        found("op:rleu")
    with pytest.raises(TypeError, match=r"find what\? Give a selector, or at least one of name="):
        model.ops.find()


def test_empty_and_wrong(model: Model) -> None:
    model.capture(_x())
    for selector, told in [
        (of("Mpl"), "class:Mpl selects nothing; did you mean 'Mlp'"),
        (of("Mpl") | path("nowhere"), r"class:Mpl: did you mean 'Mlp'\?; path:nowhere: paths are such as 'h', 'h.0'"),
        (path("h.*.upp"), r"path:h.\*.upp selects nothing; did you mean"),
        (layers(7), "layer:7 selects nothing; blocks are numbered 0-2"),
        (of(nn.Linear) & layers(9), "selects nothing; layer:9 alone selects nothing: blocks are numbered 0-2"),
        (of(Wide) & layers(0), "and layer:0 selects nothing; class:.*Wide selects 'h.1', and layer:0 none of these"),
        (of(nn.Linear) & path("head") & layers(0), "Linear and path:head selects 'head', and layer:0 none of these"),
        (~of(nn.Module), r"not class:.*Module selects all that was looked at, '', 'h', 'h.0' and 9 more"),
        (calls("gelu"), "op:gelu selects nothing; did you mean 'relu'"),
    ]:
        with pytest.raises(SelectionError, match=told):
            model.select(selector)
    with pytest.raises(SelectionError, match=r"not a selector: 3; write a text, such as class:GPT2Block, path:h"):
        model.select(3)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match=r"layers\(\): give numbers of blocks, from 0"):
        layers()
    with pytest.raises(
        SelectionError, match=r"layers\(range\(0, 1000000000000\),\): give numbers .* 0 to 99999, not 1"
    ):
        layers(range(10**12))
    with pytest.raises(SelectionError, match=r"of\(3\): give a class of modules, or its name"):
        of(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"combine with &, | and ~, not with and, or and not"):
        assert of(Mlp) and layers(0)
