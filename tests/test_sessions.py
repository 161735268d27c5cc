"""Sessions: values flow between traces without being saved, nothing runs before it must, loops of both kinds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.errors import NeedsValueError
from tests.executed import Count
from tests.oracle import Edit, Read, run


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.drop(layer(x)).tanh()
        return x


@cache
def _net(seed: int = 0) -> Net:
    return Net(seed).eval().requires_grad_(False)


@cache
def _model(seed: int = 0) -> Any:
    """Captured already, so that what is counted is what runs."""
    model = fxsight.Model(_net(seed), cache=False)
    with model.trace(_x()):
        model.output.save()
    return model


def _x(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(10 * batch + seed))


def _out(path: str = "", x: Tensor | None = None, *edits: Edit, seed: int = 0) -> Tensor:
    """The output at a path, with hooks."""
    read = [Read(path, "output")] if path else []
    out, found = run(_net(seed), (_x() if x is None else x,), {}, [*edits, *read])
    return found[0] if path else out


def _put(path: str, value: Tensor) -> Edit:
    return Edit(path, "output", "assign", lambda live: value)


def _never() -> None:
    raise AssertionError("what follows is not done")


# ------------------------------------------------------------------------------------------------------------ values


def test_values_flow_between_traces_without_being_saved() -> None:
    model = _model()
    with model.session():
        with model.trace(_x()):
            hidden = model.layers[2].output
            unused = model.layers[0].output
        with model.trace(_x(2, 1)):
            model.layers[0].output = hidden * 2
            out = model.output.save()
    expected = _out("", _x(2, 1), _put("layers.0", _out("layers.2") * 2))
    assert torch.equal(out, expected)
    with pytest.raises(fxsight.NotSavedError, match=r"layers\.0:output .* was not saved"):
        print(unused)


def test_values_flow_between_models() -> None:
    model, other = _model(), _model(1)
    with fxsight.session():
        with model.trace(_x()):
            hidden = model.layers[1].output
        with other.trace(_x()):
            other.layers[1].output[:, 0] = hidden[:, 1]
            back = other.output
        with model.trace(_x()):
            model.layers[2].output += back
            out = model.output.save()

    def edit(live: Tensor) -> None:
        live[:, 0] = _out("layers.1")[:, 1]

    second = _out("", None, Edit("layers.1", "output", "inplace", edit), seed=1)
    assert torch.equal(out, _out("", None, Edit("layers.2", "output", "inplace", lambda live: live.add_(second))))


def test_a_value_is_the_input_of_a_later_trace() -> None:
    model = _model()
    for between in (False, True):
        with model.session():
            with model.trace(_x()):
                hidden = model.output
            given = hidden * 2 if between else hidden
            with model.trace(given):
                out = model.output.save()
        assert torch.equal(out, _net()(_net()(_x()) * (2 if between else 1)))


def test_values_of_a_model_s_trace_inside_another_s() -> None:
    model, other = _model(), _model(1)
    with model.trace(_x()):
        outer = model.layers[0].output.save()
        with other.trace(_x()):
            inner = other.layers[0].output.save()
        model.layers[1].output = inner
        out = model.output.save()
    assert torch.equal(outer, _out("layers.0")) and torch.equal(inner, _out("layers.0", seed=1))
    assert torch.equal(out, _out("", None, _put("layers.1", inner)))


def test_saved_before_and_after() -> None:
    model = _model()
    with model.session():
        with model.trace(_x()):
            kept = model.layers[0].output.save()
            early = model.layers[1].output
        with model.trace(_x()):
            out = (model.output + early).save()
        early.save()
    assert torch.equal(kept, _out("layers.0")) and torch.equal(out, _out() + _out("layers.1"))
    assert torch.equal(early, _out("layers.1")) and type(early) is Tensor


def test_saved_after_a_number_was_needed() -> None:
    """What waits has run then, and is a plain tensor in the middle of the session: `fxsight.save` takes it, too."""
    model = _model()
    with model.session():
        with model.trace(_x()):
            hidden = model.layers[0].output
            number = model.layers[1].output.sum().item()
        total = hidden.sum().item()
        kept = fxsight.save({"h": hidden, "twice": hidden * 2})
    assert number == _out("layers.1").sum().item() and total == _out("layers.0").sum().item()
    assert torch.equal(kept["h"], _out("layers.0")) and torch.equal(kept["twice"], _out("layers.0") * 2)


def test_containers_of_a_session() -> None:
    model = _model()
    with model.session() as session:
        found: Any = session.save([])
        named = fxsight.dict().save()
        for number in range(3):
            with model.trace(_x()):
                found.append(model.layers[number].output)
                named[str(number)] = model.layers[number].output * 2
    assert [torch.equal(value, _out(f"layers.{n}")) for n, value in enumerate(found)] == [True] * 3
    assert torch.equal(named["2"], _out("layers.2") * 2) and type(found[0]) is Tensor


def test_an_in_place_edit_of_an_earlier_trace_s_value() -> None:
    """As of a tensor of the user's: the value is another afterwards, for all who use it later."""
    model = _model()
    with model.session():
        with model.trace(_x()):
            hidden = model.layers[0].output.save()
            copy = model.layers[0].output.save()
        with model.trace(_x()):
            hidden[:, 0] = model.layers[1].output[:, 0]
            model.layers[2].output = hidden
            out = model.output.save()
    changed = _out("layers.0").clone()
    changed[:, 0] = _out("layers.1")[:, 0]
    assert torch.equal(out, _out("", None, _put("layers.2", changed)))
    assert torch.equal(hidden, changed) and torch.equal(copy, _out("layers.0"))


def test_torch_between_the_traces() -> None:
    model = _model()
    with model.session():
        with model.trace(_x()):
            hidden = model.layers[0].output
        mixed = torch.relu(hidden) + 1
        assert type(mixed) is Tensor and type(hidden) is Tensor
        with model.trace(_x()):
            model.layers[0].output = mixed
            out = model.output.save()
    assert torch.equal(out, _out("", None, _put("layers.0", torch.relu(_out("layers.0")) + 1)))


# ---------------------------------------------------------------------------------------------------------- laziness


def test_nothing_runs_before_the_end() -> None:
    model, counts = _model(), []
    with Count() as count:
        with model.session():
            with model.trace(_x()):
                hidden = model.layers[0].output
            counts.append(count.linears)
            with model.trace(_x()):
                model.layers[0].output = hidden + 1
                assert hidden.shape == (2, 6) and hidden.dtype == torch.float32
                out = model.layers[1].output.save()
            counts.append(count.linears)
        counts.append(count.linears)
    assert counts == [0, 0, 2] and torch.equal(out, _out("layers.1", None, _put("layers.0", _out("layers.0") + 1)))


def test_a_number_runs_what_waits_and_that_once() -> None:
    model, counts = _model(), []
    with Count() as count:
        with model.session():
            with model.trace(_x()):
                hidden = model.layers[0].output
            with model.trace(_x()):
                model.layers[0].output = hidden * 2
                number = model.layers[1].output.sum().item()
                counts.append(count.linears)
                out = model.output.save()
            counts.append(count.linears)
            total = hidden.sum().item()
        counts.append(count.linears)
    edit = _put("layers.0", _out("layers.0") * 2)
    assert counts == [2, 2, 3] and number == _out("layers.1", None, edit).sum().item()
    assert total == _out("layers.0").sum().item() and torch.equal(out, _out("", None, edit))


def test_decisions_between_traces() -> None:
    model = _model()
    found = []
    with model.session():
        for number in range(3):
            with model.trace(_x()):
                hidden = model.layers[number].output
            found.append(hidden.sum().item())
            if len(found) == 2:
                break
        with model.trace(_x()):
            last = model.output.save()
    assert found == [_out(f"layers.{n}").sum().item() for n in range(2)] and torch.equal(last, _out())


def test_random_numbers_are_drawn_once_and_in_order() -> None:
    net = Net(3).train().requires_grad_(False)
    model = fxsight.Model(net, cache=False)
    with model.trace(_x()):
        pass
    torch.manual_seed(5)
    with model.session():
        with model.trace(_x()):
            first = model.output
        with model.trace(_x()):
            out = (model.output + first).save()
    torch.manual_seed(5)
    one, two = net(_x()), net(_x())
    assert torch.equal(out, two + one)


# ----------------------------------------------------------------------------------------------- exit, log, exceptions


def test_exit() -> None:
    model = _model()
    with model.session() as session:
        with model.trace(_x()):
            kept = model.layers[0].output.save()
        session.exit()
        _never()
    assert torch.equal(kept, _out("layers.0"))


def test_exit_inside_a_trace() -> None:
    """The session ends there, and with it the block that has not ended."""
    model = _model()
    with model.session() as session:
        with model.trace(_x()):
            kept = model.layers[0].output.save()
        with model.trace(_x()):
            lost = model.layers[1].output.save()
            session.exit()
    assert torch.equal(kept, _out("layers.0"))
    with pytest.raises(fxsight.NotSavedError):
        print(lost)


def test_log(capsys: pytest.CaptureFixture[str]) -> None:
    model = _model()
    with model.session() as session:
        session.log("before")
        with model.trace(_x()):
            total = model.layers[0].output.sum()
        session.log("sum", total)
    assert capsys.readouterr().out == f"before\nsum {_out('layers.0').sum()!r}\n"


def test_cond() -> None:
    model = _model()
    with model.session() as session:
        found: Any = fxsight.list().save()
        with model.trace(_x()):
            total = model.layers[0].output.sum()
        with session.cond(total < 1e9), model.trace(_x()):
            found.append(model.layers[0].output)
        with session.cond(total > 1e9), model.trace(_x()):
            found.append(model.layers[1].output)
    assert len(found) == 1 and torch.equal(found[0], _out("layers.0"))


class Mine(Exception):
    """The user's own."""


def test_an_exception_abandons_the_session() -> None:
    model, mine = _model(), Mine("here")
    with Count() as count, pytest.raises(Mine) as caught, model.session():
        with model.trace(_x()):
            kept = model.layers[0].output.save()
        raise mine
    assert caught.value is mine and len(caught.traceback) == 1 and count.linears == 0
    with pytest.raises(fxsight.NotSavedError):
        print(kept)
    with model.session(), model.trace(_x()):
        again = model.layers[0].output.save()
    assert torch.equal(again, _out("layers.0"))


def test_an_exception_in_a_trace_of_a_session_can_be_caught() -> None:
    model = _model()
    with model.session():
        with model.trace(_x()):
            kept = model.layers[0].output
        try:
            with model.trace(_x()):
                lost = model.layers[1].output.save()
                raise Mine
        except Mine:
            pass
        with model.trace(_x()):
            out = (kept + model.output).save()
    assert torch.equal(out, _out("layers.0") + _out())
    with pytest.raises(fxsight.NotSavedError):
        print(lost)


def test_a_value_of_a_trace_that_failed_in_a_later_trace() -> None:
    model = _model()
    with model.session():
        with pytest.raises(Mine), model.trace(_x()):
            lost = model.layers[1].output
            raise Mine
        with model.trace(_x()), pytest.raises(fxsight.NotSavedError):
            model.layers[0].output = lost


def test_a_session_in_a_session_and_in_a_trace() -> None:
    model = _model()
    with model.session(), pytest.raises(fxsight.TraceError, match="a session inside a session: its traces can"):
        fxsight.session().__enter__()
    with model.trace(_x()):
        with pytest.raises(fxsight.TraceError, match="a session inside a trace: open the session first"):
            model.session().__enter__()
        out = model.output.save()
    assert torch.equal(out, _out())


def test_a_trace_in_a_trace_in_a_session() -> None:
    model = _model()
    with model.session(), model.trace(_x()):
        with pytest.raises(fxsight.TraceError, match="a trace inside a trace of the same model"):
            model.trace(_x()).__enter__()
        out = model.output.save()
    assert torch.equal(out, _out())


def test_the_program_of_a_trace_is_there_when_the_session_has_ended() -> None:
    model = _model()
    with model.session():
        with model.trace(_x()) as tracer:
            model.layers[0].output.save()
        with pytest.raises(fxsight.TraceError, match="in a session, when that ends"):
            print(tracer.program)
    assert "aten.linear" in str(tracer.program)


# -------------------------------------------------------------------------------------------------------- plain loops


def test_a_plain_loop() -> None:
    model = _model()
    with model.session() as session:
        found: Any = session.save([])
        for number in session.iter([0, 1, 2]):
            with model.trace(_x(2, number)):
                found.append(model.layers[number].output)
    assert [torch.equal(v, _out(f"layers.{n}", _x(2, n))) for n, v in enumerate(found)] == [True] * 3


def test_a_plain_loop_with_its_context(capsys: pytest.CaptureFixture[str]) -> None:
    model = _model()
    with model.session() as session:
        found: Any = session.save([])
        for number, loop in session.iter(range(5), return_context=True):
            loop.log("at", number)
            with model.trace(_x(2, number)):
                found.append(model.output)
            if number == 1:
                loop.exit()
    assert len(found) == 2 and torch.equal(found[1], _out("", _x(2, 1)))
    assert capsys.readouterr().out == "at 0\nat 1\n"


def test_exit_of_a_plain_loop_around_a_plain_loop() -> None:
    seen = []
    with fxsight.session() as session:
        for a, outer in session.iter(range(3), return_context=True):
            for b, inner in session.iter(range(3), return_context=True):
                seen.append((a, b))
                if b == 1:
                    inner.exit()
            if a == 1:
                outer.exit()
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


# ----------------------------------------------------------------------------------------------------- recorded loops


def test_r4_a_recorded_loop() -> None:
    model, inputs = _model(), [_x(2, n) for n in range(3)]
    with Count() as count, model.session() as session:
        found: Any = fxsight.list().save()
        with session.iter(inputs) as item, model.trace(item):
            model.layers[0].output *= 2
            found.append(model.output)
        assert count.linears == 9
    edit = Edit("layers.0", "output", "inplace", lambda live: live.mul_(2))
    assert [torch.equal(v, _out("", x, edit)) for v, x in zip(found, inputs, strict=True)] == [True] * 3


def test_r5_nested_loops() -> None:
    with fxsight.session() as session:
        numbers = fxsight.list()
        [numbers.append([n]) for n in range(3)]
        seen = fxsight.list().save()
        with session.iter(numbers) as item, session.iter(item) as inner:
            seen.append(inner)
    assert list(seen) == [0, 1, 2]


def test_r6_loops_with_context(capsys: pytest.CaptureFixture[str]) -> None:
    with fxsight.session() as session:
        seen = fxsight.list().save()
        with session.iter([0, 1, 2, 3], return_context=True) as (item, loop):
            seen.append(item * 2)
            loop.log("item", item)
            with loop.cond(item == 2):
                loop.exit()
    assert list(seen) == [0, 2, 4] and capsys.readouterr().out == "item 0\nitem 1\nitem 2\n"


def test_nested_loops_and_traces() -> None:
    model = _model()
    inputs = [[], [_x(2, 0), _x(2, 1)], [], [_x(2, 2)]]
    with model.session() as session:
        found, named = fxsight.list().save(), fxsight.dict().save()
        with session.iter(inputs) as item, session.iter(item) as inner, model.trace(inner):
            found.append(model.output.sum())
            named["last"] = model.output
    flat = [x for xs in inputs for x in xs]
    assert [v.item() for v in found] == [_out("", x).sum().item() for x in flat]
    assert torch.equal(named["last"], _out("", flat[-1]))


def test_a_loop_over_nothing() -> None:
    model = _model()
    with model.session() as session:
        found = fxsight.list().save()
        with session.iter([]) as item:
            found.append(item)
        for number in session.iter([]):
            found.append(number)
        with model.trace(_x()):
            out = model.output.save()
    assert list(found) == [] and torch.equal(out, _out())


def test_a_trace_in_a_loop_over_nothing() -> None:
    model = _model()
    with model.session() as session:
        found = fxsight.list().save()
        with session.iter([]) as item, pytest.raises(fxsight.TraceError, match="a trace in a loop over nothing"):
            model.trace(item)
    assert list(found) == []


def test_items_of_different_sizes() -> None:
    model, inputs = _model(), [_x(2), _x(3), _x(5)]
    with model.session() as session:
        found = fxsight.list().save()
        with session.iter(inputs) as item, model.trace(item):
            model.layers[1].output[:, 0] = 0
            found.append(model.output)
    edit = Edit("layers.1", "output", "inplace", lambda live: live[:, 0].zero_())
    assert [torch.equal(v, _out("", x, edit)) for v, x in zip(found, inputs, strict=True)] == [True] * 3


def test_items_in_structures() -> None:
    model, inputs = _model(), [{"x": _x(2, n), "n": n} for n in range(3)]
    with model.session() as session:
        seen = fxsight.list().save()
        with session.iter(inputs) as item:
            with model.trace(x=item["x"]):
                value = model.output
            seen.append((item["n"], value))
    assert [n for n, _ in seen] == [0, 1, 2]
    assert all(torch.equal(value, _out("", _x(2, n))) for n, value in seen)


def test_values_flow_inside_and_into_a_recorded_loop() -> None:
    model, inputs = _model(), [_x(2, n) for n in range(3)]
    with model.session() as session:
        with model.trace(_x()):
            steer = model.layers[0].output
        found = fxsight.list().save()
        with session.iter(inputs) as item:
            with model.trace(item):
                hidden = model.layers[1].output
            with model.trace(_x()):
                model.layers[0].output = hidden + steer
                found.append(model.output)
    for value, x in zip(found, inputs, strict=True):
        edit = _put("layers.0", _out("layers.1", x) + _out("layers.0"))
        assert torch.equal(value, _out("", _x(), edit))


def test_a_condition_on_a_value_in_a_recorded_loop() -> None:
    model, inputs = _model(), [_x(2, n) for n in range(4)]
    with model.session() as session:
        found = fxsight.list().save()
        with session.iter(inputs, return_context=True) as (item, loop):
            with model.trace(item):
                total = model.output.sum()
            with loop.cond(total > 0):
                found.append(total)
    assert [v.item() for v in found] == [t for x in inputs if (t := _out("", x).sum().item()) > 0]


def test_items_that_need_other_programs() -> None:
    model = _model()
    message = r"different ways through the model, or the block looks at sizes or numbers; write `for item in"
    with pytest.raises(fxsight.TraceError, match=message), model.session() as session:
        inputs = [_x(2), _x(3)]
        with session.iter(inputs) as item, model.trace(item):
            rows = model.output.shape[0]
            model.output[rows - 1].save()
    with model.session(), model.trace(_x()):
        out = model.output.save()
    assert torch.equal(out, _out())


def test_a_number_of_an_item() -> None:
    with fxsight.session() as session, session.iter([1, 2]) as item:
        for use in (bool, int, float, len, list, lambda x: [1, 2][x]):
            with pytest.raises(NeedsValueError, match=r"write `for item in session\.iter"):
                use(item)


def test_an_exception_in_a_recorded_loop() -> None:
    model = _model()
    with pytest.raises(Mine), model.session() as session, session.iter([_x()]) as item, model.trace(item):
        raise Mine
    with model.session() as session:
        found = fxsight.list().save()
        try:
            with session.iter([_x()]) as item:
                found.append(item)
                raise Mine
        except Mine:
            pass
        with model.trace(_x()):
            out = model.output.save()
    assert list(found) == [] and torch.equal(out, _out())


def test_invokes_in_a_session() -> None:
    model = _model()
    with model.session():
        with model.trace() as tracer:
            with tracer.invoke(_x(1)):
                a = model.layers[0].output
            with tracer.invoke(_x(2)):
                b = model.layers[1].output
        with model.trace(_x(2)):
            model.layers[0].output = a + b
            out = model.output.save()
    x = torch.cat([_x(1), _x(2)])
    assert torch.equal(out, _out("", _x(2), _put("layers.0", _out("layers.0", x)[:1] + _out("layers.1", x)[1:])))


def test_a_scan_in_a_session() -> None:
    model = _model()
    with Count() as count, model.session():
        with model.scan(_x(3)):
            width = model.layers[0].output.shape[-1]
        with model.trace(_x()):
            model.layers[0].output = torch.zeros(2, width)
            out = model.output.save()
    assert count.linears == 2 and torch.equal(out, _out("", None, _put("layers.0", torch.zeros(2, 6))))


def test_values_are_the_inputs_of_later_invokes() -> None:
    model = _model()
    with model.session():
        with model.trace(_x()):
            first, second = model.layers[0].output, model.layers[1].output
        with model.trace() as tracer:
            with tracer.invoke(first):
                a = model.output.save()
            with tracer.invoke(second):
                b = model.output.save()
    x = torch.cat([_out("layers.0"), _out("layers.1")])
    assert torch.equal(a, _out("", x)[:2]) and torch.equal(b, _out("", x)[2:])


def test_a_number_of_a_trace_whose_input_is_a_value() -> None:
    model = _model()
    with model.session():
        with model.trace(_x()):
            hidden = model.output
        with model.trace(hidden):
            number = model.output.sum().item()
    assert number == _net()(_net()(_x())).sum().item()


def test_a_value_of_an_open_trace_is_no_input() -> None:
    model, other = _model(), _model(1)
    with model.trace(_x()):
        hidden = model.output.save()
        with pytest.raises(
            fxsight.TraceError, match="is a value of a block that has not ended, and cannot be the input"
        ):
            other.trace(hidden)
        with pytest.raises(fxsight.TraceError, match="cannot be the input"), other.trace() as tracer:
            tracer.invoke(hidden)
    assert torch.equal(hidden, _out())


def test_r3_exit_in_conditions_and_loops() -> None:
    model = _model()
    for stops in (True, False):
        with model.session() as session:
            seen = fxsight.list().save()
            with model.trace(_x()):
                total = model.output.sum()
            with session.cond(total < 1e9 if stops else total > 1e9):
                session.exit()
            seen.append(1)
        assert list(seen) == ([] if stops else [1])
    with model.session() as session:
        seen = fxsight.list().save()
        with session.iter([0, 1, 2], return_context=True) as (item, loop):
            seen.append(item)
            with loop.cond(item == 1):
                session.exit()
        _never()
    assert list(seen) == [0, 1]


def test_exit_in_a_branch_not_taken() -> None:
    model = _model()
    with model.session() as session, model.trace(_x()) as tracer:
        with tracer.cond(False):
            session.exit()
        out = model.output.save()
    assert torch.equal(out, _out())


def test_a_number_in_a_recorded_block() -> None:
    model = _model()
    with model.session() as session:
        found = fxsight.list().save()
        with session.iter([_x(), _x(2, 1)]) as item:
            with model.trace(item):
                total = model.output.sum()
            with pytest.raises(NeedsValueError, match="has a number only when the block runs; write `for item"):
                print(total.item())
            found.append(total * 2)
    assert [v.item() for v in found] == [(_out("", x).sum() * 2).item() for x in (_x(), _x(2, 1))]
