"""Gradients inside a trace, against plain hooks, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.errors import EditError, TraceError, WriteError

Hook = Callable[[Tensor], Tensor | None]


class Net(nn.Module):
    """Three layers and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.layer3 = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer1(x).relu()
        h = h + self.layer2(h).tanh()
        out: Tensor = self.layer3(h)
        return out


def _net(frozen: bool = True) -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(not frozen)


def _x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))


@contextmanager
def twin(net: nn.Module, hooks: dict[str, Hook | None]) -> Iterator[dict[str, Tensor]]:
    """Forward hooks that keep the gradients of modules' outputs, as changed by tensor hooks."""
    found: dict[str, Tensor] = {}

    def forward(name: str, change: Hook | None) -> Callable[..., None]:
        def arrive(gradient: Tensor) -> Tensor | None:
            new = None if change is None else change(gradient)
            found[name] = gradient if new is None else new
            return new

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor: Tensor = output[0] if isinstance(output, tuple) else output
            if not tensor.requires_grad:
                tensor.requires_grad_()
            tensor.register_hook(arrive)  # type: ignore[no-untyped-call]

        return hook

    handles = [net.get_submodule(name).register_forward_hook(forward(name, change)) for name, change in hooks.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def at(model: Any, path: str) -> Any:
    """The module at a path."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


# -------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_gradients_are_those_of_hooks(frozen: bool, before: bool) -> None:
    net = _net(frozen)
    model = fxsight.Model(net, cache=False)
    names = ("layer1", "layer2", "layer3")
    for rows in (3, 5, 1, 3):
        with twin(net, dict.fromkeys(names)) as expected:
            net(_x(rows)).pow(2).sum().backward()
        weights = [p.grad for p in net.parameters()]
        net.zero_grad()
        with model.trace(_x(rows)):
            outputs = [at(model, name).output for name in names]
            kept = [h.grad.save() for h in outputs] if before else []
            model.output.pow(2).sum().backward()
            kept = kept or [h.grad.save() for h in outputs]
        assert all(torch.equal(g, expected[name]) for g, name in zip(kept, names, strict=True))
        assert all((g is None) == frozen for g in weights)
        assert all(
            p.grad is None if g is None else p.grad is not None and torch.equal(p.grad, g)
            for p, g in zip(net.parameters(), weights, strict=True)
        )
        net.zero_grad()


def test_one_program_for_all_sizes_above_one() -> None:
    model = fxsight.Model(_net(), cache=False)
    programs = []
    for rows in (3, 5):
        with model.trace(_x(rows)) as tracer:
            model.output.sum().backward()
            model.layer1.output.grad.save()
        programs.append(tracer.program.program)
    assert programs[0] is programs[1]
    assert "batch >= 2" in map(str, programs[0].guards)


def test_the_backward_pass_is_part_of_the_program() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()) as tracer:
        model.output.sum().backward()
        model.layer2.output.grad.save()
    called = [str(n.target) for n in tracer.program.program.graph.nodes if n.op == "call_function"]
    assert "aten.tanh_backward.default" in called
    assert "aten.threshold_backward.default" not in called  # nothing asks for it
    assert tracer.program(_x(4))[0].shape == (4, 8)


def test_gradients_of_values_of_the_body() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    with model.trace(_x()):
        scaled = model.layer1.output * 2
        model.layer1.output = scaled
        model.output.sum().backward()
        gradient = scaled.grad.save()
    with twin(net, {}):
        kept: list[Tensor] = []

        def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            kept.append((output * 2).requires_grad_())
            kept[0].retain_grad()
            return kept[0]

        handle = net.layer1.register_forward_hook(double)
        net(_x()).sum().backward()
        handle.remove()
    assert torch.equal(gradient, kept[0].grad)  # type: ignore[arg-type]


def test_a_gradient_with_a_seed() -> None:
    net, seed = _net(), torch.randn(3, 2)
    model = fxsight.Model(net, cache=False)
    with twin(net, {"layer1": None}) as expected:
        net(_x()).backward(seed)
    with model.trace(_x()):
        model.output.backward(seed)
        gradient = model.layer1.output.grad.save()
    assert torch.equal(gradient, expected["layer1"])


def test_the_model_may_require_them_to_be_asked_first() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()):
        h = model.layer1.output
        h.requires_grad = True
        assert h.requires_grad
        h.requires_grad_()
        h.retain_grad()
        model.output.sum().backward()
        gradient = h.grad.save()
    assert gradient.shape == (3, 8)


# -------------------------------------------------------------------------------------------------------- editing


def _zero(g: Any) -> None:
    g[:] = 0


EDITS: dict[str, tuple[Callable[[Any], None], Hook]] = {
    "zero": (lambda h: _zero(h.grad), torch.zeros_like),
    "double": (lambda h: setattr(h, "grad", h.grad * 2), lambda g: g * 2),
    "in place": (lambda h: h.grad.mul_(0.5), lambda g: g * 0.5),
    "augmented": (lambda h: h.__setattr__("grad", h.grad.__imul__(3)), lambda g: g * 3),
    "a part": (lambda h: h.grad[:, 0].zero_(), lambda g: torch.cat([torch.zeros_like(g[:, :1]), g[:, 1:]], 1)),
}


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("late", [True, False])
def test_an_edit_flows_on(how: str, late: bool) -> None:
    edit, change = EDITS[how]
    net = _net(False)
    model = fxsight.Model(net, cache=False)
    with twin(net, {"layer1": None, "layer2": change}) as expected:
        net(_x()).pow(2).sum().backward()
    weights = [p.grad for p in net.parameters()]
    net.zero_grad()
    with model.trace(_x()):
        h = model.layer2.output
        if not late:
            edit(h)
        model.output.pow(2).sum().backward()
        if late:
            edit(h)
        edited, before = h.grad.save(), model.layer1.output.grad.save()
    assert torch.equal(edited, expected["layer2"])
    assert torch.equal(before, expected["layer1"])
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), weights, strict=True))  # type: ignore[arg-type]


def test_an_edit_may_use_values_and_gradients_from_later_on() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        kept["layer2"] = output

    handle = net.layer2.register_forward_hook(keep)
    change: Hook = lambda g: g + kept["layer2"].detach() * kept["gradient"]  # noqa: E731
    note: Hook = lambda g: kept.__setitem__("gradient", g)  # noqa: E731
    with twin(net, {"layer1": change, "layer2": note}) as expected:
        net(_x()).pow(2).sum().backward()
    handle.remove()
    with model.trace(_x()):
        h1, h2 = model.layer1.output, model.layer2.output
        h1.grad = h1.grad + h2.detach() * h2.grad
        model.output.pow(2).sum().backward()
        gradient = h1.grad.save()
    assert torch.equal(gradient, expected["layer1"])


def test_one_tensor_by_two_names() -> None:
    """The gradient comes to a module's input before it comes to the output that the input is."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    model = fxsight.Model(net, cache=False)
    with model.trace(_x()):
        model[1].input.grad[:] = 0
        model.output.sum().backward()
        gradient = model[0].output.grad.save()
    assert not gradient.any()


# ----------------------------------------------------------------------------------------------------- several passes


def test_two_passes() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    with twin(net, {"layer1": None}) as expected:
        out = net(_x())
        out.sum().backward(retain_graph=True)
        first = expected["layer1"]
        out.pow(2).sum().backward()
    with model.trace(_x()):
        h, out = model.layer1.output, model.output
        out.sum().backward(retain_graph=True)
        one = h.grad.save()
        out.pow(2).sum().backward()
        two = h.grad.save()
    assert torch.equal(one, first)
    assert torch.equal(two, expected["layer1"])


def test_a_block_for_each_pass() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()):
        h, loss = model.layer1.output, model.output.sum()
        with loss.backward(retain_graph=True):
            one = h.grad.save()
            h.grad = h.grad * 10
            x1 = model.input.grad.save()
        with (loss * 2).backward():
            two = h.grad.save()
            x2 = model.input.grad.save()
    assert torch.equal(two, one * 2)
    torch.testing.assert_close(x1, x2 * 5)


def test_a_graph_is_used_once_unless_it_is_kept() -> None:
    model = fxsight.Model(_net(), cache=False)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"), model.trace(_x()):
        h, loss = model.layer1.output, model.output.pow(2).sum()
        loss.backward()
        loss.backward()
        h.grad.save()


def test_the_gradient_of_the_last_pass_alone() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()):
        loss = model.output.sum()
        loss.backward(retain_graph=True)
        loss.backward(torch.tensor(2.0))
        model.layer3.output.grad.save()
        gradient = model.layer3.output.grad.save()
    assert torch.equal(gradient, torch.full((3, 2), 2.0))


def test_autograd_grad() -> None:
    net = _net(False)
    model = fxsight.Model(net, cache=False)
    with twin(net, {}):
        kept: dict[str, Tensor] = {}
        handle = net.layer1.register_forward_hook(lambda m, a, o: kept.__setitem__("h", o))
        loss = net(_x()).pow(2).sum()
        expected = torch.autograd.grad(loss, [kept["h"], net.layer2.weight])
        handle.remove()
    with model.trace(_x()):
        loss = model.output.pow(2).sum()
        found: Any = torch.autograd.grad(loss, [model.layer1.output, net.layer2.weight])
        one, two = found[0].save(), found[1].save()
    assert torch.equal(one, expected[0])
    assert torch.equal(two, expected[1])
    assert net.layer2.weight.grad is None


def test_second_order() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    kept: dict[str, Tensor] = {}
    handle = net.layer1.register_forward_hook(lambda m, a, o: kept.__setitem__("h", o.requires_grad_()))
    (first,) = torch.autograd.grad(net(_x()).pow(2).sum(), kept["h"], create_graph=True)
    (expected,) = torch.autograd.grad(first.pow(2).sum(), kept["h"])
    handle.remove()
    with model.trace(_x()):
        h = model.layer1.output
        (one,) = torch.autograd.grad(model.output.pow(2).sum(), h, create_graph=True)
        (two,) = torch.autograd.grad(one.pow(2).sum(), h)
        two.save()
    assert torch.equal(two, expected)


def test_a_gradient_that_steers_a_later_place() -> None:
    """Nothing is circular: the loss of the probe ends before the place that is written."""
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()):
        h = model.layer1.output
        h.pow(2).sum().backward()
        model.layer3.output = model.layer3.output + h.grad[:, :2]
        out, gradient = model.output.save(), h.grad.save()
    plain = model._module(_x())
    assert torch.equal(out, plain + gradient[:, :2])


def test_values_on_demand() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()):
        loss = model.output.sum()
        loss.backward()
        norm = model.layer1.output.grad.norm().item()
        gradient = model.layer1.output.grad.save()
    assert norm == gradient.norm().item()


def test_numbers_that_were_asked_for_before() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()):
        loss = model.output.pow(2).sum()
        before = loss.item()
        loss.backward()
        gradient = model.layer1.output.grad
        norm = float(gradient.norm())
        gradient.save()
        loss.save()
    assert before == loss.item()
    assert norm == float(gradient.norm())


def test_several_losses() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    with twin(net, {"layer1": None}) as expected:
        out = net(_x())
        torch.autograd.backward([out[:, 0].sum(), out[:, 1]], [None, torch.ones(3)])
    with model.trace(_x()):
        out = model.output
        torch.autograd.backward([out[:, 0].sum(), out[:, 1]], [None, torch.ones(3)])
        gradient = model.layer1.output.grad.save()
    assert torch.equal(gradient, expected["layer1"])


def test_statements_under_no_grad_are_constants() -> None:
    net = _net()
    model = fxsight.Model(net, cache=False)
    h = net.layer1(_x()).requires_grad_()
    with torch.no_grad():
        half = h * 0.5
    (h * half).sum().backward()
    for _ in range(2):
        with model.trace(_x()):
            found = model.layer1.output
            with torch.no_grad():
                constant = found * 0.5
            (found * constant).sum().backward()
            gradient = found.grad.save()
        assert torch.equal(gradient, h.grad)


def test_a_branch_that_is_not_taken_has_no_backward_pass() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()) as tracer:
        h = model.layer3.output
        with tracer.cond(False):
            h.grad[:] = 0
            model.output.pow(2).sum().backward()
        model.output.sum().backward()
        gradient = h.grad.save()
    assert torch.equal(gradient, torch.ones(3, 2))


def test_shapes_alone() -> None:
    model = fxsight.Model(_net(), cache=False)
    with model.scan(_x()):
        model.output.sum().backward()
        gradient = model.layer1.output.grad.save()
    assert gradient.device.type == "meta"
    assert gradient.shape == (3, 8)


def test_compiled() -> None:
    net = _net(False)
    model = fxsight.Model(net, cache=False)
    net(_x()).pow(2).sum().backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    with model.trace(_x(), backend="inductor") as tracer:
        model.output.pow(2).sum().backward()
    assert tracer.tier == "inductor"
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- errors


def _refused(error: type[Exception], message: str, body: Callable[[Any], None]) -> None:
    model = fxsight.Model(_net(), cache=False)
    with pytest.raises(error, match=message), model.trace(_x()):
        body(model)


def test_no_backward() -> None:
    message = r"the gradient of layer1:output is asked for \(.*\), and no loss.backward\(\) follows in this block"
    _refused(TraceError, message, lambda model: model.layer1.output.grad.save())


def test_nothing_requires_a_gradient() -> None:
    message = "element 0 of tensors does not require grad and does not have a grad_fn: nothing that the loss depends on"
    _refused(RuntimeError, message, lambda model: model.output.sum().backward())


def test_no_gradients_under_no_grad() -> None:
    message = "element 0 of tensors does not require grad and does not have a grad_fn: the block began under"
    with torch.no_grad():
        _refused(RuntimeError, message, lambda model: model.output.sum().backward())


def test_a_loss_is_a_scalar() -> None:
    message = "grad can be implicitly created only for scalar outputs"
    _refused(RuntimeError, message, lambda model: model.output.backward())


def test_a_seed_of_another_shape() -> None:
    message = r"Mismatch in shape: grad_output\[0\] has a shape of \[2\] and output\[0\] has a shape of \[3, 2\]"
    _refused(RuntimeError, message, lambda model: model.output.backward(torch.ones(2)))


def test_no_path() -> None:
    def body(model: Any) -> None:
        h = model.layer3.output
        model.layer1.output.sum().backward()
        h.grad.save()

    _refused(TraceError, "this gradient does not exist: the loss does not depend on the value", body)


def test_a_gradient_that_is_written() -> None:
    def number(model: Any) -> None:
        model.layer1.output.grad = 0

    def shape(model: Any) -> None:
        model.layer1.output.grad = torch.zeros(2)

    message = r"the gradient of layer1:output is f32\[3, 8\], and what is written is "
    _refused(WriteError, message + r"a int; write h.grad\[:\] = ... for a number", number)
    _refused(WriteError, message + r"f32\[2\]", shape)


def test_integers_have_none() -> None:
    message = "only Tensors of floating point dtype can require gradients"
    _refused(RuntimeError, message, lambda model: model.output.argmax(-1).grad)


def test_hooks_are_not_recorded() -> None:
    message = r"register_hook of a traced value is not recorded; write h.grad = f\(h.grad\), before or after backward"
    _refused(TraceError, message, lambda model: model.output.register_hook(print))


def test_an_edit_that_autograd_does_not_see() -> None:
    def body(model: Any) -> None:
        with torch.no_grad():
            model.layer1.output[:] = 0
        model.output.sum().backward()

    message = r"this edit in place stands under torch.no_grad\(\), and the block has a backward pass"
    _refused(TraceError, message, body)


def test_an_edit_that_stays_has_no_backward_pass() -> None:
    model: Any = fxsight.Model(_net(), cache=False)
    with pytest.raises(EditError, match="an edit has no backward pass; ask for gradients in a trace"), model.edit(_x()):
        model.layer1.output = model.layer1.output * 2
        model.output.sum().backward()


def test_random_numbers_are_not_drawn_twice() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    model: Any = fxsight.Model(net.train(), cache=False)
    message = "this block has a backward pass and has asked for numbers before its end, and the model draws random"
    with pytest.raises(TraceError, match=message), model.trace(_x()):
        loss = model.output.sum()
        print(loss.item())
        loss.backward()


def test_an_input_that_is_a_slice_of_something_larger() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(torch.relu(self.first(x.reshape(-1, 4))))
            return found

    torch.manual_seed(0)
    net: Any = Net().requires_grad_(False)
    model: Any = fxsight.Model(net, cache=False)
    for x in (torch.randn(6, 5, 8)[:2, :3, :4], torch.randn(5, 4, 7)[:4, 1:, 2:6]):
        with model.trace(x):
            h = model.first.output
            model.output.sum().backward()
            found = h.grad.save()
        hidden = net.first(x.reshape(-1, 4)).requires_grad_()
        net.last(torch.relu(hidden)).sum().backward()
        assert torch.equal(found, hidden.grad)
