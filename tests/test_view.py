"""The module tree that users hold: children, words, values, copies, and the wrapped module left as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from fxsight import CaptureError, InputError, Model, NotExecuted, TraceError, View


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.offsets = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.config = {"size": 4}
        self.nothing: nn.Module | None
        self.register_module("nothing", None)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        x = self.tail(x + self.offsets[0])
        return self.heads["a"](x) + self.heads["b"](x)


class Crowded(nn.Module):
    """Children whose names are words of ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input = nn.Linear(4, 4)
        self.ops = nn.Linear(4, 4)
        self.output = nn.Linear(4, 4)
        self.get = nn.Sequential(nn.Linear(4, 4))
        self.path = nn.Linear(4, 4)
        self.skip = nn.Linear(4, 4)
        self.source = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        for part in (self.input, self.ops, self.get, self.path, self.skip, self.source):
            x = part(x)
        return self.output(x)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x + 1 if x.sum() > 0 else x - 1


def _x() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


def _hooked(module: nn.Module, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a part returns while the module runs."""
    seen: list[torch.Tensor] = []
    handle = part.register_forward_hook(lambda m, a, o: seen.append(o))
    module(x)
    handle.remove()
    return seen[0]


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def model(net: Net) -> Model:
    return Model(net)


# -- children --------------------------------------------------------------------------------------------------------


def test_children_by_index_slice_and_name(model: Model, net: Net) -> None:
    assert model.layers[1].path == model.layers[-2].path == model["layers"][1].path == model["layers.1"].path
    assert [view.path for view in model.layers[1:]] == ["layers.1", "layers.2"]
    assert isinstance(model.layers[:1], list)
    assert [view.path for view in model.layers] == ["layers.0", "layers.1", "layers.2"]
    assert len(model.layers) == 3 and len(model.tail) == 2 and len(model.layers[0].up) == 0
    assert model.layers[0].up, "a module without children is true"
    assert model.heads["b"].path == "heads.b" and "b" in model.heads and "c" not in model.heads
    assert model.tail[0].path == "tail.0" and model.tail[-1]._module is net.tail[1]
    assert model.layers[1] is model.layers[1], "views are kept"
    assert model.layers[1] in model.layers


def test_what_is_no_module_is_the_modules_own(model: Model, net: Net) -> None:
    assert model.offsets is net.offsets
    assert model.nothing is None and model["nothing"] is None
    assert model.config is net.config
    assert list(model.parameters()) == list(net.parameters())
    assert model.layers[0].up.weight is net.layers[0].up.weight  # type: ignore[union-attr]
    assert torch.equal(model.forward(_x()), net(_x()))
    assert torch.equal(model(_x()), net(_x()))
    assert model.layers[0].up.in_features == 4


def test_an_index_that_is_not_there(model: Model) -> None:
    with pytest.raises(IndexError, match=r"^layers has 3 modules, 0 to 2; there is no 3$"):
        model.layers[3]
    with pytest.raises(IndexError, match=r"^layers has 3 modules, 0 to 2; there is no -4$"):
        model.layers[-4]
    with pytest.raises(IndexError, match=r"^layers\.0\.up has no modules; there is no 0$"):
        model.layers[0].up[0]


def test_a_name_that_is_not_there(model: Model) -> None:
    with pytest.raises(KeyError, match="heads has no child 'c'; it has a, b"):
        model.heads["c"]
    with pytest.raises(KeyError, match="the root has no child 'layer'; did you mean 'layers'"):
        model["layer.0"]
    with pytest.raises(AttributeError, match=r"^Block at layers\.0 has no attribute 'upp'; it has up, down$"):
        _ = model.layers[0].upp
    assert not hasattr(model, "__array__")


def test_path_parent_and_root(model: Model) -> None:
    view = model.layers[2].up
    assert (view.path, view.parent.path, view.parent.parent.path) == ("layers.2.up", "layers.2", "layers")
    assert view.parent.parent.parent is model is view.root is model.root
    assert model.parent is None and model.path == ""


def test_modules_children_first(model: Model) -> None:
    paths = [path for path, _ in model.named_modules()]
    assert paths[:4] == ["layers.0.up", "layers.0.down", "layers.0", "layers.1.up"] and paths[-1] == ""
    assert [view.path for view in model.modules()] == paths
    linear = model.modules(include_fn=lambda view: isinstance(view._module, nn.Linear), names=True)
    assert [name for name, _ in linear][-3:] == ["heads.a", "heads.b", "tail.0"]
    assert all(view.path == name for name, view in linear)


def test_a_shared_module_has_its_first_path() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(x)

    net = Tied()
    model = Model(net)
    assert model.b.path == "a" and [path for path, _ in model.named_modules()] == ["a", ""]
    with model.trace(torch.ones(1, 2)):
        out = model.b.output.save()
    assert torch.equal(out, net.a(torch.ones(1, 2)))


def test_a_property_that_returns_a_module_of_the_model() -> None:
    class Base(Net):
        @property
        def base_model(self) -> nn.Module:
            return self.tail

    model = Model(Base())
    assert model.base_model.path == "tail" and isinstance(model.base_model, View)


# -- get -------------------------------------------------------------------------------------------------------------


def test_get_paths_values_and_operations(model: Model, net: Net) -> None:
    assert model.get("") is model
    assert model.get("layers.0.up").path == "layers.0.up" and model.get("layers.-1").path == "layers.2"
    assert model.get("config") is net.config
    with model.trace(_x()):
        out = model.get("layers.0.output").save()
        inside = model.layers[0].get("ops.torch_relu_0.output").save()
        same = model.get("layers.0/torch_relu_0:output").save()
        first = model.get("layers.1:inputs[0][0]").save()
    block: Any = net.layers[0]
    assert torch.equal(out, block(_x())) and torch.equal(first, out)
    assert torch.equal(inside, torch.relu(block.up(_x()))) and torch.equal(same, inside)


def test_get_of_nothing(model: Model) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'mlp'; it has up, down"):
        model.get("layers.0.mlp.output")
    with pytest.raises(IndexError, match="there is no 7"):
        model.get("layers.7.output")


# -- names that are words of ours --------------------------------------------------------------------------------------


def test_a_word_keeps_its_meaning_and_the_child_is_in_brackets() -> None:
    net = Crowded()
    model = Model(net)
    with model.trace(_x()):
        outs = {name: model[name].output.save() for name, _ in net.named_children()}
        whole = model.output.save()
        first = model.input.save()
        deep = model.get("get.0.output").save()
        last = model.get("output:output").save()
    for name, part in net.named_children():
        assert torch.equal(outs[name], _hooked(net, part, _x())), name
    assert torch.equal(whole, net(_x())) and torch.equal(first, _x())
    assert torch.equal(deep, outs["get"]) and torch.equal(last, outs["output"])
    assert model.path == "" and model["path"].path == "path"


def test_print_tells_which_children_are_in_brackets() -> None:
    text = str(Model(Crowded()))
    assert '\n  (["output"]): Linear(in_features=4' in text and '\n  (["get"]): Sequential(\n' in text


def test_a_value_outside_a_trace_names_the_child() -> None:
    message = r'^:output has a value only inside a trace: with model.trace\(...\):; its child of that name is view\["ou'
    with pytest.raises(TraceError, match=message):
        _ = Model(Crowded()).output


def test_print_is_that_of_the_module(model: Model, net: Net) -> None:
    assert str(model) == str(net) and "(0-2): 3 x Block(" in str(model)
    assert str(model.layers[0]) == str(net.layers[0]) and str(model.nothing) == "None"
    assert str(Model(nn.ReLU())) == "ReLU()" and str(Model(nn.Sequential())) == "Sequential()"


def test_bert() -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    torch.manual_seed(0)
    bert = BertModel(config).eval()
    model = Model(bert)
    ids = torch.arange(10).reshape(2, 5)
    layer = model.encoder.layer[0]
    with model.trace(ids):
        whole = layer.output.save()
        child = layer["output"].output.save()
        dense = model.get("encoder.layer.0.attention.output.dense.output").save()
    parts: Any = bert.encoder.layer[0]
    assert torch.equal(whole, _hooked(bert, parts, ids))
    assert torch.equal(child, _hooked(bert, parts.output, ids))
    assert torch.equal(dense, _hooked(bert, parts.attention.output.dense, ids))
    assert '(["output"]): BertOutput(' in str(model) and "output" in dir(layer)


# -- setting ---------------------------------------------------------------------------------------------------------


def test_a_word_cannot_be_set(model: Model) -> None:
    with pytest.raises(AttributeError, match=r"^'source' is a word that every view has: give what you attach another"):
        model.layers[0].source = nn.Linear(4, 4)
    with pytest.raises(AttributeError, match="'path' is a word"):
        model.layers[0].path = "x"


def test_modules_and_attributes_are_set_on_the_module(model: Model, net: Net) -> None:
    model.layers[0].probe = nn.Linear(4, 1)
    assert isinstance(model.layers[0].probe, View) and "layers.0.probe.weight" in net.state_dict()
    model.layers[0].again = model.tail[0]
    assert net.layers[0].again is net.tail[0]
    model.layers[0].scale = 3
    assert net.layers[0].scale == 3
    del model.layers[0].probe
    assert not hasattr(net.layers[0], "probe") and not hasattr(model.layers[0], "probe")


def test_a_module_in_the_place_of_another_is_traced(net: Net) -> None:
    model = Model(net, cache=False)
    with model.trace(_x()):
        before = model.output.save()
    model.layers[1] = nn.Tanh()
    model.tail[0] = nn.Linear(4, 4)
    with model.trace(_x()):
        after = model.output.save()
    assert torch.equal(after, net(_x())) and not torch.equal(before, after)
    assert model.layers[1].path == "layers.1" and model._captures.made == 2


def test_a_like_module_in_the_place_of_another_needs_no_capture(net: Net) -> None:
    model = Model(net, cache=False)
    with model.trace(_x()) as tracer:
        before = model.output.save()
    net.layers[1] = Block()
    with model.trace(_x()):
        after = model.output.save()
    assert torch.equal(after, net(_x())) and not torch.equal(before, after)
    assert torch.equal(tracer.program(_x())[0], after) and model._captures.made == 1


def test_a_weight_that_is_gone(model: Model, net: Net) -> None:
    with model.trace(_x()) as tracer:
        model.output.save()
    del net.tail[0].weight
    with pytest.raises(InputError, match=r"^the program needs 'tail.0.weight', which the model has no more$"):
        tracer.program(_x())
    del net.tail
    with pytest.raises(InputError, match=r"^the program needs the module 'tail.0', which the model has no more$"):
        tracer.program(_x())


# -- devices, types, weights -----------------------------------------------------------------------------------------


def test_devices(model: Model) -> None:
    assert model.to("cpu") is model and model.cpu() is model and model.layers[0].cpu().path == "layers.0"
    assert model.device == torch.device("cpu") and model.devices == {torch.device("cpu")}
    assert Model(nn.ReLU()).device is None and Model(nn.ReLU()).devices == set()
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            model.cuda()


def test_calls_that_return_the_module_return_the_view(model: Model) -> None:
    assert model.eval() is model and model.layers[0].train() is model.layers[0]
    assert model.requires_grad_(False) is model and model.double() is model
    assert model.layers[0].up.weight.dtype == torch.float64


def test_weights_changed_after_the_capture_are_seen(net: Net) -> None:
    model = Model(net, cache=False)

    def traced() -> Any:
        with model.trace(_x().to(model.layers[0].up.weight.dtype)):
            return model.output.save()

    traced()
    with torch.no_grad():
        net.tail[0].weight.mul_(2)  # type: ignore[operator]
    assert torch.equal(traced(), net(_x()))
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    assert torch.equal(traced(), net(_x()))
    net.tail[0].bias = nn.Parameter(torch.zeros(4))
    assert torch.equal(traced(), net(_x())) and model._captures.made == 1
    model.to(torch.float64)
    assert torch.equal(traced(), net(_x().double())) and model._captures.made == 2


# -- several, copied, left as it was ---------------------------------------------------------------------------------


def test_two_models_around_one_module(net: Net) -> None:
    one, two = Model(net), Model(net, cache=False)
    with one.trace(_x()), two.trace(_x()):
        one.layers[0].output[:] = 0
        a, b = one.output.save(), two.output.save()
    assert torch.equal(b, net(_x())) and not torch.equal(a, b)
    with pytest.raises(TraceError, match="only inside a trace"):
        _ = one.output


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_models_of_their_own(net: Net, duplicate: Any) -> None:
    model = Model(net, cache=False, rename={"up": "grow"})
    with model.trace(_x()) as tracer:
        out = model.layers[0].grow.output.save()
        assert tracer is not None
    other, view = duplicate((model, model.layers[1].up))
    assert type(other) is Model and other._module is not net and view.root is other
    assert view is other.layers[1].grow and other._options == model._options
    with other.trace(_x()):
        again = other.layers[0].grow.output.save()
    assert torch.equal(out, again)
    with torch.no_grad():
        other.layers[0].up.weight.zero_()
    with model.trace(_x()):
        still = model.layers[0].up.output.save()
    assert torch.equal(out, still)


def test_a_shallow_copy_shares_the_module(model: Model, net: Net) -> None:
    other = copy.copy(model)
    assert other is not model and other._module is net and other._captures is not model._captures


def test_the_module_is_left_as_it_was(net: Net) -> None:
    before = {name: dict(vars(part)) for name, part in net.named_modules()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    model = Model(net)
    with model.trace(_x()):
        model.layers[0].output[:] = 0
        model.output.save()
    with pytest.raises(NotExecuted), model.trace(_x()):
        model.layers[0].call(4).output.save()
    failing = Model(nn.Sequential(net, Branch()), cache=False)
    with pytest.raises(CaptureError), failing.trace(_x()):
        pass
    after = {name: dict(vars(part)) for name, part in net.named_modules()}
    assert after == before and type(net) is Net and "forward" not in vars(net)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert list(net.state_dict()) == list(state)


def test_nothing_holds_a_model_that_was_deleted() -> None:
    net = Net()
    model = Model(net)
    with model.trace(_x()) as tracer:
        out = model.layers[0].output.save()
    held = weakref.ref(model), weakref.ref(net)
    assert out is not None
    del model, net, tracer
    gc.collect()
    assert [ref() for ref in held] == [None, None]


# -- views of one's own ----------------------------------------------------------------------------------------------


class Mine(View):
    @property
    def doubled(self) -> Any:
        return self.output * 2

    @property
    def broken(self) -> Any:
        return self._module.no_such_thing


class Other(View):
    pass


def _classes(model: Model) -> Iterator[tuple[str, type]]:
    for path, view in model.named_modules():
        if path.startswith("layers.0"):
            yield path, type(view)


def test_one_class_of_views_for_all(net: Net) -> None:
    model = Model(net, views=Mine)
    assert all(type(view) is Mine for path, view in model.named_modules() if path)
    with model.trace(_x()):
        twice, out = model.layers[0].doubled.save(), model.layers[0].output.save()
    assert torch.equal(twice, out * 2) and type(model.layers[0].call(1)) is Mine
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.layers[0].broken


def test_views_by_class_and_by_path(net: Net) -> None:
    by_class = Model(net, views={nn.Module: Mine, nn.Linear: Other, "up": Mine})
    assert dict(_classes(by_class)) == {"layers.0.up": Other, "layers.0.down": Other, "layers.0": Mine}
    by_path = Model(net, views={"0.up": Mine, "up": Other, "own": Other, "layers.0": None})
    assert dict(_classes(by_path)) == {"layers.0.up": Mine, "layers.0.down": View, "layers.0": View}
    assert type(by_path.layers[1].up) is Other


def test_views_that_are_none(net: Net) -> None:
    with pytest.raises(TypeError, match=r"is no subclass of fxsight.View"):
        Model(net, views={"up": nn.Linear})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"^Model\(...\) is for an nn.Module, not a str$"):
        Model("gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not a Model"):
        Model(Model(net))  # type: ignore[arg-type]
