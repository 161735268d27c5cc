"""Files of edits on another machine: other versions of libraries, and models whose code has moved its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsight import Model
from fxsight.errors import EditError, EditFileError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class RenamedBlock(nn.Module):
    """The same with other names for its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class MovedBlock(Block):
    """The same with its operators written in another way."""

    def forward(self, x: Tensor) -> Any:
        return self._mix(x).add(x)

    def _mix(self, x: Tensor) -> Any:
        h = self.up(x)
        return self.down(h.tanh())


def _model(block: type[nn.Module] = Block) -> Model:
    net = Net()
    blocks = nn.ModuleList(block() for _ in range(2))
    blocks.load_state_dict(dict(zip(blocks.state_dict(), net.state_dict().values(), strict=True)))
    net.blocks = blocks
    return Model(net.requires_grad_(False), cache=False)


def _x(rows: int = 3) -> Tensor:
    return torch.randn((rows, 4), generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Two edits: of modules and a weight, and of operations."""
    model = _model()
    edited: Any
    with model.edit(_x(), parameters={"steer": torch.arange(8.0)}) as edited:
        model.blocks[0].up.output += torch.arange(8.0)
        model.blocks[1].down.output = model.blocks[1].down.output * model._module.blocks[0].down.bias
    with edited.edit() as edited:
        model.blocks[0].ops.torch_tanh_0.output *= 2
        model.blocks[1].ops.torch_tanh_0.output[:, 0] = model.blocks[1].ops.operator_add_0.input[:, 0]
    path: Path = edited.save_edits(tmp_path / "edits.json")
    return path


def _by(path: Path, made_by: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), "made_by": made_by}))
    return path


_OLD = {"python": "3.12", "torch": "2.11.0", "transformers": "5.17.0", "fxsight": "0.0.1"}


@pytest.mark.parametrize("made_by", [_OLD, {}, [], None, 3, {"torch": ["2.11"]}, {"torch": "x" * 9999}])
def test_other_versions(written: Path, made_by: Any) -> None:
    """Where all places are there, a file applies whatever it was written with."""
    want = _model().load_edits(written)(_x(5))
    model = _model().load_edits(_by(written, made_by))
    assert torch.equal(model(_x(5)), want) and not torch.equal(want, model._module(_x(5)))


def test_renamed_modules(written: Path) -> None:
    model = _model(RenamedBlock)
    with pytest.raises(EditError) as caught:
        model.load_edits(_by(written, _OLD))
    first, *lines = str(caught.value).splitlines()
    assert first == "Net does not have what these edits name:"
    assert lines[:3] == [
        "  blocks.0.up:output: did you mean 'blocks.0', 'blocks.0.up_proj', 'blocks.1.up_proj'?",
        "  blocks.1.down:output: did you mean 'blocks.1.down_proj', 'blocks.0.down_proj', 'blocks.1'?",
        lines[2],
    ]
    assert lines[2].startswith("  the weight blocks.0.down.bias: did you mean 'blocks.0.down_proj.bias'")
    then = "the file was written with torch 2.11.0 and transformers 5.17.0; here is torch "
    assert lines[3].startswith(f"{then}{torch.__version__}") and len(lines) == 4
    assert len(model.edits) == 0 and torch.equal(model(_x()), model._module(_x()))


def test_moved_operations(written: Path) -> None:
    """Every missing address of every edit at once, and nothing is done by half."""
    model = _model(MovedBlock)
    model.load_edits(_by(written, _OLD))
    before = {name: t.clone() for name, t in model._module.state_dict().items()}
    for run in (lambda: model(_x()), lambda: _scanned(model)):
        with pytest.raises(EditError) as caught:
            run()
        told = str(caught.value)
        assert told.startswith("the edit of blocks.0/torch_tanh_0:output, blocks.1/torch_tanh_0:output (test_edit_")
        for name, block in [("torch_tanh_0", 0), ("torch_tanh_0", 1), ("operator_add_0", 1)]:
            assert f"\n  no operation '{name}' in blocks.{block}; did you mean 'aten_" in told
        assert "the file was written with torch 2.11.0 and transformers 5.17.0; here is" in told
    assert all(torch.equal(t, before[name]) for name, t in model._module.state_dict().items())
    model.clear_edits()
    assert torch.equal(model(_x()), model._module(_x()))


def _scanned(model: Model) -> None:
    with model.scan(_x()):
        pass


def test_all_edits_are_named_at_once(tmp_path: Path) -> None:
    model = _model()
    with model.edit(_x()) as edited:
        model.blocks[0].ops.torch_tanh_0.output *= 2
    with edited.edit() as edited:
        model.blocks[0].up.output *= 2
    with edited.edit() as edited:
        model.blocks[1].ops.operator_add_0.output *= 2
    path = edited.save_edits(tmp_path / "edits.json")
    with pytest.raises(EditError) as caught:
        _model(MovedBlock).load_edits(path)(_x())
    told = str(caught.value)
    assert "the edit of blocks.0/torch_tanh_0:output" in told and "the edit of blocks.1/operator_add_0:output" in told
    assert "blocks.0.up:output" not in told and "the file was written" not in told


def test_a_function_that_this_torch_does_not_have(written: Path) -> None:
    text = written.read_text().replace("torch.Tensor.mul", "torch.Tensor.fused_mul")
    written.write_text(text)
    with pytest.raises(EditFileError, match=r"no function 'torch.Tensor.fused_mul_?'") as caught:
        _model().load_edits(_by(written, _OLD))
    assert "\nthe file was written with torch 2.11.0" in str(caught.value)
