"""Aliases: every form of ``rename``, what is printed, and what is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fxsight import Model
from fxsight.errors import NotCached, RenameError


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.mlp(self.norm(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.h:
            x = block(x)
        return self.norm(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = Body()
        self.head = nn.Linear(4, 2)
        self.size = 4

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.transformer(x))


def _x() -> torch.Tensor:
    return torch.linspace(-1, 1, 8).reshape(2, 4)


def _renamed(rename: Any) -> Model:
    return Model(Net(), rename=rename)


def test_one_name_at_every_level() -> None:
    model = _renamed({"norm": "ln", "transformer": "model"})
    assert model.model is model.transformer
    assert model.model.ln is model.transformer.norm
    assert model.model.h[1].ln.path == "transformer.h.1.norm"


def test_a_path_stands_on_the_model() -> None:
    model = _renamed({"transformer.h": "layers", ".transformer.norm": ".final", ".head": "out"})
    assert model.layers is model.transformer.h and len(model.layers) == 2
    assert model.final.path == "transformer.norm" and model.out.path == "head"
    assert not hasattr(model.transformer, "layers")


def test_several_names() -> None:
    model = _renamed({"mlp": ["ff", "mlp2"]})
    block = model.transformer.h[0]
    assert block.ff is block.mlp2 is block.mlp


def test_classes() -> None:
    model = _renamed({Mlp: "ff", Body: "model"})
    assert model.model.h[0].ff.path == "transformer.h.0.mlp"


def test_wildcards_stand_beside_what_they_name() -> None:
    model = _renamed({"transformer.h.*.mlp": "ff", "transf*": "model", "transformer.h.*.mlp.u*": "grow"})
    assert model.model.h[1].ff.grow.path == "transformer.h.1.mlp.up"
    assert not hasattr(model, "ff")


def test_values_and_addresses_through_aliases() -> None:
    net = Net()
    model = Model(net, rename={"transformer.h": "layers", "mlp": "ff", "transformer": "model"})
    with model.trace(_x()):
        model.layers[0].ff.output[:] = 0
        one = model.get("layers.1.ff.output").save()
        two = model.get("model.h.1.ff:output").save()
        three = model.get("layers.1.ff/torch_relu_0:output").save()
        four = model["layers.1.ff"].output.save()
    handle = net.transformer.h[0].mlp.register_forward_hook(lambda m, a, o: o * 0)  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    mlp: Any = net.transformer.h[1].mlp
    mlp.register_forward_hook(lambda m, a, o: seen.append(o))
    net(_x())
    handle.remove()
    assert torch.equal(one, seen[0]) and torch.equal(two, one) and torch.equal(four, one)
    assert three.shape == (2, 8)
    assert str(model.layers[0].ff.address) == "transformer.h.0.mlp"


def test_addresses_and_caches_know_aliases() -> None:
    model = _renamed({"transformer.h": "layers", "mlp": "ff"})
    with model.trace(_x()) as tracer:
        kept = tracer.cache(modules=["layers.1.ff", model.layers[0]])
        found = tracer.at("layers.1.ff").output.save()
        inner = tracer.at("layers.1.ff/torch_relu_0:output").output.save()
    copied = pickle.loads(pickle.dumps(kept))
    assert list(kept) == ["model.transformer.h.0", "model.transformer.h.1.mlp"]
    for cache in (kept, copied):
        assert torch.equal(cache["layers.1.ff"].output, found) and "model.layers.1.ff" in cache
        assert torch.equal(cache.model.layers[1].ff.output, found)
    assert inner.shape == (2, 8)
    with pytest.raises(NotCached, match=r"layers\.1 is not in this cache: it was not asked for"):
        kept["layers.1"]


def test_what_is_printed_and_completed() -> None:
    model = _renamed({"transformer.h": "layers", "mlp": ["ff", "mlp2"], ".head": "out"})
    text = str(model)
    assert "\n  (out/head): Linear(in_features=4" in text
    assert "\n        (ff/mlp2/mlp): Mlp(\n" in text
    assert "\n  (layers/transformer.h): ModuleList(\n    (0-1): 2 x Block(\n" in text
    assert {"layers", "out", "head"} <= set(dir(model)) and {"ff", "mlp2", "mlp"} <= set(dir(model.layers[0]))
    one = str(_renamed({".transformer.h.0.mlp": "first"}))
    assert "\n  (first/transformer.h.0.mlp): Mlp(\n" in one and "(0-1): 2 x Block(" in one


def test_alike_modules_with_different_names_are_not_folded() -> None:
    text = str(_renamed({"0": "first"}))
    assert "\n      (first/0): Block(\n" in text and "\n      (1): Block(\n" in text


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"transfomer": "model"}, "rename: no module is called 'transfomer'; did you mean 'transformer'?"),
        ({"transformer.g": "x"}, "rename: no module at 'transformer.g'; did you mean 'transformer.h'"),
        (
            {"zzzzzz": "x"},
            "rename: no module is called 'zzzzzz'; there are transformer, h, 0, norm, mlp, up, down",
        ),
        ({nn.Conv2d: "x"}, "rename: no module is a Conv2d; there are Block, Body, LayerNorm, Linear, "),
        ({"mlp": "norm"}, "rename: 'norm', for 'mlp' of transformer.h.0, is a module of it already"),
        ({".head": "size"}, "rename: 'size', for 'head' of the model, is an attribute of it already"),
        ({"mlp": "forward"}, "rename: 'forward', for 'mlp' of transformer.h.0, is an attribute of it already"),
        ({"mlp": "output"}, "rename: 'output', for 'mlp' of transformer.h.0, is a word that every view has"),
        ({"head": "trace"}, "rename: 'trace', for 'head' of the model, is a word that every view has"),
        ({nn.Linear: "lin"}, "rename: 'lin' would name both 'up' and 'down' of transformer.h.0.mlp"),
        ({"transformer.h": "x", "head": "x"}, "rename: 'x' would name both 'transformer.h' and 'head' of the model"),
        ({"transformer.h": "model.h"}, "rename: 'model.h', for 'transformer.h', is not a name; give one word, such as"),
        ({Mlp: ""}, "rename: '', for Mlp, is not a name"),
    ],
)
def test_refused(rename: Any, message: str) -> None:
    with pytest.raises(RenameError) as caught:
        _renamed(rename)
    assert str(caught.value).startswith(message)


def test_the_same_name_twice_for_one_module_is_fine() -> None:
    model = _renamed({"mlp": "ff", Mlp: "ff", "transformer.h.*.mlp": ["ff", "ff"]})
    assert model.transformer.h[0].ff is model.transformer.h[0].mlp


def test_a_module_that_is_attached_later_gets_its_alias() -> None:
    model = _renamed({"mlp": "ff"})
    model.transformer.extra = Block()
    assert model.transformer.extra.ff.path == "transformer.extra.mlp"


def test_an_alias_cannot_become_a_module() -> None:
    model = _renamed({"mlp": "ff"})
    with pytest.raises(RenameError, match=r"^'ff' is an alias of 'mlp': give another name$"):
        model.transformer.h[0].ff = Mlp()
    assert "ff" not in model.transformer.h[0]._module._modules


def test_what_an_alias_forbids_is_not_attached() -> None:
    model = _renamed({Mlp: "ff"})
    with pytest.raises(RenameError, match="would name both 'mlp' and 'second'"):
        model.transformer.h[0].second = Mlp()
    assert "second" not in model.transformer.h[0]._module._modules
    model.transformer.h[0].mlp = nn.Linear(4, 4)
    assert not hasattr(model.transformer.h[0], "ff") and model.transformer.h[1].ff.path == "transformer.h.1.mlp"
