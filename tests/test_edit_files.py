"""Edits in files: what was written is read again on another model; what is no such file is a clear error."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxsight
from fxsight import Model
from fxsight.edit_text import edits_of
from fxsight.errors import EditError, EditFileError, FxsightError


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def _x(rows: int = 3) -> Tensor:
    return torch.randn((rows, 4), generator=torch.Generator().manual_seed(rows))


def _model(seed: int = 0) -> Model:
    return Model(Net(seed).requires_grad_(False), cache=False)


def _edited(model: Model) -> Model:
    """An edit of each kind: in place and assigned, views, constants, weights, operations, sizes, skips."""
    steer, flags = torch.linspace(-1, 1, 4), torch.tensor([True, False, True, False])
    with model.edit(_x(), parameters={"steer": steer}) as edited:
        h = model.blocks[0].output
        h[:, 1:3].mul_(2)
        model.blocks[1].output = torch.where(flags, h.T.T * h.size(-1) + steer, -float("inf"))
        model.blocks[2].input += model._module.blocks[0].bias
    with edited.edit() as twice:
        (last, first) = torch.split(edited.blocks[2].output, [1, 3], dim=-1)
        edited.blocks[2].output = torch.cat([first, last], dim=-1)
        edited.ops.torch_tanh_0.output *= 0.5
    assert isinstance(twice, Model)
    return twice


def test_another_model(tmp_path: Path) -> None:
    first = _edited(_model())
    path = first.save_edits(tmp_path / "steer")
    assert path == tmp_path / "steer.json" and (tmp_path / "steer.safetensors").exists()
    second = _model(1)
    assert second.load_edits(path) is second
    again = _edited(_model(1))
    for rows in (3, 5):
        assert torch.equal(second(_x(rows)), again(_x(rows)))
        assert not torch.equal(second(_x(rows)), second._module(_x(rows)))
    assert list(second.edit_parameters) == list(first.edit_parameters)
    assert all(torch.equal(tensor, second.edit_parameters[name]) for name, tensor in first.edit_parameters.items())
    assert second.save_edits(tmp_path / "again").read_text() == path.read_text().replace("steer.safe", "again.safe")


def test_readable(tmp_path: Path) -> None:
    model = _model()
    with model.edit(_x()) as edited:
        model.blocks[0].output = 0
    content = json.loads(edited.save_edits(tmp_path / "a.json").read_text())
    assert content["format"] == "fxsight edits" and content["version"] == 1 and content["model"] == "Net"
    assert content["made_by"]["fxsight"] == fxsight.__version__ and content["tensors"] is None
    (edit,) = content["edits"]
    assert edit["body"] == [
        "read_0 = read('blocks.0:output')    # f32[3, 4]",
        "user_full_like = torch.full_like(read_0, 0)    # f32[3, 4]",
    ]
    assert edit["writes"] == [{"at": "blocks.0:output", "value": "user_full_like", "in_place": False}]
    assert edit["line"].startswith("test_edit_files.py:")


def test_names_and_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = _edited(_model())
    edited.export_edits("steer", tmp_path)
    edited.export_edits("steer", tmp_path, variant="strong")
    assert torch.equal(_model().import_edits("steer", tmp_path)(_x()), edited(_x()))
    assert torch.equal(_model().import_edits("steer", tmp_path, "strong")(_x()), edited(_x()))
    with pytest.raises(
        EditFileError, match=r"no edits 'steer' \(variant 'weak'\) in .*; there are __default__, strong"
    ):
        _model().import_edits("steer", tmp_path, "weak")
    with pytest.raises(EditFileError, match=r"no edits 'other' .*; there are steer"):
        _model().import_edits("other", tmp_path)
    with pytest.raises(EditFileError, match=r"a plain file name, not '../steer'"):
        _model().import_edits("../steer", tmp_path)
    with pytest.raises(ValueError, match=r"this model has no edits to export: write one with model.edit\(\) before"):
        _model().export_edits("steer", tmp_path)
    monkeypatch.setenv("FXSIGHT_EDITS_DIR", str(tmp_path / "own"))
    assert edited.export_edits("steer").parent.parent == tmp_path / "own"
    assert len(_model().import_edits("steer").edits) == 2


def test_copies_and_pickles() -> None:
    edited = _edited(_model())
    for other in (copy.deepcopy(edited), pickle.loads(pickle.dumps(edited)), copy.copy(edited)):
        assert other is not edited and len(other.edits) == 2
        assert torch.equal(other(_x()), edited(_x()))
        other.edit_parameters["steer"].zero_()
        assert not torch.equal(other(_x()), edited(_x()))


def test_a_model_without_these_places(tmp_path: Path) -> None:
    path = _edited(_model()).save_edits(tmp_path / "a")
    with pytest.raises(EditError) as caught:
        Model(nn.Sequential(nn.Linear(4, 4)), cache=False).load_edits(path)
    told = str(caught.value)
    assert told.startswith("Sequential does not have what these edits name:\n  blocks.0:output: it has no such module")
    assert all(name in told for name in ("blocks.1:output", "blocks.2:input", "the weight blocks.0.bias"))
    other = Model(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)), cache=False)
    with pytest.raises(EditError, match="GPT2LMHeadModel does not have"):
        other.load_edits(path)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return _edited(_model()).save_edits(tmp_path / "a.json")


def _changed(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


def test_foreign_and_newer_files(written: Path) -> None:
    for text, told in [
        ("", "not a file of edits: Expecting value"),
        ("[1]", 'it does not say \'"format": "fxsight edits"\''),
        ('{"format": "other"}', "it does not say"),
        ('{"format": "fxsight edits", "version": "1"}', "the version of its format is no number: '1'"),
        ('{"format": "fxsight edits", "version": 2}', r"written by a newer fxsight: its format is version 2, and this"),
        ('{"format": "fxsight edits", "version": 1}', "damaged: these fields are missing or unknown: edits, made_by"),
        ("[" * 100_000, "not a file of edits"),
    ]:
        other = written.with_name("b.json")
        other.write_text(text)
        with pytest.raises(EditFileError, match=told) as caught:
            _model().load_edits(other)
        assert str(caught.value).startswith(str(other))
    with pytest.raises(FileNotFoundError):
        _model().load_edits(written.with_name("c.json"))
    written.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EditFileError, match="not a file of edits"):
        _model().load_edits(written)


def test_damaged_tensors(written: Path) -> None:
    beside = written.with_suffix(".safetensors")
    good = beside.read_bytes()
    for data in (good[:-1], good[:-1] + b"x", b""):
        beside.write_bytes(data)
        with pytest.raises(
            EditFileError, match=r"a\.safetensors is damaged, or not the one that was written with this"
        ):
            _model().load_edits(written)
    beside.unlink()
    with pytest.raises(EditFileError, match=r"the file of its tensors is not there: a\.safetensors; keep both in one"):
        _model().load_edits(written)
    beside.write_bytes(good)
    _changed(written, tensors=None)
    with pytest.raises(EditFileError, match=r"edit 0: \"constant_\d = constant\('.*no tensor"):
        _model().load_edits(written)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a = torch.load('x')", "no function 'torch.load'"),
        ("a = eval('1')", "no function 'eval'"),
        ("a = aten.from_file.default('x')", "aten.from_file.default is no function that a file of edits may have"),
        ("a = torch.Tensor.set_(read_0)", "torch.Tensor.set_ is no function that"),
        ("a = torch.Tensor.item(read_0)", "torch.Tensor.item is no function that"),
        ("a = torch.ops.aten.add.Tensor(read_0, 1)", "is no function that"),
        ("a = mutate(read_0, (), 'torch.Tensor.resize_', ('%self', (9, 9)), {})", "resize_ is no function that"),
        ("a = mutate(read_0, (), 3, (), {})", "mutate takes a value, the views"),
        ("a = getattr(read_0, '__class__')", "getattr takes one of H, T, imag"),
        ("a = torch.add(read_0, b)", "'b' is used before it is made"),
        ("a = torch.add(read_0, [x for x in y])", "not an argument"),
        ("a = torch.add(read_0, **{})", r"no \*\* in a program"),
        ("read_0 = torch.relu(read_0)", "the name 'read_0' is taken or reserved"),
        ("a = b = torch.relu(read_0)", r"not 'name = function\(...\)'"),
        ("import os", r"not 'name = function\(...\)'"),
        ("a = torch.relu(" + "(" * 5000, "Error"),
        ("a = torch.relu(" + "-" * 60_000 + "1)", "Error"),
        ("a" * 100_001, "a line of the body is a text of at most 100000 characters"),
        ("a = read('blocks.0')", "names a place, not a value of it"),
        ("a = read('x:y')", "not an address"),
        ("a = read(3)", "read takes one text"),
        ("a = constant('other')", "no tensor 'other'"),
    ],
)
def test_bad_lines(line: str, told: str) -> None:
    data = {
        "line": "x.py:1",
        "body": ["read_0 = read('blocks.0:output')", line],
        "writes": [{"at": "blocks.0:output", "value": "read_0", "in_place": False}],
        "skips": [],
        "sizes": [],
    }
    with pytest.raises(EditFileError, match=told):
        edits_of([data], {})


# -- mutated files ---------------------------------------------------------------------------------------------------

_JUNK: list[Any] = [
    None,
    True,
    -1,
    10**30,
    1e308,
    "",
    "\x00",
    "torch.Tensor.resize_",
    [],
    {},
    [[]],
    "blocks.9:output",
    "é" * 50,
]


def _mutated(content: Any, dice: random.Random) -> Any:
    """The same with one thing in it changed, removed, doubled or exchanged."""
    content = copy.deepcopy(content)
    at: Any = content
    while isinstance(at, (dict, list)) and at:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = dice.choice(keys)
        if not isinstance(at[key], (dict, list)) or not at[key] or dice.random() < 0.1:
            match dice.randrange(5):
                case 0:
                    at[key] = dice.choice(_JUNK)
                case 1:
                    del at[key]
                case 2 if isinstance(at, list):
                    at.insert(dice.randrange(len(at) + 1), copy.deepcopy(at[key]))
                case 3 if isinstance(at, list):
                    dice.shuffle(at)
                case _ if isinstance(at[key], str):
                    at[key] = _scrambled(at[key], dice)
                case _:
                    at[key] = dice.choice(_JUNK)
            return content
        at = at[key]
    return content


def _scrambled(text: str, dice: random.Random) -> str:
    i, j = sorted((dice.randrange(len(text) + 1), dice.randrange(len(text) + 1)))
    junk = dice.choice(["", "(", ")", "'", "99999999999999999999", "-1", "**", "None", "torch.save", text[i:j] * 3])
    return text[:i] + junk + text[min(j, i + dice.randrange(6)) :]


def _fuzz(written: Path, count: int) -> int:
    content, refused = json.loads(written.read_text()), 0
    dice, model = random.Random(0), _model()
    model.capture(_x())
    for _ in range(count):
        text = json.dumps(_mutated(content, dice))
        written.write_text(text if dice.random() < 0.8 else text[: dice.randrange(len(text))])
        try:
            model.load_edits(written)
            with model.scan(_x()):
                pass
        except EditError:
            refused += 1
        except FxsightError:
            pass  # it is a file of edits, and this forward cannot take them
        finally:
            model.clear_edits()
    return refused


def test_mutated_files(written: Path) -> None:
    assert _fuzz(written, 400) > 200


@pytest.mark.slow
def test_many_mutated_files(written: Path) -> None:
    assert _fuzz(written, 10_000) > 5_000
