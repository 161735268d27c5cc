"""Numbers on demand: what a body needs is computed there and then, with the edits so far, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.errors import NeedsValueError
from fxsight.value import values_in
from tests.executed import Count
from tests.oracle import Edit, Read, run


class Net(nn.Module):
    """Each operator stands once or in a known number: sigmoid once, tanh once, addmm three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.layers[0](x))
        x = torch.tanh(self.drop(self.layers[1](x)))
        found: Tensor = self.layers[2](x)
        return found


@cache
def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@cache
def _model() -> Any:
    model = fxsight.Model(_net(), cache=False)
    with model.trace(_x()):
        pass
    return model


def _x() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def _out(*steps: Edit | Read) -> Any:
    out, found = run(_net(), (_x(),), {}, steps)
    return found[0] if found else out


_model()  # captured here
H = _out(Read("layers.1", "output"))


@pytest.mark.parametrize(
    "use",
    [
        lambda h: bool(h.sum() > 0),
        lambda h: h[0, 0].item(),
        lambda h: int(h[0, 0] * 10),
        lambda h: float(h[0, 1]),
        lambda h: complex(h[0, 1]),
        lambda h: h.tolist(),
        lambda h: h.numpy().sum().item(),
        lambda h: np.asarray(h).tolist(),
        lambda h: str(h),
        lambda h: repr(h),
        lambda h: f"{h} {h[0, 0]:.3f} {h.sum():>10.2f}",
        lambda h: "%.2f" % h[0, 0],  # noqa: UP031
        lambda h: h[0, 0] in [1.0, 2.0],
        lambda h: 0.0 in h,
        lambda h: bool(h[0, 0] > 0 and h[0, 1] > 0),
        lambda h: bool(0 < h.sum() < 10),
        lambda h: not h.any(),
        lambda h: ["a", "b", "c", "d", "e", "f"][h[0].argmax()],
        lambda h: list(range(10))[h[0].argmin() : 6],
        lambda h: max(h[0]).item(),
        lambda h: min(h[0, 0], h[0, 1]).item(),
        lambda h: [x.item() for x in sorted(h[1])],
        lambda h: sorted(range(3), key=lambda i: h[i].sum()),
        lambda h: round(h[0, 0].item(), 3),
        lambda h: [x.item() for row in h for x in row],
        lambda h: len(h),
        lambda h: torch.equal(h, h + 0),
        lambda h: torch.allclose(h, h + 1),
        lambda h: h.is_nonzero() if h.numel() == 1 else h.sum().is_nonzero(),
        lambda h: h.nonzero().tolist(),
        lambda h: h[h > 0].tolist(),
        lambda h: torch.unique(h > 0).tolist(),
        lambda h: h.argmax().item() // 6,
        lambda h: range(h[0].argmax()),
        lambda h: "x" * int(h[0].argmax()),
        lambda h: divmod(int(h[0].argmax()), 2),
        lambda h: {int(h[0].argmax()): 1},
        lambda h: any(h[0] > 0),
        lambda h: all(row.sum() > -100 for row in h),
        lambda h: sum(h[0]).item(),
        lambda h: (h[0, 0] if h[0, 0] > h[0, 1] else h[0, 1]).item(),
        lambda h: float(np.float32(h[0, 0])),
        lambda h: np.array([x.item() for x in h[0]]).tolist(),
    ],
    ids=range(43),
)
def test_python_on_values(use: Callable[[Any], Any]) -> None:
    """Inside a trace as on the tensor, with the model's own operators run once."""
    with Count() as count, _model().trace(_x()):
        found = use(_model().layers[1].output)
        out = _model().output.save()
    assert found == use(H) and torch.equal(out, _out())
    assert count["addmm"] == 3 and count["sigmoid"] == 1 and count["tanh"] == 1


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # of torch's tensors, too
def test_numpy_functions_of_values() -> None:
    with _model().trace(_x()):
        _model().layers[1].output = np.add(_model().layers[1].output, 1)
        out = _model().output.save()
    assert torch.equal(out, _out(Edit("layers.1", "output", "assign", lambda live: H + 1)))


def test_print(capsys: pytest.CaptureFixture[str]) -> None:
    with _model().trace(_x()) as tracer:
        print(_model().layers[1].output)
        tracer.log("sum", _model().layers[1].output.sum())
        print(_model().layers[1].output.shape, _model().layers[1].output.dtype)
    assert capsys.readouterr().out == f"{H}\nsum {H.sum()!r}\n{H.shape} {H.dtype}\n"


def test_numbers_after_edits_again_and_again() -> None:
    """Each number is of the edits before it; what did not change is not computed again."""
    with Count() as count, _model().trace(_x()):
        before = _model().layers[2].output.sum().item()
        _model().layers[1].output[:, 0] = 0
        between = _model().layers[2].output.sum().item()
        again = _model().layers[2].output.sum().item()
        _model().layers[2].output += 1
        after = _model().layers[2].output.sum().item()
        out = _model().output.save()
    zero = Edit("layers.1", "output", "inplace", lambda live: live[:, 0].zero_())
    assert before == _out().sum().item() and between == again == _out(zero).sum().item()
    assert after == (_out(zero) + 1).sum().item() and torch.equal(out, _out(zero) + 1)
    assert count["sigmoid"] == 1 and count["tanh"] == 2 and count["addmm"] == 4


def test_while() -> None:
    with _model().trace(_x()):
        rounds = 0
        while _model().layers[1].output.abs().mean() > 0.05:
            _model().layers[1].output *= 0.5
            rounds += 1
        out = _model().output.save()
    expected, wanted = H.clone(), 0
    while expected.abs().mean() > 0.05:
        expected *= 0.5
        wanted += 1
    assert rounds == wanted > 0 and torch.equal(out, _out(Edit("layers.1", "output", "assign", lambda live: expected)))


def test_helper_functions_and_loops_over_layers() -> None:
    def clip(layer: Any, limit: float) -> int:
        changed = 0
        for row in range(3):
            if layer.output[row].norm() > limit:
                layer.output[row] *= 0.1
                changed += 1
        return changed

    with Count() as count, _model().trace(_x()):
        numbers = [clip(layer, 0.9) for layer in _model().layers]
        out = _model().output.save()
    wanted = []

    def edit(live: Tensor) -> None:
        rows = [row for row in range(3) if live[row].norm() > 0.9]
        live[rows] *= 0.1
        wanted.append(len(rows))

    expected = _out(*(Edit(f"layers.{n}", "output", "inplace", edit) for n in range(3)))
    assert numbers == wanted and torch.equal(out, expected) and sum(numbers) > 0
    assert count["sigmoid"] <= 4  # layer 0 is edited row by row, and each row is looked at


def test_random_operators_draw_once() -> None:
    torch.manual_seed(0)
    net = Net().train().requires_grad_(False)
    model = fxsight.Model(net, cache=False)
    with model.trace(_x()):
        pass
    torch.manual_seed(3)
    with Count() as count, model.trace(_x()):
        dropped = model.drop.output
        number = dropped.sum().item()
        noise = torch.randn_like(model.layers[2].output)
        first, again = noise.sum().item(), noise.sum().item()
        model.layers[2].output = model.layers[2].output + noise
        saved, out = dropped.save(), model.output.save()
    torch.manual_seed(3)
    x = net.drop(net.layers[1](torch.sigmoid(net.layers[0](_x()))))
    last = net.layers[2](torch.tanh(x))
    expected = torch.randn_like(last)
    assert number == x.sum().item() and torch.equal(saved, x) and first == again == expected.sum().item()
    assert torch.equal(out, last + expected) and count["randn_like"] == 1


def test_numbers_of_values_that_nothing_else_needs() -> None:
    with Count() as count, _model().trace(_x()):
        number = _model().layers[0].output.sum().item()
    assert number == _out(Read("layers.0", "output")).sum().item() and count["addmm"] == 1


def test_a_number_before_and_after_an_operator_is_opened() -> None:
    with Count() as count, _model().trace(_x()):
        a = _model().layers[0].output.sum().item()
        mean = _model().source.torch_sigmoid_0.output.mean().item()
        out = _model().output.save()
    assert count["addmm"] == 3 and a == _out(Read("layers.0", "output")).sum().item() and torch.equal(out, _out())
    assert mean == torch.sigmoid(_out(Read("layers.0", "output"))).mean().item()


def test_a_scan_has_no_numbers() -> None:
    with _model().scan(_x()):
        for use in (float, bool, lambda v: v.item(), print, lambda v: v.tolist()):
            with pytest.raises(NeedsValueError, match=r"test_numbers\.py:\d+: a number is needed, and a scan runs"):
                use(_model().layers[0].output.sum())


def test_the_program_of_a_body_with_numbers_is_of_that_run() -> None:
    with _model().trace(_x()) as tracer:
        if _model().layers[0].output.sum() < 1e9:
            _model().output.save()
    with pytest.raises(fxsight.InputError, match="has looked at numbers, so its program holds for that one run"):
        tracer.program(_x())


# ------------------------------------------------------------------------------------------------------------- apply


def _describe(tensor: Tensor, *, digits: int = 2) -> str:
    return f"{type(tensor).__name__} {round(tensor.sum().item(), digits)}"


def test_apply_takes_real_tensors() -> None:
    with Count() as count, _model().trace(_x()):
        text = fxsight.apply(_describe, _model().layers[1].output, digits=3)
        out = _model().output.save()
    assert text == f"Tensor {round(H.sum().item(), 3)}" and torch.equal(out, _out()) and count["addmm"] == 3


def test_apply_returns_tensors_that_can_be_written_edited_and_saved() -> None:
    def shuffle(tensor: Tensor) -> Tensor:
        return torch.from_numpy(np.flip(tensor.numpy(), 1).copy())

    with _model().trace(_x()):
        flipped = fxsight.apply(shuffle, _model().layers[1].output)
        _model().layers[1].output = flipped * 2
        flipped[:, 0] = 9
        kept, out = flipped.save(), _model().output.save()
    expected = H.flip(1)
    assert torch.equal(out, _out(Edit("layers.1", "output", "assign", lambda live: expected * 2)))
    assert torch.equal(kept[:, 1:], expected[:, 1:]) and (kept[:, 0] == 9).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda t: (t + 1, {"sum": t.sum(), "n": 3}),
        lambda t: [t, None, "text"],
        lambda t: {"a": {"b": (t * 2,)}},
        lambda t: None,
        lambda t: 3,
        lambda t: t.sum().item(),
        lambda t: "text",
        lambda t: True,
        lambda t: [1, 2],
        lambda t: t.max(1),
        lambda t: (),
    ],
    ids=range(11),
)
def test_apply_returns_anything(function: Callable[[Any], Any]) -> None:
    with _model().trace(_x()):
        found = fxsight.apply(function, _model().layers[1].output)
        if hasattr(found, "save"):
            found = found.save()
        elif list(values_in(found)):
            found = fxsight.save(found)
    assert _same(found, function(H))


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, Tensor):
        return type(a) is Tensor and torch.equal(a, b)
    if isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in b)
    if isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_apply_with_structures_and_no_values() -> None:
    with _model().trace(_x()):
        total = fxsight.apply(lambda xs, k: xs["a"][0] + k, {"a": [_model().layers[1].output]}, k=torch.ones(6))
        number = fxsight.apply(lambda n: n + 1, 3)
        total.save()
    assert torch.equal(total, H + 1) and number == 4 and fxsight.apply(lambda n: n * 2, 4) == 8


def test_what_apply_does_to_its_argument_stays_there() -> None:
    def ruin(tensor: Tensor) -> Tensor:
        tensor.zero_()
        return tensor

    with _model().trace(_x()):
        zeros = fxsight.apply(ruin, _model().layers[1].output).save()
        hidden, out = _model().layers[1].output.save(), _model().output.save()
    assert (zeros == 0).all() and torch.equal(hidden, H) and torch.equal(out, _out())


def test_apply_sees_the_edits_so_far() -> None:
    seen = []
    with _model().trace(_x()):
        _model().layers[0].output[:] = 0
        fxsight.apply(lambda t: seen.append(t.clone()), _model().layers[1].output)
        _model().layers[0].output[:] = 1
        fxsight.apply(lambda t: seen.append(t.clone()), _model().layers[1].output)
    for value, found in zip((0.0, 1.0), seen, strict=True):
        edit = Edit("layers.0", "output", "assign", partial(torch.full_like, fill_value=value))
        assert torch.equal(found, _out(edit, Read("layers.1", "output")))


class Mine(Exception):
    """The user's own."""


def test_an_exception_in_apply_is_the_user_s() -> None:
    def fail(tensor: Tensor) -> Tensor:
        raise Mine(tensor.shape)

    with pytest.raises(Mine) as caught, _model().trace(_x()):
        fxsight.apply(fail, _model().layers[1].output)
    assert caught.traceback[-1].name == "fail"
    with _model().trace(_x()):
        with pytest.raises(Mine):
            fxsight.apply(fail, _model().layers[1].output)
        out = _model().output.save()
    assert torch.equal(out, _out())


def test_apply_in_an_invoke() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(_x()):
            a = fxsight.apply(lambda t: t.flip(0), _model().layers[1].output)
            _model().layers[1].output = a
        with tracer.invoke(_x()[:1]):
            b = fxsight.apply(len, _model().layers[1].output)
        out = _model().output.save()
    x = torch.cat([_x(), _x()[:1]])

    def edit(live: Tensor) -> None:
        live[:3] = live[:3].flip(0)

    expected, _ = run(_net(), (x,), {}, [Edit("layers.1", "output", "inplace", edit)])
    assert b == 1 and torch.allclose(out, expected, atol=1e-6)  # the number was of a smaller batch


def test_apply_in_a_session_between_traces() -> None:
    with fxsight.session():
        with _model().trace(_x()):
            hidden = _model().layers[1].output
        text = fxsight.apply(_describe, hidden)
        with _model().trace(_x()):
            _model().layers[1].output = fxsight.apply(lambda t: t * 2, hidden)
            out = _model().output.save()
    assert text == _describe(H) and torch.equal(out, _out(Edit("layers.1", "output", "assign", lambda live: H * 2)))
