"""What other tools drop without a word is an effect, an error or a warning here.

The numbers are those of the list of silent no-ops; 7 is about generation.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.errors import FirstRowWarning, LostEditWarning
from tests import small
from tests.oracle import Edit, run


@cache
def _model() -> fxsight.Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    return fxsight.Model(net.requires_grad_(False), cache=False)


@cache
def _gpt2() -> fxsight.Model:
    return fxsight.Model(small.gpt2(), cache=False)


def _x() -> Tensor:
    return torch.randn((2, 4), generator=torch.Generator().manual_seed(0))


def _ids(rows: int = 2) -> Tensor:
    return torch.randint(0, 97, (rows, 5), generator=torch.Generator().manual_seed(0))


def _line(caught: pytest.WarningsRecorder) -> str:
    """The source of the line that the one warning is about."""
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message).startswith(f"{__file__}:{warning.lineno}: ") or warning.category is FirstRowWarning
    with open(__file__) as file:
        return file.read().splitlines()[warning.lineno - 1].strip()


# ------------------------------------------------------------------------------------------ 1: rebinding a local


def test_1_rebinding_a_local_warns() -> None:
    model = _model()
    with pytest.warns(LostEditWarning) as caught, model.trace(_x()):
        h = model[0].output
        h = h * 0
        out = model.output.save()
    assert _line(caught) == "h = h * 0"
    assert str(caught[0].message).partition(": ")[2] == (
        "nothing uses the result of torch.Tensor.mul; it has no effect on the model: write it where it is to be "
        "(model.layer.output = ...), or keep it with .save()"
    )
    assert torch.equal(out, model(_x()))


@pytest.mark.parametrize(
    "how", ["saved", "written", "a number", "a shape", "stopped at", "a part", "used later", "cond"]
)
def test_1_what_is_used_does_not_warn(how: str) -> None:
    model = _model()
    with model.trace(_x()) as tracer:
        h = model[0].output * 2
        values, _ = torch.topk(h, 2)
        match how:
            case "saved":
                fxsight.save({"h": [h]})
            case "written":
                model[1].output = h
            case "a number":
                assert not bool((h * 0).any())
            case "a shape":
                assert (h @ h.mT).shape == (2, 2)
            case "stopped at":
                (h + 1).stop()
            case "a part":
                h.chunk(2)[0][0]
            case "used later":
                late = h + 1
                model[2].output[:] = late
            case _:
                with tracer.cond(False):
                    h + 1
        fxsight.save(values)


def test_1_overwritten_writes_warn() -> None:
    model = _model()
    with pytest.warns(LostEditWarning, match=r"nothing uses the result of torch\.Tensor\.mul") as caught:  # noqa: SIM117
        with model.trace(_x()):
            model[1].output = model[0].output * 2
            model[1].output = model[0].output.save()
    assert _line(caught) == "model[1].output = model[0].output * 2"


def test_1_in_sessions_a_later_trace_may_use_it() -> None:
    model = _model()
    with fxsight.session():
        with model.trace(_x()):
            doubled = model[0].output * 2
            edited = model[0].output.clone()
            edited[:, 0] = 0
        with model.trace(_x()):
            model[1].output = doubled + edited
            out = model.output.save()
    hidden = model[0](_x())
    edited = hidden.clone()
    edited[:, 0] = 0
    assert torch.equal(out, model[2](hidden * 2 + edited))
    with pytest.warns(LostEditWarning, match="nothing uses the result") as caught, fxsight.session():
        with model.trace(_x()):
            doubled = model[0].output * 2
        with model.trace(_x()):
            model.output.save()
    assert _line(caught) == "doubled = model[0].output * 2"


def test_1_a_scan_is_there_to_try() -> None:
    model = _model()
    with model.scan(_x()):
        model[0].output @ torch.ones(4, 7)


# ----------------------------------------------------------------------------------- 2: a handle of a layer before


def test_2_an_edit_after_a_later_layer_was_read_has_its_effect() -> None:
    model = _model()
    with model.trace(_x()):
        early = model[0].output
        late = model[1].output.save()
        early[:, 0] = 0
        out = model.output.save()

    def cut(live: Tensor) -> None:
        live[:, 0] = 0

    expected, _ = run(model._module, (_x(),), {}, [Edit("0", "output", "inplace", cut)])
    assert torch.equal(out, expected) and torch.equal(model[2](late), expected)


def test_2_an_edit_that_comes_too_late_is_an_error() -> None:
    model = _model()
    with pytest.raises(fxsight.CausalityError, match=r"what is written to 0:output depends on"), model.trace(_x()):
        early = model[0].output
        early[:, 0] = model[1].output[:, 0]


# ----------------------------------------------------------------------------------------------- 3: a stale handle


def test_3_an_edit_of_a_replaced_value_warns() -> None:
    model = _model()
    with pytest.warns(LostEditWarning, match="changes a value read before 0:output was written again") as caught:  # noqa: SIM117
        with model.trace(_x()):
            stale = model[0].output
            model[0].output = torch.ones(2, 4)
            stale[:, 0] = 0
            out = model.output.save()
    assert _line(caught) == "stale[:, 0] = 0"
    assert torch.equal(out, model[2](model[1](torch.ones(2, 4))))


# ------------------------------------------------------------------------------------------------------ 4: a copy


def test_4_an_edit_of_a_copy_warns() -> None:
    model = _model()
    with pytest.warns(LostEditWarning, match=r"this in-place edit is of the result of torch\.Tensor\.clone") as caught:  # noqa: SIM117
        with model.trace(_x()):
            model[0].output.clone()[:, 0] = 0
            model.output.save()
    assert _line(caught) == "model[0].output.clone()[:, 0] = 0"


# -------------------------------------------------------------------------- 8: the first row of a block of old


def test_8_the_first_row_instead_of_the_hidden_states_warns() -> None:
    model = _gpt2()
    with pytest.warns(FirstRowWarning) as caught, model.trace(_ids(), use_cache=False):
        model.transformer.h[0].output[0][:] = 0
        out = model.output.logits.save()
    assert _line(caught) == "model.transformer.h[0].output[0][:] = 0"
    assert str(caught[0].message) == (
        "transformer.h.0:output[0] is one of 2 rows of the batch: what this module returns is one tensor, where older "
        "versions of the model returned a tuple; write .output for all rows, or .output[0:1] for this one"
    )

    def cut(live: Tensor) -> None:
        live[0] = 0

    edit = Edit("transformer.h.0", "output", "inplace", cut)
    assert torch.equal(out, run(model._module, (_ids(),), {"use_cache": False}, [edit])[0].logits)


def test_8_each_line_is_told_once() -> None:
    model = fxsight.Model(_gpt2()._module, cache=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            with model.trace(_ids(), use_cache=False):
                model.transformer.h[0].output[0].save()
    assert [w.category for w in caught] == [FirstRowWarning]


def test_8_what_is_meant_does_not_warn() -> None:
    model, block = _gpt2(), _gpt2().transformer.h[0]
    with model.trace(_ids(), use_cache=False):
        block.output[0:1].save()
        block.output[:, 0].save()
        block.output[0, -1].save()
        block.attn.output[0].save()  # a member of a tuple
        block.attn.output[0][:, 0].save()
        model.lm_head.output[0].save()  # no module of transformers
        model.output.logits[0].save()
        block.ln_1.input[0].save()
    with model.trace(_ids(1), use_cache=False):
        block.output[0].save()  # one row is all of them
    with _model().trace(_x()):
        _model()[0].output[0].save()


def test_8_in_an_invoke() -> None:
    model = _gpt2()
    with pytest.warns(FirstRowWarning, match=r"is one of 2 rows"), model.trace() as tracer:
        with tracer.invoke(_ids(1), use_cache=False):
            model.transformer.h[0].output[0].save()
        with tracer.invoke(_ids(2), use_cache=False):
            model.transformer.h[0].output[0].save()


# --------------------------------------------------------------- 5 and 6: edits of a part, and edited models called


def _zeroed(model: fxsight.Model) -> Tensor:
    out: Tensor = run(model._module, (_x(),), {}, [Edit("0", "output", "inplace", lambda h: h.zero_())])[0]
    return out


@pytest.mark.parametrize("inplace", [True, False])
def test_5_an_edit_of_a_part_counts_when_the_whole_is_traced(inplace: bool) -> None:
    model = fxsight.Model(_model()._module, cache=False)
    with model[0].edit(_x(), inplace=inplace) as part:
        model[0].output[:] = 0
    with part.root.trace(_x()):
        out = part.root.output.save()
    assert (part.root is model) == inplace
    assert torch.equal(out, _zeroed(model))
    assert not torch.equal(out, model._module(_x()))


def test_6_an_edited_model_called_plainly_is_edited() -> None:
    model = fxsight.Model(_model()._module, cache=False)
    with model.edit(_x(), inplace=True):
        model[0].output[:] = 0
    for out in (model(_x()), model.trace(_x(), trace=False)):
        assert torch.equal(out, _zeroed(model))
    model.clear_edits()
    assert torch.equal(model(_x()), model._module(_x()))


# ------------------------------------------------------------------------------ and two that were found on the way


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.inner(x), "parts": [x + 1, 3]}


def test_members_of_dicts_and_lists() -> None:
    model = fxsight.Model(Dicts(), cache=False)
    with model.trace(_x()):
        out = model.output.save()
        inner = model.output["parts"]
        logits = out["logits"].save()
        model.output = {"logits": logits * 2, "parts": inner}
        after = model.output.save()
    assert isinstance(out, dict) and torch.equal(out["logits"], model._module(_x())["logits"])
    assert torch.equal(out["parts"][0], _x() + 1) and out["parts"][1] == 3
    assert torch.equal(after["logits"], out["logits"] * 2)
    told = r"a member of :output was assigned, which the model does not see; change it .*\(model\.output = \.\.\.\)$"
    for key, value in (("logits", 0), ("parts", [1, 2])):
        with pytest.raises(fxsight.WriteError, match=told), model.trace(_x()):
            model.output[key] = value
    with pytest.raises(fxsight.WriteError, match=told), model.trace(_x()):
        model.output["parts"].append(torch.ones(1))


def test_a_cache_of_keys_and_values_is_the_model_own() -> None:
    model = _gpt2()
    with model.trace(_ids()) as tracer:
        out = model.output.save()
    expected = model._module(_ids())
    for layer, other in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
    assert out.past_key_values.get_seq_length() == 5
    assert "user" not in str(tracer.program)
    more = model._module(_ids()[:, :1], past_key_values=out.past_key_values).logits
    assert torch.equal(more, model._module(_ids()[:, :1], past_key_values=expected.past_key_values).logits)
