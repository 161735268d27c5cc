"""What differs between two programs: as data, as text, and what it costs."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight import Model
from fxsight.capture import capture
from fxsight.errors import TextError


class Net(nn.Module):
    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.deep = nn.Linear(4, 8), nn.Linear(8, 2), deep

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.up(x))
        return self.down(torch.tanh(h) if self.deep else h)


def _x() -> Tensor:
    return torch.ones(3, 4)


def _model() -> Model:
    return Model(Net().requires_grad_(False), cache=False)


def _shown(found: fxsight.Diff) -> str:
    return re.sub(r"  \S*/(\w+\.py):\d+", r"  \1", str(found))


def test_edited() -> None:
    model = _model()
    with model.edit(_x(), parameters={"steer": torch.ones(8)}) as edited:
        model.up.output = model.up.output * 2
    found = edited.diff()
    assert _shown(found) == (
        "# 1 added, 0 removed, 1 rewired\n"
        "# +1 operators, +24 FLOPs of 312, +96 bytes of 216, at x0 = 3\n"
        "+ user_mul = torch.Tensor.mul(linear, 2)    # f32[3, 8]  test_diff.py\n"
        "~ relu = aten.relu.default(user_mul)    # f32[x0, 8]  /torch_relu_0  test_diff.py\n"
        "      was relu = aten.relu.default(linear)"
    ).replace("x0", next(iter(found.sizes)))
    assert [change.kind for change in found.changes] == ["added", "rewired"]
    assert found.of("added")[0].line.endswith(f"test_diff.py:{test_edited.__code__.co_firstlineno + 3}")
    assert edited.diff(torch.ones(5, 4)).sizes == {next(iter(found.sizes)): 5}


def test_nothing() -> None:
    found = _model().diff(_x())
    assert not found and str(found) == "no difference" and found.before == found.after


def test_removed_and_returned() -> None:
    model = _model()
    with model.edit(_x()) as edited:
        model.output = model.down.output * 0
        model.up.skip(torch.zeros(3, 8))
    found = edited.diff()
    assert [change.call.partition(" = ")[2].partition("(")[0] for change in found.of("removed")] == [
        "aten.linear.default"
    ]
    assert any(change.call.startswith("return") for change in found.of("rewired"))


def test_two_versions_of_a_model() -> None:
    a, b = capture(Net(), (_x(),), {}), capture(Net(deep=True), (_x(),), {})
    found = fxsight.diff(a, b)
    assert [c.call.partition(" = ")[2].partition("(")[0] for c in found.of("added")] == ["aten.tanh.default"]
    assert found.of("removed") == ()
    assert found.of("rewired")[0].before and found.sizes and set(found.sizes.values()) == {16}
    assert found.after.flops - found.before.flops == 16 * 8
    assert len(fxsight.diff(b, a).of("removed")) == 1


def test_two_traces() -> None:
    model = _model()
    with model.trace(_x()) as one:
        model.output.save()
    with model.trace(_x()) as two:
        model.up.output[:] = 0
        model.output.save()
    assert fxsight.diff(one, two).of("added") and not fxsight.diff(one, one)
    with pytest.raises(TypeError, match="a program, a file of one, a model or a trace that has ended, not a int"):
        fxsight.diff(1, two)


def test_two_models() -> None:
    one, two = _model(), Model(Net(deep=True).requires_grad_(False), cache=False)
    with pytest.raises(TypeError, match=r"nothing has been captured of this model yet: model.capture\(x\)"):
        fxsight.diff(one, two)
    found = fxsight.diff(one.capture(_x()), two.capture(_x()))
    assert [change.address for change in found.of("added")] == ["/torch_tanh_0"]
    assert not fxsight.diff(one, one)


def test_a_file(tmp_path: Path) -> None:
    one, two = _model(), Model(Net(deep=True).requires_grad_(False), cache=False)
    path = fxsight.save_program(one.capture(_x()), tmp_path / "net.program")
    assert not fxsight.diff(path, one) and not fxsight.diff(one, str(path))
    assert str(fxsight.diff(path, two.capture(_x()))) == str(fxsight.diff(one, two))
    data = asdict(fxsight.diff(path, two))
    assert data["changes"][0]["kind"] == "added" and data["after"]["flops"] > data["before"]["flops"]
    path.write_bytes(b"no")
    with pytest.raises(TextError, match=r"net.program: no file of a program, or of one that torch .* lacks: "):
        fxsight.diff(path, one)
    with pytest.raises(FileNotFoundError):
        fxsight.diff(tmp_path / "other", one)
