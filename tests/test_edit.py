"""Edits that stay: said once, made in every forward of the edited model; compared with hooks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight import Model, NotExecuted
from fxsight.errors import EditError, FirstCallWarning, LostEditWarning, NeedsValueError, TraceError, WriteError
from tests import small
from tests.oracle import Edit, run


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return x + torch.tanh(self.lin(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.spare = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, spare: bool = False) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(self.spare(x) if spare else x)

    def encode(self, x: Tensor) -> Any:
        return self.blocks[0](x) * 2


@pytest.fixture
def model() -> Model:
    return Model(Net().requires_grad_(False), cache=False)


def _x(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn((rows, 4), generator=torch.Generator().manual_seed(seed))


def _hooked(model: Model, x: Tensor, *steps: Edit) -> Tensor:
    out: Tensor = run(model._module, (x,), {}, steps)[0]
    return out


def _double(h: Tensor) -> Tensor:
    return h * 2


def _zero(h: Tensor) -> None:
    h[:, 0] = 0


DOUBLE = Edit("blocks.0", "output", "assign", _double)
ZERO = Edit("blocks.1", "output", "inplace", _zero)


def _edited(model: Model) -> Model:
    with model.edit(_x()) as edited:
        model.blocks[0].output = model.blocks[0].output * 2
        model.blocks[1].output[:, 0] = 0
    assert isinstance(edited, Model)
    return edited


@cache
def _language(kind: str) -> Model:
    net = small.gpt2() if kind == "gpt2" else small.llama(num_key_value_heads=1)
    return Model(net, cache=False)


def _ids(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(length))


# -- what an edit does -----------------------------------------------------------------------------------------------


def test_plain_call_is_the_hooks(model: Model) -> None:
    edited = _edited(model)
    for rows in (3, 1, 8):
        assert torch.equal(edited(_x(rows)), _hooked(model, _x(rows), DOUBLE, ZERO))
        assert torch.equal(edited.trace(_x(rows), trace=False), edited(_x(rows)))


def test_original_is_untouched(model: Model) -> None:
    before = {name: t.clone() for name, t in model._module.state_dict().items()}
    edited = _edited(model)
    edited(_x())
    assert torch.equal(model(_x()), model._module(_x()))
    assert not model.edits
    assert all(torch.equal(t, before[name]) for name, t in model._module.state_dict().items())


def test_trace_sees_the_edits_first(model: Model) -> None:
    edited = _edited(model)
    for _ in range(3):  # recorded, then remembered
        with edited.trace(_x()):
            first = edited.blocks[0].output.save()
            model.blocks[1].output[:, 1] = 0  # a handle of the base is as good
            out = edited.output.save()
        plain = run(model._module.blocks[0], (_x(),), {})[0]
        assert torch.equal(first, plain * 2)
        assert torch.equal(out, _hooked(model, _x(), DOUBLE, ZERO, Edit("blocks.1", "output", "inplace", _one)))


def _one(h: Tensor) -> None:
    h[:, 1] = 0


def test_edited_handles_in_the_body(model: Model) -> None:
    with model.edit(_x()) as edited:
        edited.blocks[0].output = edited.blocks[0].output * 2
        model.blocks[1].output[:, 0] = 0
    assert torch.equal(edited(_x()), _hooked(model, _x(), DOUBLE, ZERO))
    assert edited.blocks[0].root is edited


def test_edits_stack_and_copies_inherit(model: Model) -> None:
    with model.edit(_x(), inplace=True) as same:
        model.blocks[0].output = model.blocks[0].output * 2
    assert same is model
    with model.edit() as edited:
        model.blocks[0].output[:, 0] = 0
    with edited.edit() as twice:
        edited.blocks[0].output = edited.blocks[0].output + 1

    def zero_after(h: Tensor) -> Tensor:
        h = h * 2
        h[:, 0] = 0
        return h

    assert [len(m.edits) for m in (model, edited, twice)] == [1, 2, 3]
    assert torch.equal(model(_x()), _hooked(model, _x(), DOUBLE))
    assert torch.equal(edited(_x()), _hooked(model, _x(), Edit("blocks.0", "output", "assign", zero_after)))
    after = Edit("blocks.0", "output", "assign", lambda h: zero_after(h) + 1)
    assert torch.equal(twice(_x()), _hooked(model, _x(), after))
    model.clear_edits()
    assert torch.equal(model(_x()), model._module(_x()))
    assert len(twice.edits) == 3


def test_edits_between_locations_see_each_other(model: Model) -> None:
    with model.edit(_x()) as edited:
        model.blocks[0].output = model.blocks[0].output * 2
    with edited.edit() as both:
        edited.blocks[2].output = edited.blocks[0].output + edited.blocks[1].output
    kept: list[Tensor] = []

    def keep(h: Tensor) -> None:
        kept.append(h.clone())

    steps = [DOUBLE, Edit("blocks.0", "output", "inplace", keep), Edit("blocks.1", "output", "inplace", keep)]
    want = _hooked(model, _x(), *steps, Edit("blocks.2", "output", "assign", lambda h: kept[0] + kept[1]))
    assert torch.equal(both(_x()), want)


def test_edit_of_a_part_counts_for_the_whole(model: Model) -> None:
    with model.blocks[0].edit(_x()) as part:
        part.output = part.output * 2
    assert part.path == "blocks.0"
    assert torch.equal(part.root(_x()), _hooked(model, _x(), DOUBLE))
    with part.root.trace(_x()):
        out = part.root.output.save()
    assert torch.equal(out, _hooked(model, _x(), DOUBLE))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_models(kind: str) -> None:
    model = _language(kind)
    blocks, path = (
        (model.transformer.h, "transformer.h.1") if kind == "gpt2" else (model.model.layers, "model.layers.1")
    )
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1))
    with model.edit(_ids()) as edited:
        blocks[1].output[:] += vector

    def add(h: Tensor) -> None:
        h += vector

    for rows, length in ((2, 5), (3, 16)):
        ids = _ids(rows, length)
        want = run(model._module, (ids,), {}, [Edit(path, "output", "inplace", add)])[0]
        got = edited(ids)
        assert type(got) is type(want)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.past_key_values.layers[1].keys, want.past_key_values.layers[1].keys)
        plain = edited(input_ids=ids, use_cache=False, return_dict=False)
        assert torch.equal(plain[0], want.logits)


def test_seed_program() -> None:
    """G7: edit, clear, edit in place."""
    model = _language("gpt2")
    with model.trace(_ids()):
        hs = model.transformer.h[1].output[:, -1, :].save()
        clean = model.lm_head.output.save()
    with model.edit() as edited:
        model.transformer.h[1].output[:, -1, :] = hs * 0
    with model.trace(_ids()):
        original = model.lm_head.output.save()
    with edited.trace(_ids()):
        changed = model.lm_head.output.save()
    assert torch.equal(original, clean)
    assert not torch.equal(changed, clean)
    with model.edit(inplace=True):
        model.transformer.h[1].output[:, -1, :] = hs * 0
    with model.trace(_ids()):
        inplace = model.lm_head.output.save()
    model.clear_edits()
    with model.trace(_ids()):
        cleared = model.lm_head.output.save()
    assert torch.equal(inplace, changed)
    assert torch.equal(cleared, clean)


# -- other kinds of blocks -------------------------------------------------------------------------------------------


def test_invokes(model: Model) -> None:
    edited = _edited(model)
    with edited.trace() as tracer:
        with tracer.invoke(_x(2)):
            a = edited.output.save()
        with tracer.invoke(_x(3, seed=1)):
            edited.blocks[2].output[:] = 0
            b = edited.output.save()
    assert torch.allclose(a, _hooked(model, _x(2), DOUBLE, ZERO))
    last = Edit("blocks.2", "output", "inplace", lambda h: h.zero_())
    assert torch.allclose(b, _hooked(model, _x(3, seed=1), DOUBLE, ZERO, last))


def test_session(model: Model) -> None:
    edited = _edited(model)
    with fxsight.session():
        with edited.trace(_x()):
            h = edited.blocks[0].output
        with model.trace(_x(seed=1)):
            model.blocks[0].output = h
            out = model.output.save()
    first = run(model._module.blocks[0], (_x(),), {})[0] * 2
    assert torch.equal(out, _hooked(model, _x(seed=1), Edit("blocks.0", "output", "assign", lambda h: first)))


def test_sweep(model: Model) -> None:
    edited = _edited(model)

    def body(row: int) -> Any:
        edited.blocks[2].input[row] = 0
        return edited.output[:, 0]

    grid = edited.sweep(body, _x(), row=range(3))
    for row in range(3):

        def zero(h: Tensor, row: int = row) -> None:
            h[row] = 0

        want = _hooked(model, _x(), DOUBLE, ZERO, Edit("blocks.2", "input", "inplace", zero))
        assert torch.equal(grid.values[row], want[:, 0])


def test_scan_and_cache(model: Model) -> None:
    edited = _edited(model)
    with edited.scan(_x()):
        shape = edited.blocks[0].output.shape
    assert shape == (3, 4)
    with edited.trace(_x()) as tracer:
        cache = tracer.cache()
    assert torch.equal(cache["blocks.0"].output, run(model._module.blocks[0], (_x(),), {})[0] * 2)


def test_skip(model: Model) -> None:
    with model.edit(_x()) as edited:
        model.blocks[1].skip(model.blocks[1].input)
    net = model._module
    with torch.no_grad():
        want = net.head(net.blocks[2](net.blocks[0](_x())))
    assert torch.equal(edited(_x()), want)
    for _ in range(2):
        with (
            pytest.raises(NotExecuted, match=r"blocks.1.lin does not run: blocks.1 around it is skipped"),
            edited.trace(_x()),
        ):
            edited.blocks[1].lin.output.save()


def test_attached_module(model: Model) -> None:
    model.blocks[1].sae = nn.Linear(4, 4)
    with model.edit(_x()) as edited:
        acts = model.blocks[1].output
        model.blocks[1].output[:] = model.blocks[1].sae(acts)
    sae = model._module.blocks[1].sae
    want = _hooked(model, _x(), Edit("blocks.1", "output", "assign", lambda h: sae(h)))
    assert torch.equal(edited(_x()).detach(), want)
    assert not edited.edit_parameters  # its weights are the model's
    with torch.no_grad():
        sae.weight.zero_()
    want = _hooked(model, _x(), Edit("blocks.1", "output", "assign", lambda h: sae(h)))
    assert torch.equal(edited(_x()).detach(), want)


def test_method(model: Model) -> None:
    with model.edit(_x()) as edited:
        model.blocks[0].output = model.blocks[0].output * 2
    assert torch.equal(edited.encode(_x()), run(model._module.blocks[0], (_x(),), {})[0] * 4)
    with edited.encode.trace(_x()) as tracer:
        out = tracer.result.save()
    assert torch.equal(out, edited.encode(_x()))


def test_inductor(model: Model) -> None:
    edited = _edited(model)
    with edited.trace(_x(), backend="inductor"):
        out = edited.output.save()
    torch.testing.assert_close(out, edited(_x()))


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_without_example(model: Model) -> None:
    with pytest.raises(TraceError, match=r"give example inputs, model.edit\(x\), or trace once before"), model.edit():
        pass
    model.capture(_x())
    with model.edit() as edited:
        model.blocks[0].output = model.blocks[0].output * 2
    assert torch.equal(edited(_x(7)), _hooked(model, _x(7), DOUBLE))


def test_numbers_and_saves_are_refused(model: Model) -> None:
    with pytest.raises(NeedsValueError, match=r"a number is needed, and an edit runs nothing"), model.edit(_x()):
        if model.blocks[0].output.sum() > 0:
            pass
    told = r"test_edit.py:\d+: an edit runs nothing, so there is nothing to save"
    with pytest.raises(TraceError, match=told), model.edit(_x()):
        model.blocks[0].output.save()


def test_edit_that_changes_nothing(model: Model) -> None:
    told = r"this edit changes nothing in the model"
    with pytest.warns(LostEditWarning), pytest.raises(EditError, match=told), model.edit(_x()):
        h = model.blocks[0].output
        h = h * 2
    kept = torch.zeros(3, 4)
    with pytest.raises(EditError, match=r"an edit cannot change a tensor of yours in place"), model.edit(_x()):
        kept += model.blocks[0].output


def test_an_error_in_the_body_leaves_no_edit(model: Model) -> None:
    with pytest.raises(IndexError), model.edit(_x(), inplace=True):
        model.blocks[0].output[:] = 0
        model.blocks[0].output[:, 9] = 0
    assert not model.edits


def test_inside_a_block(model: Model) -> None:
    edited = _edited(model)
    with pytest.raises(TraceError, match="a trace inside a trace"), model.trace(_x()), model.edit():
        pass
    with pytest.raises(TraceError, match="an edited model cannot be called inside a block on it"), model.trace(_x()):
        edited(_x())


def test_places_that_this_forward_has_not(model: Model) -> None:
    with model.edit(_x(), spare=True) as edited:
        model.blocks[0].output[:, 0] = 0
        model.spare.output[:, 0] = 0
        model.spare.input[:, 1] = 0
    edited(_x(), spare=True)
    message = (
        r"the edit of blocks.0:output, spare:output, spare:input \(.*test_edit.py:\d+\) cannot be made in this forward:"
        r"\n  spare: this forward never calls the module 'spare'"
    )
    for _ in range(2):
        with pytest.raises(EditError, match=message):
            edited(_x())
        with pytest.raises(EditError, match=message), edited.trace(_x()):
            pass


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = self.cell(x)
        return x


def test_a_module_that_is_called_several_times() -> None:
    model = Model(Twice().requires_grad_(False), cache=False)
    told = r"calls 'cell' 2 times, and the edit is of the first call"
    with pytest.warns(FirstCallWarning, match=told), model.edit(_x()) as edited:
        model.cell.output[:, 0] = 0
    assert torch.equal(edited(_x()), _hooked(model, _x(), Edit("cell", "output", "inplace", _zero)))
    with model.edit(_x()) as edited:
        model.cell.call(1).output[:, 0] = 0
    assert torch.equal(edited(_x()), _hooked(model, _x(), Edit("cell#1", "output", "inplace", _zero)))
    with pytest.raises(EditError, match=r"cell#1: this forward calls 'cell' once; the last is cell"):
        edited(_x(), times=1)


def test_a_size_that_was_looked_at(model: Model) -> None:
    with model.edit(_x()) as edited:
        h = model.blocks[0].output
        model.blocks[0].output = h * h.shape[0]
    assert torch.equal(edited(_x()), _hooked(model, _x(), Edit("blocks.0", "output", "assign", lambda h: h * 3)))
    with pytest.raises(EditError, match=r"has looked at a shape, which was \[3, 4\] and is \[5, 4\] here"):
        edited(_x(5))
    with model.edit(_x()) as edited:
        h = model.blocks[0].output
        model.blocks[0].output = h * h.size(-1) * h.dim()
    four = Edit("blocks.0", "output", "assign", lambda h: h * 4 * 2)
    assert torch.equal(edited(_x(5)), _hooked(model, _x(5), four))


def test_a_tensor_of_the_example_s_size(model: Model) -> None:
    rows = torch.arange(12.0).reshape(3, 4)
    with model.edit(_x()) as edited:
        model.blocks[0].output = rows
    assert torch.equal(edited(_x()), _hooked(model, _x(), Edit("blocks.0", "output", "assign", lambda h: rows)))
    told = r"f32\[5, 4\], .* is .*\[3, 4\]"
    with pytest.raises(WriteError, match=told):
        edited(_x(5))
    four = torch.arange(4.0)
    with model.edit(_x(4)) as edited:  # its size is that of the batch by chance
        model.blocks[0].output += four
    assert torch.equal(edited(_x(5)), _hooked(model, _x(5), Edit("blocks.0", "output", "assign", lambda h: h + four)))


def test_random_numbers_are_drawn_anew(model: Model) -> None:
    with model.edit(_x()) as edited:
        h = model.blocks[0].output
        model.blocks[0].output = h + torch.randn_like(h)
    torch.manual_seed(3)
    a, b = edited(_x()), edited(_x())
    torch.manual_seed(3)
    noise = Edit("blocks.0", "output", "assign", lambda h: h + torch.randn_like(h))
    assert torch.equal(a, _hooked(model, _x(), noise))
    assert torch.equal(b, _hooked(model, _x(), noise))


def test_print(model: Model) -> None:
    edited = _edited(model)
    text = "\n".join(line for line in str(edited.edits).splitlines() if not line.startswith("#"))
    assert text == (
        "read_0 = read blocks.0:output    # f32[3, 4]\n"
        "user_mul = torch.Tensor.mul(read_0, 2)    # f32[3, 4]\n"
        "read_1 = read blocks.1:output    # f32[3, 4]\n"
        "user_mutate = mutate(read_1, (), 'torch.Tensor.__setitem__', "
        "('%self', (slice(None, None, None), 0), 0), {})    # f32[3, 4]\n"
        "blocks.0:output <- user_mul\n"
        "blocks.1:output << user_mutate"
    )
    assert [str(a) for a in edited.edits[0].addresses] == ["blocks.0:output", "blocks.1:output"]
    assert repr(model.edits) == "no edits"
