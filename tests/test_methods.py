"""Methods other than forward: plain calls, traces, operations, keys in memory and on disk."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from fxsight import CaptureError, Model, NotExecuted, TraceError
from fxsight.methods import Method


class Auto(nn.Module):
    """An autoencoder whose parts can be asked for on their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Linear(4, 8)
        self.dec = nn.Linear(8, 4)
        self.gain = 2.0

    def forward(self, x: torch.Tensor) -> Any:
        return self.decode(self.encode(x))

    def encode(self, x: torch.Tensor, *, shift: float = 0.0) -> Any:
        hidden = self.enc(x) + shift
        codes = torch.relu(hidden)
        return codes * self.gain

    def decode(self, codes: torch.Tensor) -> Any:
        return self.dec(codes)

    def score(self, x: torch.Tensor) -> Any:
        """How well it is rebuilt."""
        return (self(x) - x).pow(2).mean(-1)

    def branch(self, x: torch.Tensor) -> Any:
        return x if x.sum() > 0 else self.enc(x)


def _x() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def net() -> Auto:
    return Auto()


def test_a_plain_call_is_the_methods(net: Auto) -> None:
    model = Model(net)
    assert torch.equal(model.encode(_x()), net.encode(_x()))
    assert torch.equal(model.encode(_x(), shift=1.0), net.encode(_x(), shift=1.0))
    assert model.score.__doc__ == "How well it is rebuilt." and model.encode.__name__ == "encode"
    assert str(inspect.signature(model.encode)) == str(inspect.signature(net.encode))
    assert repr(model.encode) == "<method encode of Auto>" and model.encode is model.method("encode")
    assert not isinstance(model.forward, Method) and not isinstance(model.parameters, Method)


def test_reads_against_hooks(net: Auto) -> None:
    model = Model(net)
    with model.encode.trace(_x()) as tracer:
        hidden = model.enc.output.save()
        given = model.enc.input.save()
        out = model.output.save()
        same = tracer.result.save()
        relu = model.encode.ops.torch_relu_0.output.save()
    seen: list[torch.Tensor] = []
    handle = net.enc.register_forward_hook(lambda m, a, o: seen.append(o))
    expected = net.encode(_x())
    handle.remove()
    assert torch.equal(hidden, seen[0]) and torch.equal(given, _x())
    assert torch.equal(out, expected) and torch.equal(same, expected)
    assert torch.equal(relu, torch.relu(seen[0]))
    assert tracer.program.program.name == "Auto.encode"


def test_writes_against_hooks(net: Auto) -> None:
    model = Model(net)
    with model.method("encode").trace(_x()):
        model.enc.output[:, 0] = 1
        edited = model.output.save()
    with model.encode.trace(_x()):
        model.encode.ops.torch_relu_0.output *= 3
        scaled = model.output.save()

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones_like(output[:, :1]), output[:, 1:]], 1)

    handle = net.enc.register_forward_hook(hook)
    assert torch.equal(edited, net.encode(_x()))
    handle.remove()
    assert torch.equal(scaled, torch.relu(net.enc(_x())) * 3 * 2.0)


def test_keyword_arguments_and_structure(net: Auto) -> None:
    model = Model(net)
    with model.encode.trace(_x(), shift=0.5):
        args, kwargs = model.inputs
        out = model.output.save()
    assert len(args) == 1 and kwargs == {"shift": 0.5}
    assert torch.equal(out, net.encode(_x(), shift=0.5))


def test_a_method_that_calls_the_module(net: Auto) -> None:
    model = Model(net)
    with model.score.trace(_x()):
        out = model.output.save()
        forward = model.call(1).output.save()
        rebuilt = model.dec.output.save()
    assert torch.equal(out, net.score(_x())) and torch.equal(forward, net(_x())) and torch.equal(rebuilt, forward)


def test_a_part_that_the_method_does_not_call(net: Auto) -> None:
    model = Model(net)
    with pytest.raises(NotExecuted, match="this forward never calls the module 'dec'"), model.encode.trace(_x()):
        model.dec.output.save()


def test_forms_of_a_trace(net: Auto) -> None:
    model = Model(net)
    assert torch.equal(model.encode.trace(_x(), trace=False), net.encode(_x()))
    with model.encode.scan(_x()):
        shape = model.output.shape
    assert shape == (3, 8)
    with pytest.raises(TraceError, match="needs an input"), model.encode.trace():
        pass
    with model.encode.trace(_x()), pytest.raises(TraceError, match="a trace inside a trace"):  # noqa: SIM117
        with model.trace(_x()):
            pass


def test_inside_a_block_it_is_the_plain_method_on_values(net: Auto) -> None:
    model = Model(net, methods=["encode"])
    with model.trace(_x()):
        codes = model.encode(model.input * 2).save()
    assert torch.equal(codes, net.encode(_x() * 2))


def test_declared_methods(net: Auto) -> None:
    model = Model(net, methods=["encode"])
    with model.encode(_x()) as tracer:
        hidden = model.enc.output.save()
        assert tracer is not None
    assert torch.equal(hidden, net.enc(_x()))
    assert torch.equal(model.encode(_x(), trace=False), net.encode(_x()))
    assert torch.equal(model.decode(net.encode(_x())), net(_x()))
    other = copy.deepcopy(model)
    with other.encode(_x()):
        again = other.enc.output.save()
    assert torch.equal(again, hidden)


def test_a_method_that_is_not_there(net: Auto) -> None:
    with pytest.raises(AttributeError, match="Auto has no method 'encod'; did you mean 'encode'"):
        Model(net, methods=["encod"])
    with pytest.raises(AttributeError, match="Auto has no method 'gain'"):
        Model(net).method("gain")


def test_operations_of_a_method(net: Auto) -> None:
    model = Model(net, cache=False)
    text = str(model.encode.ops)
    assert "def encode(" in text and "torch_relu_0" in text and "not captured" not in text.splitlines()[0]
    with model.encode.trace(_x()):
        pass
    assert [op.name for op in model.encode.ops] == ["self_enc_0", "torch_relu_0", "add_0", "mul_0"] or {
        "self_enc_0",
        "torch_relu_0",
    } <= {op.name for op in model.encode.ops}
    assert "def forward(" in str(model.ops), "the forward's own operations stay the model's"
    with model.trace(_x()):
        pass
    assert "self_decode_0" in model.ops and "self_decode_0" not in model.encode.ops


def test_keys_in_memory(net: Auto) -> None:
    model = Model(net, cache=False)
    codes = torch.ones(3, 4)
    for _ in range(2):
        with model.encode.trace(codes):
            a = model.output.save()
        with model.trace(codes):
            b = model.output.save()
        with model.score.trace(codes):
            c = model.output.save()
    assert [tuple(t.shape) for t in (a, b, c)] == [(3, 8), (3, 4), (3,)]
    assert model._captures.made == 3


def test_keys_on_disk() -> None:
    for made in (3, 0):
        model = Model(Auto())
        with model.encode.trace(torch.ones(3, 4)[None, None, None]):
            a = model.output.save()
        with model.trace(torch.ones(3, 4)[None, None, None]):
            b = model.output.save()
        with model.score.trace(torch.ones(3, 4)[None, None, None]):
            c = model.output.save()
        assert [t.shape[-1] for t in (a, b, c)] == [8, 4, 3]
        assert model._captures.made == made


def test_settings_that_change_are_seen(net: Auto) -> None:
    model = Model(net)
    with model.encode.trace(_x()):
        one = model.output.save()
    net.gain = 3.0
    with model.encode.trace(_x()):
        two = model.output.save()
    assert torch.equal(two, net.encode(_x())) and not torch.equal(one, two)


def test_a_method_that_cannot_be_captured(net: Auto) -> None:
    model = Model(net)
    with pytest.raises(CaptureError, match=r"^Auto.branch cannot be captured as one graph"), model.branch.trace(_x()):
        pass
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert "forward" not in vars(net) and torch.equal(model(_x()), net(_x()))
