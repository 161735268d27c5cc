"""Modules attached to a model: called on values in a body, their own values, and captures that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxsight import Model, NotExecuted, WriteError
from fxsight.errors import TraceError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.tanh(self.lin(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l0 = Block()
        self.l1 = Block()
        self.tail = nn.Sequential(nn.Linear(4, 4))
        self.spare = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.tail(self.l1(self.l0(x)))


class Sae(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enc = nn.Linear(4, width)
        self.dec = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        return self.dec(torch.relu(self.enc(x)) * scale)


def _x() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def model(net: Net) -> Model:
    return Model(net, cache=False)


def _spliced(net: Net, sae: nn.Module) -> torch.Tensor:
    """What the model returns with the output of ``l0`` sent through ``sae``."""
    handle = net.l0.register_forward_hook(lambda m, a, o: sae(o))
    out: torch.Tensor = net(_x())
    handle.remove()
    return out


def test_values_of_an_attached_module(model: Model, net: Net) -> None:
    sae = Sae()
    model.l0.attachment = sae
    with model.trace(_x()) as tracer:
        hidden = model.l0.output
        model.l0.output = model.l0.attachment(hidden, hook=True)
        out = model.output.save()
        codes = model.l0.attachment.enc.output.save()
        rebuilt = model.l0.attachment.output.save()
        given = model.l0.attachment.input.save()
        args, kwargs = model.l0.attachment.dec.inputs
        kept = args[0].save()
    block: Any = net.l0(_x())
    assert torch.equal(out, _spliced(net, sae))
    assert torch.equal(codes, sae.enc(block)) and torch.equal(rebuilt, sae(block)) and torch.equal(given, block)
    assert torch.equal(kept, torch.relu(sae.enc(block)) * 1.0) and kwargs == {}
    assert net.l0.attachment is sae and not any(part._forward_hooks for part in net.modules())
    names = {str(binding.key) for binding in tracer.program.program.bindings.values() if binding.kind == "weight"}
    assert {"l0.attachment.enc.weight", "l0.attachment.dec.bias", "tail.0.weight"} <= names
    assert not any(binding.kind == "constant" for binding in tracer.program.program.bindings.values())


def test_its_weights_are_shared_and_looked_up_live(model: Model, net: Net) -> None:
    model.l0.attachment = Sae()

    def traced() -> Any:
        with model.trace(_x()):
            model.l0.output = model.l0.attachment(model.l0.output)
            return model.output.save()

    first = traced()
    with torch.no_grad():
        net.l0.attachment.dec.weight.mul_(2)  # type: ignore[union-attr, operator]
    second = traced()
    assert torch.equal(second, _spliced(net, net.l0.attachment)) and not torch.equal(first, second)  # type: ignore[arg-type]
    torch.manual_seed(7)
    other = Sae()
    nn.init.ones_(other.enc.weight)
    model.l0.attachment = other
    assert torch.equal(traced(), _spliced(net, other))
    assert model._captures.made == 1


def test_gradients_are_none_of_its_business(model: Model) -> None:
    model.l0.attachment = Sae()
    with model.trace(_x()):
        out = model.l0.attachment(model.l0.output, scale=2.0).save()
    out.sum().backward()
    assert model.l0.attachment.dec.weight.grad is not None


def test_attached_and_not_called_needs_no_capture(model: Model, net: Net) -> None:
    with model.trace(_x()):
        before = model.output.save()
    model.l0.attachment = Sae()
    model.l1.attachment = Sae(8)
    with model.trace(_x()):
        after = model.output.save()
    assert torch.equal(before, after) and model._captures.made == 1
    model.l1.attachment = Sae(32)
    model.l0.attachment.train(False)
    with model.trace(_x()):
        model.output.save()
    del model.l0.attachment
    with model.trace(_x()):
        model.output.save()
    assert model._captures.made == 1
    model.l1.lin = nn.Linear(4, 4, bias=False)
    with model.trace(_x()):
        swapped = model.output.save()
    assert torch.equal(swapped, net(_x())) and model._captures.made == 2


def test_attached_where_the_forward_sees_it(model: Model, net: Net) -> None:
    with model.trace(_x()):
        model.output.save()
    model.tail.more = nn.Tanh()  # a Sequential runs all it has
    with model.trace(_x()):
        after = model.output.save()
    assert torch.equal(after, net(_x())) and model._captures.made == 2


class Listing(Net):
    """Its forwards find their parts by asking."""

    @property
    def extra(self) -> list[nn.Module]:
        return [part for name, part in self.named_children() if name.startswith("x")]

    def forward(self, x: torch.Tensor) -> Any:
        for part in self.extra:
            x = part(x)
        return self.tail(x)


class Direct(Net):
    def forward(self, x: torch.Tensor) -> Any:
        for name in sorted(self._modules):
            part: Any = self._modules[name]
            x = part(x) if name.startswith("x") else x
        return self.tail(x)


class Counting(Net):
    def forward(self, x: torch.Tensor) -> Any:
        count = 0
        while hasattr(self, f"x{count}"):
            x = getattr(self, f"x{count}")(x)
            count += 1
        return self.tail(x)


class Asking(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return self.tail(self.get_submodule("x0")(x) if "x0" in dict(self.named_modules()) else x)


@pytest.mark.parametrize("cls", [Listing, Direct, Counting, Asking])
def test_attached_where_the_forward_looks_for_parts(cls: type[Net]) -> None:
    net = cls()
    model = Model(net, cache=False)
    with model.trace(_x()):
        before = model.output.save()
    model.x0 = nn.Tanh()
    with model.trace(_x()):
        after = model.output.save()
    assert torch.equal(after, net(_x())) and not torch.equal(before, after)


def test_what_a_stored_program_mentions_is_stored() -> None:
    made = []
    for _ in range(2):
        model = Model(Net())
        with model.trace(_x()[None, None]):
            model.output.save()
        made.append(model._captures.made)
        model.l0.attachment = Sae()
        with model.trace(_x()[None, None]):
            model.output.save()
        assert model._captures.made == made[-1]
    assert made == [1, 0]


def test_a_module_of_the_model_that_the_forward_does_not_call(model: Model, net: Net) -> None:
    with model.trace(_x()):
        model.spare(model.l0.output)
        model.spare(model.l1.output)
        first, second = model.spare.output.save(), model.spare.call(1).output.save()
    assert torch.equal(first, net.spare(net.l0(_x()))) and torch.equal(second, net.spare(net.l1(net.l0(_x()))))


def test_a_module_that_the_forward_calls_keeps_its_values(model: Model, net: Net) -> None:
    with model.trace(_x()):
        extra = model.tail(model.l0.output).save()
        own = model.tail.output.save()
    assert torch.equal(own, net(_x())) and torch.equal(extra, net.tail(net.l0(_x())))


def test_before_the_call(model: Model) -> None:
    model.l0.attachment = Sae()
    with pytest.raises(NotExecuted) as caught, model.trace(_x()):
        model.l0.attachment.output.save()
    text = str(caught.value)
    assert text.startswith("l0.attachment: this forward never calls the module 'l0.attachment'")
    assert text.endswith("\n  it has values after a call in this block: model['l0.attachment'](...)")
    with pytest.raises(TraceError, match="only inside a trace"):
        _ = model.l0.attachment.output


@pytest.mark.filterwarnings("ignore:.*nothing uses the result")
def test_values_are_those_of_one_block(model: Model) -> None:
    with model.trace(_x()):
        model.spare(model.l0.output)
    with pytest.raises(NotExecuted, match="never calls the module 'spare'"), model.trace(_x()):
        model.spare.output.save()


def test_a_call_too_many(model: Model) -> None:
    message = r"^spare#3: this block calls the module 1 times; the first is number 0$"
    with pytest.raises(NotExecuted, match=message), model.trace(_x()):
        model.spare(model.l0.output)
        model.spare.call(3).output.save()


def test_writing_what_has_been_computed(model: Model) -> None:
    message = "^spare:output is a value that this block has computed itself, by calling the module, and cannot be assig"
    with pytest.raises(WriteError, match=message), model.trace(_x()):
        model.spare(model.l0.output)
        model.spare.output = torch.zeros(3, 3)
    with pytest.raises(NotExecuted, match=r"it has values after a call in this block"), model.trace(_x()):
        model.spare.output = torch.zeros(3, 3)


def test_changing_the_result_in_place(model: Model, net: Net) -> None:
    model.l0.attachment = Sae()
    with model.trace(_x()):
        model.l0.output = model.l0.attachment(model.l0.output)
        model.l0.attachment.output[:, 0] = 0
        out = model.output.save()

    def cut(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = net.l0.attachment(output)  # type: ignore[operator]
        changed[:, 0] = 0
        return changed

    handle = net.l0.register_forward_hook(cut)
    expected = net(_x())
    handle.remove()
    assert torch.equal(out, expected)


def test_an_error_inside_leaves_no_hooks(model: Model, net: Net) -> None:
    model.l0.attachment = nn.Linear(5, 5)
    with pytest.raises(RuntimeError), model.trace(_x()):
        model.l0.attachment(model.l0.output)
    assert not any(part._forward_hooks for part in net.modules())
