"""Misuses of the API: each is refused at the user's line, with a text that says the place, the fact and the fix."""

# ruff: noqa: B018, C416 (to look at a value and do nothing with it is what many misuses are)

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import fxsight
from fxsight.errors import (
    AddressError,
    CausalityError,
    InputError,
    LostEditWarning,
    NotExecuted,
    NotSavedError,
    TraceError,
    UnknownAddress,
    WriteError,
)

_OURS = str(Path(fxsight.__file__).parent)
_PASSES = str(Path(fxsight.__file__).parent.parent / "passes")
_TORCH = str(Path(torch.__file__).parent)


@dataclass
class Out(ModelOutput):  # type: ignore[misc]
    logits: Tensor | None = None
    hidden: Tensor | None = None


class Gate(nn.Module):
    """Returns a number where it is asked for one, and nothing to write."""

    def forward(self, x: Tensor) -> tuple[int, None]:
        return x.shape[-1], None


class Net(nn.Module):
    """Three layers, one that is never called, a branch that is never taken, a tuple, and a ModelOutput."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.unused, self.gate, self.cell = nn.Linear(4, 4), Gate(), nn.GRU(4, 4, batch_first=True)
        self.careful = False

    def forward(self, x: Tensor) -> Out:
        self.gate(x)
        for layer in self.layers:
            x = layer(x).tanh()
        if self.careful:
            x = x.clamp(-1, 1)  # untaken
        both = x.chunk(2, -1)
        return Out(logits=both[0] + both[1], hidden=x)


@cache
def _model() -> fxsight.Model:
    torch.manual_seed(0)
    return fxsight.Model(Net().eval(), cache=False)


def _x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(1))


def _misuse(body: Callable[[], object], error: type[BaseException], message: str) -> None:
    """Expect exactly this text (``{here}`` for the user's file), raised at a line that ends in ``# here``."""
    with pytest.raises(error) as caught:
        body()
    assert str(caught.value).replace(__file__, "{here}") == message
    assert type(caught.value) is error
    frames = [
        f
        for f in traceback.extract_tb(caught.value.__traceback__)
        if not f.filename.startswith((_OURS, _PASSES, _TORCH))
    ]
    assert frames[-1].line is not None and frames[-1].line.endswith("# here"), frames[-1]


def _line(body: Callable[..., object], mark: str) -> int:
    """The number of the line in a test's function that ends in a mark."""
    lines = Path(__file__).read_text().splitlines()
    first = body.__code__.co_firstlineno
    return next(n for n, text in enumerate(lines[first - 1 :], first) if text.endswith(f"# {mark}"))


# ------------------------------------------------------------------------------------------ what torch itself says


def test_index_out_of_range_in_an_edit() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[0].output[:, 4] = 0  # here

    _misuse(body, IndexError, "index 4 is out of bounds for dimension 1 with size 4")


def test_index_out_of_range_in_a_read() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[0].output[2]  # here

    _misuse(body, IndexError, "index 2 is out of bounds for dimension 0 with size 2")


def test_shapes_that_torch_cannot_combine() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[0].output @ torch.zeros(3, 3)  # here

    _misuse(body, RuntimeError, "a and b must have same reduction dim, but got [2, 4] X [3, 3].")


# ---------------------------------------------------------------------------------------------- what cannot be written


def test_wrong_shape() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[1].output = torch.zeros(2, 3)  # here

    message = "layers.1:output is f32[2, 4], and what is written is f32[2, 3] on cpu; the shapes cannot be broadcast"
    _misuse(body, WriteError, message)


def test_wrong_shape_of_a_value() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[1].input = _model().layers[0].output[None, None]  # here

    message = (
        "layers.1:input is f32[2, 4], and what is written is f32[1, 1, 2, 4] on cpu; the shapes cannot be broadcast"
    )
    _misuse(body, WriteError, message)


def test_a_member_of_another_structure() -> None:
    model = fxsight.Model(nn.Sequential(nn.GRU(4, 4, batch_first=True)), cache=False)

    def body() -> None:
        with model.trace(_x()[:, None]):
            model[0].output[1] = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))  # here

    _misuse(body, WriteError, "0: member 1 is one tensor, and what is written is a tuple of 2")


def test_wrong_device() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[1].output = torch.zeros(2, 4, device="meta")  # here

    message = "layers.1:output is f32[2, 4] on cpu, and what is written is f32[2, 4] on meta; write value.to('cpu')"
    _misuse(body, WriteError, message)


def test_wrong_dtype() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[1].output = _model().layers[1].output.double()  # here

    message = (
        "layers.1:output is f32[2, 4] on cpu, and what is written is f64[2, 4] on cpu; write value.to(torch.float32)"
    )
    _misuse(body, WriteError, message)


def test_wrong_structure() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[1].output = (torch.zeros(2, 4),)  # here

    message = (
        "layers.1:output is one tensor, and what is written is a tuple of 1; "
        "write the same structure, or one member: .output[0] = ..."
    )
    _misuse(body, WriteError, message)


def test_one_tensor_where_a_structure_is() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[1].inputs = torch.zeros(2, 4)  # here

    message = (
        "layers.1:inputs is a tuple of 2, and what is written is one tensor; "
        "write the same structure, or one member: .inputs[0] = ..."
    )
    _misuse(body, WriteError, message)


@pytest.mark.parametrize("value, name", [("a", "str"), (None, "NoneType"), (object(), "object")])
def test_what_is_no_tensor(value: Any, name: str) -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[1].output = value  # here

    _misuse(body, WriteError, f"layers.1:output is f32[2, 4], and what is written is a {name}")


def test_a_module_without_a_tensor_output() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().gate.output = torch.zeros(2)  # here

    _misuse(body, WriteError, "gate:output is 4, None: there is no tensor to write")


def test_a_member_that_is_no_tensor() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().gate.output[1] = torch.zeros(2)  # here

    _misuse(body, TypeError, "'tuple' object does not support item assignment")


def test_a_member_of_a_model_output_assigned() -> None:
    def body() -> None:
        with _model().trace(_x()):  # here
            out = _model().output
            out.logits = torch.zeros(2, 2)

    message = (
        "a member of :output was assigned, which the model does not see; change it in place "
        "(out.logits[:] = ...) or write the whole (model.output = ...)"
    )
    _misuse(body, WriteError, message)


# ---------------------------------------------------------------------------------------------------- names


def test_unknown_operation() -> None:
    def body() -> None:
        with _model().trace(_x()) as tracer:
            tracer.at("/x_chnk_0").output  # here

    message = (
        "no operation 'x_chnk_0' in the root module; did you mean 'x_chunk_0', 'aten_chunk_0'?\n"
        "  it has: self_gate_0, layer_0, tanh_0, x_chunk_0, operator_add_0"
    )
    _misuse(body, UnknownAddress, message)


def test_an_operation_on_a_branch_that_is_not_taken() -> None:
    def body() -> None:
        with _model().trace(_x()) as tracer:
            tracer.at("/x_clamp_0").output  # here

    line = _line(Net.forward, "untaken")
    message = f"/x_clamp_0: on a branch that this forward does not take (line {line}: x.clamp(-1, 1))"
    _misuse(body, NotExecuted, message)


def test_an_operation_that_runs_less_often() -> None:
    def body() -> None:
        with _model().trace(_x()) as tracer:
            tracer.at("/tanh_0#3").output  # here

    _misuse(body, NotExecuted, "/tanh_0#3: tanh_0 runs 3 times here; the last is tanh_0#2")


def test_a_module_that_is_not_called() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().unused.output  # here

    message = (
        "unused: this forward never calls the module 'unused', so it has no input and no output; "
        "see model.ops for what runs\n"
        "  it has values after a call in this block: model['unused'](...)"
    )
    _misuse(body, NotExecuted, message)


def test_a_call_too_many() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[0].call(1).output  # here

    _misuse(body, NotExecuted, "layers.0#1: this forward calls 'layers.0' once; the last is layers.0")


def test_a_module_that_does_not_exist() -> None:
    def body() -> None:
        with _model().trace(_x()) as tracer:
            tracer.at("layers.7").output  # here

    message = (
        "layers.7: this forward never calls the module 'layers.7', so it has no input and no output; "
        "did you mean 'layers.2', 'layers.1', 'layers.0'?"
    )
    _misuse(body, NotExecuted, message)


def test_no_address_at_all() -> None:
    def body() -> None:
        with _model().trace(_x()) as tracer:
            tracer.at("layers 0")  # here

    message = "not an address: 'layers 0': cannot read 'layers 0'; write for example 'h.3.mlp/self_act_0:output[0]'"
    _misuse(body, AddressError, message)


def test_unknown_attribute_of_a_view() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layer.output  # here

    message = "Net at the root has no attribute 'layer'; it has layers, unused, gate, cell"
    _misuse(body, AttributeError, message)


def test_unknown_attribute_of_a_leaf_module() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[0].outptu  # here

    _misuse(body, AttributeError, "Linear at layers.0 has no attribute 'outptu'; it has no children")


def test_index_of_a_module_list_out_of_range() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[3].output  # here

    _misuse(body, IndexError, "layers has 3 modules, 0 to 2; there is no 3")


# ------------------------------------------------------------------------------------------------- when it is used

AFTER: dict[str, Callable[[Any], object]] = {
    "+": lambda v: v + 1,  # here
    "print": lambda v: print(v),  # here
    "str": lambda v: f"{v}",  # here
    ".value": lambda v: v.value,  # here
    "index": lambda v: v[0],  # here
    "len": lambda v: len(v),  # here
    "shape": lambda v: v.shape,  # here
    "sum": lambda v: torch.sum(v),  # here
    "bool": lambda v: bool(v.sum() > 0),  # here
    "numpy": lambda v: v.numpy(),  # here
    "save": lambda v: v.save(),  # here
    "edit": lambda v: v.mul_(2),  # here
    "iterate": lambda v: [row for row in v],  # here
    "list": lambda v: fxsight.save([v]),  # here
}


def _unsaved() -> Any:
    with _model().trace(_x()):
        return _model().layers[0].output  # made


@pytest.mark.parametrize("use", AFTER)
def test_a_value_used_after_its_block(use: str) -> None:
    value = _unsaved()
    message = (
        "Accessing value before it's been set. layers.0:output (float32[2, 4]), made at "
        f"{{here}}:{_line(_unsaved, 'made')}, was not saved: write .save() where it is made"
    )
    _misuse(lambda: AFTER[use](value), NotSavedError, message)


@pytest.mark.filterwarnings("ignore:.*nothing uses the result")
def test_a_result_used_after_its_block() -> None:
    def body() -> None:
        with _model().trace(_x()):
            value = _model().layers[0].output * 2
        value + 1  # here

    message = (
        "Accessing value before it's been set. the result of torch.Tensor.mul (float32[2, 4]), made at "
        f"{{here}}:{_line(body, 'here') - 1}, was not saved: write .save() where it is made"
    )
    _misuse(body, NotSavedError, message)


def test_an_unsaved_value_in_a_later_trace() -> None:
    def body() -> None:
        value = _unsaved()
        with _model().trace(_x()):
            _model().layers[1].output + value  # here

    message = (
        "Accessing value before it's been set. layers.0:output (float32[2, 4]), made at "
        f"{{here}}:{_line(_unsaved, 'made')}, was not saved: write .save() where it is made"
    )
    _misuse(body, NotSavedError, message)


def test_an_unsaved_value_written_in_a_later_trace() -> None:
    def body() -> None:
        value = _unsaved()
        with _model().trace(_x()):
            _model().layers[1].output = value  # here

    message = (
        "Accessing value before it's been set. layers.0:output (float32[2, 4]), made at "
        f"{{here}}:{_line(_unsaved, 'made')}, was not saved: write .save() where it is made"
    )
    _misuse(body, NotSavedError, message)


def test_a_value_outside_a_trace() -> None:
    def body() -> None:
        _model().layers[0].output  # here

    _misuse(body, TraceError, "layers.0:output has a value only inside a trace: with model.trace(...):")


def test_a_write_outside_a_trace() -> None:
    def body() -> None:
        _model().layers[0].input = 0  # here

    _misuse(body, TraceError, "layers.0:input has a value only inside a trace: with model.trace(...):")


def test_a_place_of_a_trace_that_has_ended() -> None:
    def body() -> None:
        with _model().trace(_x()) as tracer:
            pass
        tracer.at("layers.0").output  # here

    _misuse(body, TraceError, "layers.0:output has a value only inside a trace: with model.trace(...):")


def test_a_trace_inside_a_trace() -> None:
    def body() -> None:
        with _model().trace(_x()), _model().trace(_x()):  # here
            pass

    _misuse(body, TraceError, "a trace inside a trace of the same model: end the first block, or use model.session()")
    assert _model().trace(_x()).__enter__().__exit__(None, None, None) is None


def test_a_program_before_the_block_has_ended() -> None:
    def body() -> None:
        with _model().trace(_x()) as tracer:
            print(tracer.program)  # here

    _misuse(body, TraceError, "the program is finished when the block ends (in a session, when that ends): use it then")


def test_values_of_two_traces() -> None:
    def body() -> None:
        other = fxsight.Model(_model()._module, cache=False)
        with _model().trace(_x()), other.trace(_x()):
            _model().layers[0].output + other.layers[1].output  # here

    message = (
        "values of two traces in one call: layers.0:output, layers.1:output; save the first and use it after its block"
    )
    _misuse(body, TraceError, message)


def test_a_value_of_one_trace_written_in_another() -> None:
    def body() -> None:
        other = fxsight.Model(_model()._module, cache=False)
        with _model().trace(_x()):
            value = _model().layers[0].output
            with other.trace(_x()):
                other.layers[1].output = value  # here

    message = (
        "layers.1:output is written layers.0:output, a value of another trace; "
        "save it there and write it after that block"
    )
    _misuse(body, TraceError, message)


# ------------------------------------------------------------------------------------------------------- causality


def _causality(body: Callable[..., object], location: str, through: str) -> None:
    message = (
        f"{{here}}:{_line(body, 'here')}: what is written to {location} depends on what lies downstream of it:\n"
        f"  {location} -> {through} -> {location}\n"
        "  read it in a first trace and write it in a second: with model.session(): with model.trace(x): v = ...save()"
    )
    _misuse(body, CausalityError, message)


def test_causality_of_an_assignment() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[0].output = _model().layers[2].output  # here

    _causality(body, "layers.0:output", "layers.2:output")


def test_causality_through_layers() -> None:
    def body() -> None:
        with _model().trace(_x()):
            first, last = _model().layers[1].output, _model().layers[2].input
            _model().layers[0].input = (first + last).relu() * 2  # here

    _causality(body, "layers.0:input", "layers.1:output -> layers.2:input")


def test_causality_names_only_what_is_on_the_way() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[1].output.save()
            _model().layers[0].output = _model().layers[2].output  # here

    _causality(body, "layers.0:output", "layers.2:output")


def test_causality_of_an_in_place_edit() -> None:
    def body() -> None:
        with _model().trace(_x()):
            _model().layers[0].output[:, 0] = _model().layers[1].output[:, 0]  # here

    _causality(body, "layers.0:output", "layers.1:output")


def test_a_value_that_an_edit_has_cut_loose_is_causal() -> None:
    """What stands downstream of a location in the model need not depend on it any more."""
    net, x = _model()._module, _x()
    with torch.no_grad(), _model().trace(x):
        _model().layers[1].input = _model().layers[0].output * 2
        _model().layers[0].output = _model().layers[1].output
        written = _model().layers[0].output.save()
        hidden = _model().output.hidden.save()
    with torch.no_grad():
        expected = net.layers[1](net.layers[0](x) * 2)
        assert torch.equal(written, expected)
        assert torch.equal(hidden, net.layers[2](expected.tanh()).tanh())


def test_causality_of_a_whole_stack() -> None:
    def body() -> None:
        with _model().trace(_x()):
            stack = torch.stack([layer.output for layer in _model().layers])
            _model().layers[0].output = (stack * 2).unbind(0)[0]  # here

    _causality(body, "layers.0:output", "layers.1:output -> layers.2:output")


def test_a_stack_taken_apart_is_causal_though_it_is_used_elsewhere() -> None:
    with torch.no_grad(), _model().trace(_x()):
        stack = torch.stack([layer.output for layer in _model().layers])
        mean = stack.mean(0).save()  # type: ignore[attr-defined]
        _model().layers[1].output = stack.unbind(0)[0]
    assert mean.shape == (2, 4)


# ---------------------------------------------------------------------------------------------------- lost edits


def test_editing_a_stale_handle() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _model().trace(_x()):
            old = _model().layers[0].output
            _model().layers[0].output = old * 2
            old[:, 0] = 0
            line = _line(test_editing_a_stale_handle, "line") - 1
            kept = _model().layers[0].output.save()  # line
    assert [w.category for w in caught] == [LostEditWarning]
    assert str(caught[0].message) == (
        f"{__file__}:{line - 1}: this in-place edit changes a value read before layers.0:output was written again; "
        "it has no effect on the model: read the location anew and edit that"
    )
    assert (caught[0].filename, caught[0].lineno) == (__file__, line - 1)
    assert torch.equal(kept, _model()._module.layers[0](_x()) * 2)


# ------------------------------------------------------------------------------------------------------- constants


def test_a_constant_changed_after_its_use() -> None:
    def body() -> None:
        mine = torch.zeros(4)
        with _model().trace(_x()):  # here
            _model().layers[0].output += mine
            mine[0] = 1

    message = (
        "a tensor [4] used in this body was changed in place afterwards; use a copy: t.clone(), and for "
        "`t[i] += value` write t[i].add_(value)"
    )
    _misuse(body, InputError, message)


def test_saving_nothing() -> None:
    def body() -> None:
        with _model().trace(_x()):
            fxsight.save({"a": [1, None]})  # here

    _misuse(body, TraceError, "nothing to save: no value of a trace in it")


# -------------------------------------------------------------------------------------------------------- programs


def _program() -> Any:
    with _model().trace(_x()) as tracer:
        _model().layers[1].output.save()
    return tracer.program


@pytest.mark.parametrize(
    "args, kwargs, given",
    [
        ((), {}, "()"),
        ((torch.zeros(2, 4), None), {}, "(f32[2, 4], None)"),
        ((), {"x": torch.zeros(2, 4)}, "(x=f32[2, 4])"),
        (([torch.zeros(2, 4), 1.0],), {}, "([f32[2, 4], 1.0])"),
        ((torch.zeros(2, 4),), {"mask": {"a": True}}, "(f32[2, 4], mask={'a': True})"),
    ],
)
def test_a_program_called_with_another_structure(args: Any, kwargs: Any, given: str) -> None:
    program = _program()
    message = f"the program takes (f32[batch, 4]), and is given {given}; call it as the model was called in its trace"
    _misuse(lambda: program(*args, **kwargs), InputError, message)  # here


AGAIN = "trace again with these inputs"


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.zeros(2, 4, dtype=torch.float64), "input 0 is f64[2, 4], and this program takes f32[batch, 4]"),
        (torch.zeros(4), "input 0 is f32[4], and this program takes f32[batch, 4]"),
        (torch.zeros(2, 5), "input 0 is f32[2, 5], and this program takes f32[batch, 4] with batch = 2"),
        (3, "input 0 is 3, and this program takes f32[batch, 4]"),
        (torch.zeros(2, 4, device="meta"), "input 0 is on meta, and this program runs on cpu"),
    ],
)
def test_a_program_called_with_wrong_inputs(given: Any, message: str) -> None:
    program = _program()
    _misuse(lambda: program(given), InputError, f"{message}; {AGAIN}")  # here


class _Asks(nn.Module):
    """Its forward asks two things about sizes."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if x.shape[0] == 7:
            return x
        return x * scale if x.shape[1] > 2 else -x


@pytest.mark.parametrize(
    "given, message",
    [
        ((torch.zeros(7, 4), 2.0), "this program holds where batch != 7, and not for batch = 7"),
        ((torch.zeros(2, 2), 2.0), "length is 2, and this program holds for length >= 3"),
        ((torch.zeros(2, 4), 3.0), "an input that is not a tensor is part of the program: it was 2.0, not 3.0"),
    ],
)
def test_a_program_called_with_inputs_it_does_not_hold_for(given: Any, message: str) -> None:
    model = fxsight.Model(_Asks(), cache=False)
    with model.trace(torch.zeros(2, 4), 2.0) as tracer:
        model.output.save()
    _misuse(lambda: tracer.program(*given), InputError, f"{message}; {AGAIN}")  # here


def test_a_program_that_has_looked_at_a_size() -> None:
    def body() -> None:
        with _model().trace(_x()) as tracer:
            hidden = _model().layers[0].output
            (hidden.sum() / hidden.shape[0]).save()
        tracer.program(_x(3))  # here

    _misuse(
        body,
        InputError,
        "the body looked at sizes, or uses a tensor of that size, so its program holds for batch = 2, not 3; "
        "trace again",
    )


# ------------------------------------------------------------------------------------------------------- gradients


def test_transforms_of_functions() -> None:
    def body() -> None:
        with _model().trace(_x()):
            torch.vmap(lambda row: row * 2)(_model().layers[0].output)  # here

    message = (
        "aten.mul.Tensor was reached without being recorded: torch.vmap and the other transforms of torch.func do not "
        "see through values of a trace; write it without them, or as fxsight.apply(torch.vmap(f), value)"
    )
    _misuse(body, TraceError, message)
    model = _model()
    with model.trace(_x()):
        rows = fxsight.apply(torch.vmap(torch.neg), model.layers[0].output).save()
        plain = model.layers[0].output.save()
    assert torch.equal(rows, -plain)


# ------------------------------------------------------------------------------------------- the model is unharmed


def test_a_model_can_be_traced_after_every_misuse() -> None:
    for misuse in (test_index_out_of_range_in_an_edit, test_wrong_dtype, test_causality_of_an_assignment):
        misuse()
        with torch.no_grad(), _model().trace(_x()):
            kept = _model().layers[0].output.save()
        assert torch.equal(kept, _model()._module.layers[0](_x()))
