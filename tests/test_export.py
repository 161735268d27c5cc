"""Edited models as files: loaded without fxsight, they compute what the edited model computes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxsight import Model
from fxsight.errors import EditError, TraceError
from fxsight.export import fingerprint
from fxsight.export_check import Case, check_file


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        h = torch.relu(self.up(x))
        return {"out": self.down(h if scale is None else h * scale), "parts": (h, 3)}


def _x(rows: int = 3) -> Tensor:
    return torch.randn((rows, 4), generator=torch.Generator().manual_seed(rows))


def _steered() -> Model:
    model, steer = Model(Net().requires_grad_(False), cache=False), torch.linspace(-1, 1, 8)
    with model.edit(_x(), parameters={"steer": steer}) as edited:
        model.up.output[:, 1:] *= 2
        model.up.output += steer
    assert isinstance(edited, Model)
    return edited


@cache
def _language(kind: str) -> tuple[Model, str]:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=97, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        net, block = GPT2LMHeadModel(config), "transformer.h.1"
    elif kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        net, block = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)), "model.layers.1"
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        net, block = BertModel(BertConfig(vocab_size=97, **sizes)), "encoder.layer.1"
    return Model(net.eval().requires_grad_(False), cache=False), block


def _ids(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def _edited(kind: str) -> tuple[Model, dict[str, Any]]:
    model, block = _language(kind)
    call = {} if kind == "bert" else {"use_cache": False}
    with model.edit(input_ids=_ids(), **call, parameters={"steer": torch.linspace(-1, 1, 16)}) as edited:
        model[block].output[:, -1] += edited_vector()
    return edited, call


def edited_vector() -> Tensor:
    return torch.linspace(-1, 1, 16)


def test_pt2(tmp_path: Path) -> None:
    edited = _steered()
    made = edited.export(tmp_path / "net.pt2", _x())
    assert made.checked is not None and made.checked.bitwise and made.checked.largest == 0
    loaded = torch.export.load(made.path)
    for rows in (3, 7, 2):
        want, got = edited(_x(rows)), loaded.module()(x=_x(rows))
        assert torch.equal(got["out"], want["out"]) and torch.equal(got["parts"][0], want["parts"][0])
        assert got["parts"][1] == 3
    assert set(loaded.state_dict) | set(loaded.constants) == {*edited._module.state_dict(), "edits.steer"}


def test_the_tensors_of_edits_can_be_changed_in_the_file(tmp_path: Path) -> None:
    edited = _steered()
    made = edited.export(tmp_path / "net.pt2", _x(), check=False)
    assert made.checked is None
    module = torch.export.load(made.path).module()
    module.edits.steer.zero_()  # type: ignore[union-attr,operator]
    edited.edit_parameters["steer"] = torch.zeros(8)
    assert torch.equal(module(x=_x(5))["out"], edited(_x(5))["out"])


def test_manifest(tmp_path: Path) -> None:
    edited = _steered()
    made = edited.export(tmp_path / "net.pt2", _x(), scale=torch.ones(8))
    content = json.loads(made.manifest.read_text())
    assert made.manifest.name == "net.pt2.json"
    assert list(content["inputs"]) == ["x", "scale"]
    assert content["addresses"] == ["up:output"]
    assert content["parameters"] == {"steer": "edits.steer"}
    assert content["weights_sha256"] == fingerprint(edited._module)
    assert content["checked"]["bitwise"] is True and len(content["checked"]["other_sizes"]) == 2
    assert content["edits"][0]["writes"][0]["at"] == "up:output"
    assert content["made_by"]["torch"] == torch.__version__
    with torch.no_grad():
        edited._module.up.bias[0] += 1
    assert content["weights_sha256"] != fingerprint(edited._module)


@pytest.mark.parametrize("kind", ["gpt2", *(pytest.param(k, marks=pytest.mark.slow) for k in ("llama", "bert"))])
def test_language_models(kind: str, tmp_path: Path) -> None:
    edited, call = _edited(kind)
    made = edited.export(tmp_path / "m.pt2", input_ids=_ids(), **call)
    assert made.checked is not None and made.checked.bitwise
    loaded = torch.export.load(made.path).module()
    for rows, length in ((3, 9), (2, 17)):
        want, got = edited(input_ids=_ids(rows, length), **call), loaded(input_ids=_ids(rows, length))
        assert list(got) == list(want)
        assert all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_onnx(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    edited, call = _edited(kind)
    made = edited.export(tmp_path / "m.onnx", input_ids=_ids(), **call)
    assert made.checked is not None and made.checked.largest < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_aoti(kind: str, tmp_path: Path) -> None:
    edited, call = _edited(kind)
    made = edited.export(tmp_path / "m.pt2", input_ids=_ids(), **call, format="aoti")
    assert made.checked is not None and made.checked.largest < 1e-4


def test_what_cannot_be(tmp_path: Path) -> None:
    edited = _steered()
    with pytest.raises(TraceError, match=r"an export needs an example of the inputs: edited.export\(path, x\)"):
        edited.export(tmp_path / "a.pt2")
    with pytest.raises(EditError, match=r"a.zip: exports end in .pt2 or .onnx"):
        edited.export(tmp_path / "a.zip", _x())
    model = Model(Net().requires_grad_(False), cache=False)
    with model.edit(_x()) as fixed:
        model.up.output = model.up.output * model.up.output.shape[0]
    with pytest.raises(EditError, match=r"has looked at a shape, which was \[3, 8\] and is \[4, 8\] here"):
        fixed.export(tmp_path / "a.pt2", _x())
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_found(tmp_path: Path) -> None:
    edited = _steered()
    made = edited.export(tmp_path / "net.pt2", _x(), check=False)
    out = edited(_x())
    good = Case({"x": _x()}, [out["out"], out["parts"][0]])
    assert check_file("pt2", made.path, [good], 1e-5).bitwise
    with pytest.raises(EditError, match=r"does not compute what the edited model computes: the largest difference is"):
        check_file("pt2", made.path, [Case({"x": _x()}, [out["out"] + 1, out["parts"][0]])], 1e-5)
    made.path.write_bytes(b"no")
    with pytest.raises(EditError, match="cannot be run in a fresh process"):
        check_file("pt2", made.path, [good], 1e-5)
