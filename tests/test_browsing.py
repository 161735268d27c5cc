"""Browsing models whose forward is not one plain method, every form of ``find``, and ``Model.capture``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsight
from fxsight.errors import CaptureError, TraceError
from fxsight.model import Model

X = torch.ones(2, 3)


def ops_of(module: nn.Module) -> Any:
    return Model(module, cache=False).capture(X).ops


def shown(text: object) -> list[str]:
    """What is printed, without files and lines: they change with this file."""
    return [re.sub(r" *\S*test_browsing\.py:\d+", " FILE", line).rstrip() for line in str(text).splitlines()]


def message(error: type[Exception], act: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        act()
    return str(caught.value)


# -- unusual forwards --------------------------------------------------------------------------------------------------


def wrapped(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return torch.abs(fn(*args, **kwargs))

    return wrapper


def hidden(fn: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


class Wrapped(nn.Module):
    @wrapped
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


class WithoutGrad(nn.Module):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


class Hidden(nn.Module):
    @hidden
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


class Base(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.inner(x))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x)


class Inherited(Base):
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)


class Extended(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class Calls(nn.Module):
    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)


class IsLambda(nn.Module):
    forward = lambda self, x: torch.tanh(x)  # noqa: E731


class IsPartial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forward = functools.partial(self.scaled, 2)

    def scaled(self, factor: int, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * factor


class WithLambda(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (lambda v: torch.tanh(v))(x)


def made_by_exec() -> nn.Module:
    scope: dict[str, Any] = {"nn": nn, "torch": torch}
    exec("class Made(nn.Module):\n    def forward(self, x): return torch.tanh(x) + 1", scope)
    made: nn.Module = scope["Made"]()
    return made


def test_a_decorated_forward_is_the_one_below() -> None:
    ops = ops_of(Wrapped())
    assert shown(ops) == [
        "Wrapped  the root module FILE",
        "                  * def forward(self, x: torch.Tensor) -> torch.Tensor:",
        " torch_tanh_0 ->   0     return torch.tanh(x)    # f32[batch, length]",
        "made by decorators, attributes and constructors:",
        "torch_abs    # f32[batch, length]",
    ]
    assert shown(ops.torch_abs) == [
        "/torch_abs",
        "  calls      torch abs",
        "  inputs     (f32[batch, length],)",
        "  output     f32[batch, length]",
        "  operators  aten_abs_0",
    ]


def test_a_forward_without_gradients_is_as_it_is_written() -> None:
    assert shown(ops_of(WithoutGrad())) == [
        "WithoutGrad  the root module FILE",
        "                  * def forward(self, x: torch.Tensor) -> torch.Tensor:",
        " torch_tanh_0 ->   0     return torch.tanh(x)    # f32[batch, length]",
    ]


def test_below_a_decorator_that_does_not_say_what_it_wraps() -> None:
    ops = ops_of(Hidden())
    assert shown(ops)[1:] == [
        "          * def wrapper(*args: Any, **kwargs: Any) -> Any:",
        " fn_0 ->   0     return fn(*args, **kwargs)    # f32[batch, length]",
    ]
    assert shown(ops.fn_0.ops)[1:] == [
        "                  * def forward(self, x: torch.Tensor) -> torch.Tensor:",
        " torch_tanh_0 ->   0     return torch.tanh(x)    # f32[batch, length]",
    ]


def test_an_inherited_forward_calls_the_methods_of_its_class() -> None:
    ops = ops_of(Inherited())
    assert shown(ops) == [
        "Inherited  the root module FILE",
        "                  * def forward(self, x: torch.Tensor) -> torch.Tensor:",
        " self_inner_0 ->   0     return torch.sin(self.inner(x))    # f32[batch, length]",
        " torch_sin_0  ->  +      ...    # f32[batch, length]",
    ]
    assert shown(ops.self_inner_0) == [
        "/self_inner_0",
        "  calls     function inner",
        "  line FILE",
        "  inputs    (Inherited, f32[batch, length])",
        "  output    f32[batch, length]",
        "  opens to  torch_exp_0",
        "",
        "model.self_inner_0:",
        "",
        "    def forward(self, x: torch.Tensor) -> torch.Tensor:",
        "    --> return torch.sin(self.inner(x)) <--",
    ]


def test_the_forward_of_a_base_class_is_a_function() -> None:
    ops = ops_of(Extended())
    assert [op.name for op in ops] == ["forward_0", "operator_add_0"]
    assert [op.name for op in ops.forward_0.ops] == ["self_inner_0", "torch_sin_0"]
    assert [op.name for op in ops.forward_0.ops.self_inner_0.ops] == ["torch_cos_0"]


def test_a_lambda_from_elsewhere_is_a_function() -> None:
    ops = ops_of(Calls(lambda v: torch.tanh(v) + 1))
    assert shown(ops)[2] == " self_fn_0 ->   0     return self.fn(x)    # f32[batch, length]"
    assert shown(ops.self_fn_0)[1] == "  calls     function <lambda>"
    assert shown(ops.self_fn_0)[5] == "  opens to  torch_tanh_0, operator_add_0"
    assert shown(ops.self_fn_0.ops)[0] == "<lambda>  /self_fn_0 FILE"
    model = Model(Calls(lambda v: torch.tanh(v) + 1), cache=False)
    with model.trace(X):
        model.ops.self_fn_0.ops.torch_tanh_0.output[:] = 0
        out = model.output.save()
    assert torch.equal(out, torch.ones(2, 3))


def test_a_lambda_in_a_forward_is_part_of_its_source() -> None:
    assert shown(ops_of(WithLambda()))[2:] == [
        " torch_tanh_0 ->   0     return (lambda v: torch.tanh(v))(x)    # f32[batch, length]",
        " unknown_0    ->  +      ...",
    ]


@pytest.mark.parametrize("module", [IsLambda(), IsPartial()])
def test_a_forward_that_is_a_lambda_or_a_partial(module: nn.Module) -> None:
    ops = ops_of(module)
    assert next(iter(ops)).name == "torch_tanh_0" and "torch.tanh(x)" in str(ops) and "# f32[batch, length]" in str(ops)
    assert ops.torch_tanh_0.type == "f32[batch, length]" and "torch.tanh(x)" in str(ops.torch_tanh_0)


def test_without_a_source_there_is_a_table_of_what_ran() -> None:
    ops = ops_of(made_by_exec())
    assert shown(ops) == [
        "Made  the root module",
        "its forward has no source in Python to read: it is compiled, generated, or from exec",
        "name        line        target  type",
        "torch_tanh  <string>:2  tanh    f32[batch, length]",
        "torch_add   <string>:2  add     f32[batch, length]",
    ]
    assert shown(ops.torch_add) == [
        "/torch_add",
        "  calls      torch add",
        "  line       <string>:2",
        "  inputs     (f32[batch, length], 1)",
        "  output     f32[batch, length]",
        "  operators  aten_add_0",
    ]


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, 1)
        return first + second


def test_operators_of_sizes_and_of_several_values() -> None:
    inside = Model(Halves(), cache=False).capture(torch.ones(2, 4)).ops.x_chunk_0.ops
    assert inside.aten_sym_size_0.type == "length" and inside.aten_sym_size_0.shape is None
    assert inside.aten_split_0.type == "several values: its members are nodes, too"
    assert shown(inside.aten_split_0)[1] == "  calls   operator aten.split.Tensor"


# -- one by number -----------------------------------------------------------------------------------------------------


def test_an_operation_by_its_number() -> None:
    ops = ops_of(Extended())
    assert ops[0] == ops.forward_0 and ops[-1] == ops.operator_add_0
    assert message(IndexError, lambda: ops[2]) == "the root module has 2 operations, 0 to 1; there is no 2"
    assert message(IndexError, lambda: ops_of(nn.Identity())[0]) == "the root module has no operations; there is no 0"
    text = "ops[slice(0, 1, None)]: give a name or a number; for several, list(ops)[...] or ops.find(...)"
    assert message(TypeError, lambda: ops[0:1]) == text


# -- find --------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.layers(x)).view(-1, 3)


FORMS: list[tuple[dict[str, Any], list[str]]] = [
    ({"name": "F_*"}, ["layers.0/F_linear_0", "layers.1/F_relu_0", "layers.2/F_linear_0", "/F_gelu_0"]),
    ({"name": "module_?"}, ["layers/module_0", "layers/module_0#1", "layers/module_0#2"]),
    ({"target": F.gelu}, ["/F_gelu_0"]),
    ({"target": torch.relu}, ["layers.1/F_relu_0"]),
    ({"target": torch.Tensor.view}, ["/view_0"]),
    ({"target": torch.ops.aten.linear.default}, ["layers.0/F_linear_0", "layers.2/F_linear_0"]),
    ({"target": nn.ReLU}, ["layers/module_0#1"]),
    ({"target": "gelu"}, ["/F_gelu_0"]),
    ({"target": "aten.view.*"}, ["/view_0"]),
    ({"target": "Lin*"}, ["layers/module_0", "layers/module_0#2"]),
    ({"shape": ("batch", 8), "module_class": nn.Module}, ["layers/module_0", "layers/module_0#1"]),
    ({"shape": (None, 8), "name": "F_*"}, ["layers.0/F_linear_0", "layers.1/F_relu_0"]),
    ({"shape": (..., 8), "name": "F_*"}, ["layers.0/F_linear_0", "layers.1/F_relu_0"]),
    ({"shape": "f32[batch, 8]", "target": "relu"}, ["layers.1/F_relu_0"]),
    ({"shape": "f16[batch, 8]"}, []),
    ({"module_class": nn.Linear}, ["layers/module_0", "layers/module_0#2"]),
    ({"module_class": "Linear"}, ["layers/module_0", "layers/module_0#2"]),
    ({"module_class": nn.Module, "recursive": False}, ["/self_layers_0"]),
    ({"name": "F_*", "recursive": False}, ["/F_gelu_0"]),
    ({"name": "nothing"}, []),
]


@pytest.fixture(scope="module")
def two() -> Model:
    return Model(Two(), cache=False).capture(X)


@pytest.mark.parametrize("form, expected", FORMS, ids=range(len(FORMS)))
def test_every_form_of_find(two: Model, form: dict[str, Any], expected: list[str]) -> None:
    assert [str(op.address) for op in two.ops.find(**form)] == expected


def test_what_was_found_is_had_by_its_address(two: Model) -> None:
    with two.trace(X) as tracer:
        found = two.ops.find(target="relu")[0]
        first, second = found.output.save(), tracer.at(found.address).output.save()
    assert torch.equal(first, second)


# -- capture -----------------------------------------------------------------------------------------------------------


def test_capture_returns_the_model_and_captures_once() -> None:
    model = Model(Two(), cache=False)
    assert model.capture(X) is model and model.capture(torch.ones(5, 3)) is model
    assert model._captures.made == 1 and "F_gelu_0" in model.ops
    with model.trace(X):
        model.output.save()
    assert model._captures.made == 1


class Branch(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.sin(x) if mask is None else torch.cos(x) * mask


def test_what_was_captured_last_is_shown() -> None:
    model = Model(Branch(), cache=False).capture(X)
    assert "torch_sin_0" in model.ops and "torch_cos_0" not in model.ops
    model.capture(X, mask=torch.ones(2, 3))
    assert "torch_sin_0" not in model.ops and "torch_cos_0" in model.ops
    model.capture(X)
    assert "torch_sin_0" in model.ops


def test_capture_without_weights() -> None:
    with torch.device("meta"):
        model = Model(Two(), cache=False)
    assert model.capture(X.to("meta")).ops.self_layers_0.type == "f32[batch, 3]"


def test_capture_in_a_trace_changes_nothing_of_it() -> None:
    model = Model(Branch(), cache=False)
    with model.trace(X):
        model.capture(X, torch.ones(2, 3))
        assert "torch_sin_0" in model.ops
        out = model.output.save()
    assert torch.equal(out, torch.sin(X)) and "torch_cos_0" in model.ops


class ByNumbers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_capture_of_what_cannot_be_captured() -> None:
    model = Model(ByNumbers(), cache=False)
    assert "depends on the numbers in a tensor" in message(CaptureError, lambda: model.capture(X))
    assert "nothing has been captured yet; model.capture(*inputs)" in str(model.ops)
    assert "nothing has been captured yet" in message(TraceError, lambda: model.ops.find(name="*"))


def test_a_trace_says_what_it_is_about() -> None:
    model = fxsight.Model(Two(), cache=False)
    with model.trace(X) as tracer:
        assert tracer.captured is model._captures.latest and dict(tracer.sizes) == {"batch": 2}
