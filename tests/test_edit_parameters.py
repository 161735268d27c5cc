"""The tensors of edits: looked at, replaced, moved and trained, without compiling anything again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxsight import Model
from fxsight.errors import EditError


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def _x(rows: int = 3) -> Tensor:
    return torch.randn((rows, 4), generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def model() -> Model:
    return Model(_net().requires_grad_(False), cache=False)


def _steered(model: Model, vector: Tensor, name: str = "steer") -> Model:
    with model.edit(_x(), parameters={name: vector}) as edited:
        model[0].output += vector
    assert isinstance(edited, Model)
    return edited


def _want(model: Model, vector: Tensor, x: Tensor) -> Tensor:
    net = model._module
    out: Tensor = net[2](net[1](net[0](x) + vector))
    return out


def test_names(model: Model) -> None:
    a, b = torch.ones(4), torch.full((4,), 2.0)
    with model.edit(_x()) as edited:
        model[0].output = model[0].output * a + b
        model[2].input[:, 0] = torch.zeros(())
    assert list(edited.edit_parameters) == ["0.output.0", "0.output.1", "2.input.0"]
    assert repr(edited.edit_parameters) == "0.output.0: f32[4]\n0.output.1: f32[4]\n2.input.0: f32[]"
    assert edited.edit_parameters["0.output.1"] is b
    with edited.edit(_x(), parameters={"b": b}) as twice:
        edited[0].output += b
    with twice.edit(_x(), parameters={"b": b}) as thrice:
        edited[0].output += b
    assert list(thrice.edit_parameters)[-2:] == ["b", "b_1"]
    with pytest.raises(KeyError, match=r"no tensor '0.output.3' in the edits; did you mean '0.output.1'"):
        edited.edit_parameters["0.output.3"]
    with pytest.raises(KeyError, match="they have no tensors"):
        model.edit_parameters["b"]


def test_replace(model: Model) -> None:
    edited = _steered(model, torch.ones(4))
    for vector in (torch.zeros(4), torch.full((4,), 3.0), torch.ones(8)[::2]):
        edited.edit_parameters["steer"] = vector
        assert torch.equal(edited(_x()), _want(model, vector, _x()))
        with edited.trace(_x()):
            out = edited.output.save()
        assert torch.equal(out, _want(model, vector, _x()))
    edited.edit_parameters["steer"].mul_(2)
    assert torch.equal(edited(_x()), _want(model, 2 * torch.ones(4), _x()))


def test_nothing_is_compiled_again(model: Model) -> None:
    edited = _steered(model, torch.ones(4))
    edited(_x())
    with edited.trace(_x()):
        edited.output.save()
    made = set(model._captures._executables.values())
    edited.edit_parameters["steer"] = torch.zeros(4)
    edited(_x())
    edited(_x(7))
    with edited.trace(_x()) as tracer:
        out = edited.output.save()
    assert set(model._captures._executables.values()) == made
    assert tracer._recorder is None or tracer._finished is None
    assert torch.equal(out, model._module(_x()))


def test_replaced_by_a_weight_and_back(model: Model) -> None:
    """What was bound by name is not mistaken for a tensor, nor a shared tensor for two."""
    edited = _steered(model, torch.ones(4))
    bias = model._module[0].bias
    edited.edit_parameters["steer"] = bias
    assert torch.equal(edited(_x()), _want(model, bias, _x()))
    edited.edit_parameters["steer"] = torch.zeros(4)
    assert torch.equal(edited(_x()), _want(model, torch.zeros(4), _x()))
    same = torch.ones(4)
    with model.edit(_x(), parameters={"a": same}) as one:
        model[0].output += same
    with one.edit(_x(), parameters={"b": same}) as two:
        one[0].output *= same
    two(_x())
    two.edit_parameters["b"] = torch.zeros(4)
    assert torch.equal(two(_x()), _want(model, torch.zeros(4), 0 * _x()) * 0 + model._module[2](torch.zeros(3, 4)))


def test_wrong_tensors(model: Model) -> None:
    edited = _steered(model, torch.ones(4))
    with pytest.raises(EditError, match=r"the tensor 'steer' of an edit is f32\[4\], and is given f32\[5\]"):
        edited.edit_parameters["steer"] = torch.ones(5)
    with pytest.raises(EditError, match=r"is given f64\[4\]"):
        edited.edit_parameters["steer"] = torch.ones(4, dtype=torch.float64)
    with pytest.raises(EditError, match="is given a float"):
        edited.edit_parameters["steer"] = 1.0  # type: ignore[assignment]
    with pytest.raises(EditError, match=r"belongs to an edit, which needs it; model.clear_edits\(\)"):
        del edited.edit_parameters["steer"]


def test_copies_have_their_own(model: Model) -> None:
    edited = _steered(model, torch.ones(4))
    with edited.edit(_x()) as twice:
        edited[2].output *= 1
    twice.edit_parameters["steer"] = torch.zeros(4)
    assert torch.equal(edited.edit_parameters["steer"], torch.ones(4))
    assert torch.equal(edited(_x()), _want(model, torch.ones(4), _x()))
    assert torch.equal(twice(_x()), model._module(_x()))


@pytest.mark.parametrize("how", ["call", "trace"])
def test_train(model: Model, how: str) -> None:
    vector, twin = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    edited = _steered(model, vector)
    ours, theirs = torch.optim.Adam(edited.edit_parameters.values()), torch.optim.Adam([twin])
    for _ in range(3):
        if how == "call":
            out = edited(_x())
        else:
            with edited.trace(_x()):
                out = edited.output.save()
        for loss, step in ((out.square().sum(), ours), (_want(model, twin, _x()).square().sum(), theirs)):
            step.zero_grad()
            loss.backward()
            step.step()
        assert torch.equal(vector, twin)
    assert not torch.equal(vector, torch.zeros(4))


def test_move_and_freeze(model: Model) -> None:
    edited = _steered(model, torch.ones(4))
    assert edited.edit_parameters.requires_grad_()["steer"].requires_grad
    assert not edited.edit_parameters.requires_grad_(False)["steer"].requires_grad
    same = edited.edit_parameters["steer"]
    assert edited.edit_parameters.to("cpu")["steer"] is same
    assert edited.edit_parameters.to("meta")["steer"].device.type == "meta"


def test_module_s_training_sees_the_edits() -> None:
    net, twin = _net(), _net()
    edited = _steered(Model(net, cache=False), torch.ones(4))
    edited(_x()).sum().backward()
    twin[2](twin[1](twin[0](_x()) + torch.ones(4))).sum().backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
