"""Several invokes in one forward: each sees and edits its rows; hooks on the joined batch say what is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.errors import LostEditWarning
from tests import small
from tests.oracle import Edit, Read, run
from tests.zoo import tiny_transformer, token_ids


class Pair(nn.Module):
    """A tuple of a tensor, one without rows, and a number."""

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, int]:
        return x * 2, table + 1, 7


class Fold(nn.Module):
    """Rows and positions folded into one dimension, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        folded: Tensor = self.inner(x.flatten(0, 1))
        return folded.view(x.shape[0], x.shape[1], -1)


class Swap(nn.Module):
    """Positions first, rows second."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) * 2


class Net(nn.Module):
    """f32[batch, length, 6], a mask f32[batch, length, 1] as keyword, a table f32[4, 6] that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.fold, self.swap = nn.Linear(6, 6), Pair(), Fold(), Swap()
        self.act, self.last = nn.ReLU(), nn.Linear(6, 6)
        self.table: Tensor
        self.register_buffer("table", torch.arange(24.0).reshape(4, 6) / 24)
        self.scale = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, gain: float = 1.0) -> Tensor:
        x = self.first(x)
        if mask is not None:
            x = x * mask
        doubled, table, _ = self.pair(x, self.scale(self.table))
        x = self.fold(doubled + table.sum(0)) * gain
        x = self.swap(x).transpose(0, 1)
        x = torch.tanh(x) + self.act(x)
        found: Tensor = self.last(x)
        return found


@cache
def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@cache
def _model() -> Any:
    return fxsight.Model(_net(), cache=False)


@cache
def _lm() -> Any:
    return fxsight.Model(tiny_transformer().eval().requires_grad_(False), cache=False)


def _x(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 6, generator=torch.Generator().manual_seed(10 * seed + batch))


A, B, C = _x(2), _x(1, 1), _x(3, 2)
ALL = torch.cat([A, B, C])
ROWS = (slice(0, 2), slice(2, 3), slice(3, 6))


def _rows(rows: slice, fn: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """The edit on some rows of the batch."""

    def edit(live: Tensor) -> None:
        fn(live[rows])

    return edit


def _hooks(*steps: Edit | Read, x: Tensor = ALL, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    return run(_net(), (x,), kwargs, steps)


# ------------------------------------------------------------------------------------------------------------- reads


def test_each_invoke_reads_its_rows_of_the_one_forward() -> None:
    with _model().trace() as tracer:
        found = []
        for x in (A, B, C):
            with tracer.invoke(x):
                found.append((_model().first.output.save(), _model().output.save(), _model().input.save()))
    out, (first,) = _hooks(Read("first", "output"))
    for rows, x, (hidden, last, given) in zip(ROWS, (A, B, C), found, strict=True):
        assert torch.equal(hidden, first[rows]) and torch.equal(last, out[rows]) and torch.equal(given, x)
    assert [str(n.target) for n in tracer.program.program.nodes.values()].count("aten.linear.default") == 3


def test_every_input_that_carries_the_batch_is_joined() -> None:
    masks = [torch.rand(len(x), 3, 1, generator=torch.Generator().manual_seed(len(x))) for x in (A, B, C)]
    for keyword in (True, False):
        with _model().trace() as tracer:
            found = []
            for x, mask in zip((A, B, C), masks, strict=True):
                with tracer.invoke(x, mask=mask, gain=2.0) if keyword else tracer.invoke(x, mask, gain=2.0):
                    found.append(_model().output.save())
        expected = _net()(ALL, torch.cat(masks), gain=2.0)
        assert all(torch.equal(a, expected[rows]) for a, rows in zip(found, ROWS, strict=True))


def test_padded_prompts_and_their_masks_on_bert_and_gpt2() -> None:
    bert, gpt = small.bert(), small.gpt2()
    ids = token_ids(4, 6)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] + [1] * 5, [1] * 6])
    for net, place, extra in ((bert, "encoder.layer.0.output", {}), (gpt, "transformer.h.0.mlp", {"use_cache": False})):
        model = fxsight.Model(net, cache=False)
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(input_ids=ids[:1], attention_mask=mask[:1], **extra):
                one = model.output[0].save()
            with tracer.invoke(input_ids=ids[1:], attention_mask=mask[1:], **extra):
                tracer.at(place).output[:, -1] = 0
                rest = model.output[0].save()
        edit = Edit(place, "output", "inplace", lambda live: live[1:, -1].zero_())
        expected, _ = run(net, (), {"input_ids": ids, "attention_mask": mask, **extra}, [edit])
        assert torch.equal(one, expected[0][:1]) and torch.equal(rest, expected[0][1:])


def test_a_model_whose_first_input_is_a_dict() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"y": self.layer(batch["x"]) * batch["mask"]}

    net = Takes().eval().requires_grad_(False)
    model = fxsight.Model(net, cache=False)
    masks = [torch.rand(len(x), 3, 1) for x in (A, B)]
    with model.trace() as tracer:
        found = []
        for x, mask in zip((A, B), masks, strict=True):
            with tracer.invoke({"x": x, "mask": mask}):
                model.layer.output *= 2.0
                found.append(model.output["y"].save())
    expected = net.layer(torch.cat([A, B])) * 2.0 * torch.cat(masks)
    assert torch.equal(found[0], expected[:2]) and torch.equal(found[1], expected[2:])


def test_reading_outside_the_invokes_is_reading_the_whole_batch() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            _model().first.output[:] = 0
        with tracer.invoke(C):
            pass
        whole, result = _model().first.output.save(), tracer.result.save()
        with tracer.invoke():
            also = _model().first.output.save()
    x = torch.cat([A, C])
    out, (first,) = _hooks(
        Edit("first", "output", "inplace", _rows(slice(0, 2), Tensor.zero_)), Read("first", "output"), x=x
    )
    assert torch.equal(whole, first) and torch.equal(also, first) and torch.equal(result, out)


def test_rows_in_a_dimension_that_is_not_the_first() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            one = _model().swap.output.save()
        with tracer.invoke(C):
            _model().swap.output[0] = 1.0
            two, out = _model().swap.output.save(), _model().output.save()
    x = torch.cat([A, C])
    expected, (swapped,) = _hooks(
        Edit("swap", "output", "inplace", lambda live: live[0, 2:].fill_(1.0)), Read("swap", "output"), x=x
    )
    assert torch.equal(one, swapped[:, :2]) and torch.equal(two, swapped[:, 2:]) and torch.equal(out, expected[2:])


# ------------------------------------------------------------------------------------------------------------- edits


def test_different_edits_in_one_forward() -> None:
    """Assigned, in place, by broadcasting, by a number, at inputs, at a source call: each for its rows alone."""
    with _model().trace() as tracer:
        with tracer.invoke(A):
            _model().first.output = _model().first.output * 3
            _model().last.input *= 0.5
            a = _model().output.save()
        with tracer.invoke(B):
            _model().first.output[:, 0] = 1.0
            _model().source.torch_tanh_0.output = torch.full((6,), 0.25)
            b = _model().output.save()
        with tracer.invoke(C):
            _model().act.output = 2.0
            _model().first.output.mul_(_model().first.output)
            c = _model().output.save()
    net = _net()
    x = net.first(ALL)
    x = torch.cat([x[:2] * 3, x[2:3].clone().index_fill_(1, torch.tensor([0]), 1.0), x[3:] * x[3:]])
    x = net.fold(x * 2 + (net.table + 1).sum(0))
    x = net.swap(x).transpose(0, 1)
    tanh, act = torch.tanh(x), net.act(x)
    tanh[2:3], act[3:] = 0.25, 2.0
    x = tanh + act
    x[:2] *= 0.5
    expected = net.last(x)
    assert torch.equal(a, expected[:2]) and torch.equal(b, expected[2:3]) and torch.equal(c, expected[3:])


def test_members_of_a_tuple() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            _model().pair.output[0] = torch.zeros(2, 3, 6)
            a, number = _model().output.save(), _model().pair.output[2]
        with tracer.invoke(B):
            first, table, seven = _model().pair.output
            _model().pair.output = (first + 1, table, seven)
            b = _model().output.save()
        with tracer.invoke(C):
            _model().pair.output[0][:, :, ::2] = 0
            c, kept = _model().output.save(), _model().pair.output.save()

    def edit(live: Tensor) -> None:
        live[:2] = 0
        live[2:3] += 1
        live[3:, :, ::2] = 0

    expected, (pair,) = _hooks(Edit("pair", "output", "inplace", edit), Read("pair", "output"))
    assert torch.equal(a, expected[:2]) and torch.equal(b, expected[2:3]) and torch.equal(c, expected[3:])
    assert number == 7 and torch.equal(kept[0], pair[3:]) and torch.equal(kept[1], _net().table + 1)


def test_the_same_location_edited_again_and_again() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            before = _model().first.output.save()
            _model().first.output += 1
            _model().first.output = _model().first.output * 2
            _model().first.output[:, -1] = 5.0
            after = _model().first.output.save()
        with tracer.invoke(B):
            other = _model().first.output.save()
            _model().first.output -= 1
            last = _model().first.output.save()
        out = _model().output.save()
    x = _net().first(torch.cat([A, B]))
    changed = torch.cat([(x[:2] + 1) * 2, x[2:] - 1])
    changed[:2, -1] = 5.0
    expected, _ = _hooks(Edit("first", "output", "assign", lambda live: changed), x=torch.cat([A, B]))
    assert torch.equal(before, x[:2]) and torch.equal(after, changed[:2]) and torch.equal(out, expected)
    assert torch.equal(other, x[2:]) and torch.equal(last, changed[2:])


def test_values_cross_the_invokes_both_ways() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(C):
            mine = _model().first.output
        with tracer.invoke(_x(3, 5)):
            _model().first.output = mine
            late = _model().first.output
            out = _model().output.save()
        with tracer.invoke(_x(3, 6)):
            _model().last.input = late
            last = _model().output.save()
    x = torch.cat([C, _x(3, 5), _x(3, 6)])
    first = _net().first(x)

    def edit(live: Tensor) -> None:
        live[3:6] = live[:3]

    def patch(live: Tensor) -> None:
        live[6:] = first[:3]

    edits = [Edit("first", "output", "inplace", edit), Edit("last", "input", "inplace", patch)]
    expected, _ = _hooks(*edits, x=x)
    assert torch.equal(out, expected[3:6]) and torch.equal(last, expected[6:])
    torch.testing.assert_close(out, expected[:3])  # a kernel may round equal rows of one batch differently


def test_shapes_of_an_invoke_are_those_of_its_rows_when_others_follow() -> None:
    model, one, two = _lm(), token_ids(1, 5), token_ids(2, 5)
    with model.trace() as tracer:
        with tracer.invoke(one):
            pass
        with tracer.invoke(one):
            model.blocks[0].ln_1.output.index_fill_(2, torch.tensor([1, 2]), -0.75)
        with tracer.invoke(two):
            like = fxsight.save(torch.ones(16).expand_as(model.blocks[0].drop.input))
    assert torch.equal(like, torch.ones(2, 5, 16))
    with model.trace() as tracer:
        with tracer.invoke(one):
            model.blocks[0].ln_1.input[:, ::2].tanh_()
            first = model.blocks[0].ln_1.input
            model.blocks[0].ln_1.output = torch.ones(16).expand_as(first)
        with tracer.invoke(one):
            assert first.mean() != 0  # with the batch of both
            norm = model.blocks[0].ln_1.output.save()
        out = model.output.save()
    assert norm.shape == (1, 5, 16) and out.shape[0] == 2


def test_g5_embeddings_of_one_prompt_in_another_without_a_barrier() -> None:
    ids, other = token_ids(1, 5), token_ids(1, 5) + 1
    with _lm().trace() as tracer:
        with tracer.invoke(ids):
            embeddings = _lm().embed.output
        with tracer.invoke(other):
            _lm().embed.output = embeddings
            patched = _lm().output.save()
        with tracer.invoke(other):
            _lm().embed.output[:] = embeddings
            also = _lm().output.save()
        with tracer.invoke(ids):
            plain = _lm().output.save()
    assert torch.equal(patched, plain) and torch.equal(also, plain)


def test_a_value_of_a_later_invoke_written_into_an_earlier_one_s_rows() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            here = _model().last.input
        with tracer.invoke(_x(2, 7)):
            here[:] = _model().first.output
        out = _model().output.save()
    x = torch.cat([A, _x(2, 7)])
    first = _net().first(x)

    def edit(live: Tensor) -> None:
        live[:2] = first[2:]

    expected, _ = _hooks(Edit("last", "input", "inplace", edit), x=x)
    assert torch.equal(out, expected)


def test_causality_across_invokes() -> None:
    with pytest.raises(fxsight.CausalityError, match="downstream"), _model().trace() as tracer:
        with tracer.invoke(A):
            late = _model().last.output
        with tracer.invoke(A):
            _model().first.output = late


# -------------------------------------------------------------------------------------------------------------- skip


def test_a_skip_touches_its_rows_alone() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            inner = _model().act.output.save()
        with tracer.invoke(B):
            _model().act.skip(_model().act.input * 0)
            b = _model().output.save()
        out = _model().output.save()
    x = torch.cat([A, B])
    expected, (act,) = _hooks(
        Edit("act", "output", "inplace", _rows(slice(2, 3), Tensor.zero_)), Read("act", "output"), x=x
    )
    assert torch.equal(b, expected[2:]) and torch.equal(out, expected) and torch.equal(inner, act[:2])


def test_what_is_inside_a_skipped_module_is_there_for_the_other_rows() -> None:
    ids = token_ids(2, 5)
    block = _lm().blocks[0]
    with _lm().trace() as tracer:
        with tracer.invoke(ids):
            before = block.mlp.output.save()
        with tracer.invoke(ids + 1):
            block.skip(block.input)
            with pytest.raises(
                fxsight.NotExecuted, match=r"blocks\.0\.mlp does not run: blocks\.0 around it is skipped"
            ):
                print(block.mlp.output)
        with tracer.invoke(ids + 2):
            after = block.mlp.output.save()
        with pytest.raises(fxsight.NotExecuted, match="is skipped"):
            print(block.mlp.output)
        out = _lm().output.save()
    x = torch.cat([ids, ids + 1, ids + 2])
    read = Read("blocks.0.mlp", "output")
    taken = run(_lm()._module, (x,), {}, [Read("blocks.0", "input")])[1][0]

    def edit(live: Tensor) -> Tensor:
        return torch.cat([live[:2], taken[2:4], live[4:]])

    expected, (mlp,) = run(_lm()._module, (x,), {}, [read, Edit("blocks.0", "output", "assign", edit)])
    assert torch.equal(out, expected) and torch.equal(before, mlp[:2]) and torch.equal(after, mlp[4:])


def test_a_skip_refuses_what_has_been_used_in_its_own_rows() -> None:
    block = _lm().blocks[0]
    with (
        pytest.raises(fxsight.TraceError, match=r"blocks\.0 cannot be skipped: blocks\.0\.mlp"),
        _lm().trace() as tracer,
    ):
        with tracer.invoke(token_ids(2, 5)):
            pass
        with tracer.invoke(token_ids(2, 5)):
            block.mlp.output[:] = 0
            block.skip(block.input)


# ------------------------------------------------------------------------------------------------------ what is shared


@pytest.mark.filterwarnings("ignore:.*nothing uses the result")
def test_what_has_no_rows_can_be_read_in_every_invoke_and_written_outside() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            table = _model().pair.output[1].save()
        with tracer.invoke(B):
            with pytest.raises(fxsight.WriteError, match="has no row for each prompt: all invokes share it"):
                _model().pair.output[1] = torch.zeros(4, 6)
            with pytest.raises(fxsight.WriteError, match="write it outside the invokes"):
                _model().pair.output[1][:] = 0
            with pytest.raises(fxsight.WriteError, match="all invokes share it"):
                _model().scale.output *= 2
        _model().pair.output[1] = torch.zeros(4, 6)
        out = _model().output.save()
    x = torch.cat([A, B])
    hidden = _net().fold(_net().first(x) * 2)
    hidden = _net().swap(hidden).transpose(0, 1)
    assert torch.equal(table, _net().table + 1)
    assert torch.equal(out, _net().last(torch.tanh(hidden) + _net().act(hidden)))


def test_a_value_with_a_folded_batch_is_refused_in_an_invoke_and_readable_outside() -> None:
    message = r"fold\.inner:output inside an invoke: its shape is f32\[.*\]: the rows of the batch are no dimension"
    with _model().trace() as tracer:
        with tracer.invoke(A):
            with pytest.raises(fxsight.TraceError, match=message):
                _model().fold.inner.output.save()
            with pytest.raises(fxsight.TraceError, match="outside the invokes"):
                _model().fold.inner.output = torch.zeros(6, 6)
        with tracer.invoke(B):
            out = _model().output.save()
        folded = _model().fold.inner.output.save()
    expected, (inner,) = _hooks(Read("fold.inner", "output"), x=torch.cat([A, B]))
    assert torch.equal(out, expected[2:]) and torch.equal(folded, inner)


def test_a_model_that_holds_for_one_batch_alone_is_captured_again() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(3, 6)
            for row in range(x.shape[0]):
                total = total + x[row]
            return self.layer(x + total)  # type: ignore[no-any-return]

    net = Fixed().eval().requires_grad_(False)
    model = fxsight.Model(net, cache=False)
    with model.trace() as tracer:
        with tracer.invoke(A):
            model.layer.input[:, 0] = 1.0
            a, given = model.output.save(), model.layer.input.save()
        with tracer.invoke(C):
            model.layer.output *= 2
            c = model.output.save()
    x = torch.cat([A, C])
    hidden = x + (torch.zeros(3, 6) + x[0] + x[1] + x[2] + x[3] + x[4])
    hidden[:2, 0] = 1.0
    expected = net.layer(hidden)
    expected[2:] *= 2
    assert torch.equal(a, expected[:2]) and torch.equal(given, hidden[:2]) and torch.equal(c, expected[2:])


def test_a_batch_of_one_first() -> None:
    """GPT-2 asks whether the batch is one: its program for one prompt is another than that for more."""
    net = small.gpt2()
    model, ids = fxsight.Model(net, cache=False), token_ids(3, 5)
    with model.trace() as tracer:
        with tracer.invoke(ids[:1], use_cache=False):
            attention = model.transformer.h[0].attn.source.attention_interface_0
            pattern = attention.source.torch_nn_functional_scaled_dot_product_attention_0
            model.transformer.h[0].mlp.output[:, 0] = 0
            heads, one = attention.output[0].save(), model.lm_head.output.save()
            weights = pattern.source.softmax_0.output.save()
        with tracer.invoke(ids[1:], use_cache=False):
            model.transformer.h[1].output *= 2
            two, also = model.lm_head.output.save(), attention.output[0].save()
    edits = [
        Edit("transformer.h.0.mlp", "output", "inplace", lambda live: live[:1, 0].zero_()),
        Edit("transformer.h.1", "output", "inplace", lambda live: live[1:].mul_(2)),
    ]
    expected = run(net, (ids,), {"use_cache": False}, edits)[0].logits
    assert torch.equal(two, expected[1:]) or torch.allclose(two, expected[1:], atol=1e-5)  # attention is opened
    assert torch.allclose(one, expected[:1], atol=1e-5)
    assert heads.shape[0] == 1 and also.shape[0] == 2 and weights.shape[:3] == (1, 2, 5)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "second, message",
    [
        (lambda: (torch.zeros(2, 4, 6),), "pad them to one length, or use two traces"),
        (lambda: (torch.zeros(2, 3, 6, dtype=torch.float64),), r"float32\[2, 3, 6\] and float64\[2, 3, 6\]"),
        (lambda: (A, torch.ones(2, 3, 1)), "inputs of different structure"),
        (lambda: (A, None), "inputs of different structure"),
        (lambda: ("text",), "no tensor with a batch dimension|different arguments|different structure"),
    ],
)
def test_inputs_that_cannot_be_one_batch(second: Callable[[], Any], message: str) -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            out = _model().output.save()
        with pytest.raises(fxsight.TraceError, match=message), tracer.invoke(*second()):
            raise AssertionError("the block is not entered")
        with tracer.invoke(B):
            last = _model().output.save()
    expected, _ = _hooks(x=torch.cat([A, B]))
    assert torch.equal(out, expected[:2]) and torch.equal(last, expected[2:])


def test_different_plain_arguments() -> None:
    with pytest.raises(fxsight.TraceError, match="different arguments"), _model().trace() as tracer:
        with tracer.invoke(A, gain=1.0):
            pass
        with tracer.invoke(A, gain=2.0):
            pass


def test_tensors_that_do_not_carry_the_batch() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            return x + offset

    model, offset = fxsight.Model(Adds(), cache=False), torch.arange(6.0)
    with model.trace() as tracer:
        with tracer.invoke(A, offset):
            pass
        with tracer.invoke(B, offset.clone()):
            b = model.output.save()
        with pytest.raises(fxsight.TraceError, match="different tensors that do not carry the batch"):
            tracer.invoke(B, offset + 1).__enter__()
    assert torch.equal(b, B + offset)


def test_an_invoke_inside_an_invoke() -> None:
    with _model().trace() as tracer, tracer.invoke(A):
        with pytest.raises(fxsight.TraceError, match="an invoke inside an invoke"), tracer.invoke(B):
            raise AssertionError("the block is not entered")
        a = _model().output.save()
    assert torch.equal(a, _net()(A))


def test_an_invoke_with_input_after_the_whole_batch_has_been_seen() -> None:
    message = "an invoke with an input where the whole batch has been seen already"
    with _model().trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke():
            _model().first.output[:] = 0
        with pytest.raises(fxsight.TraceError, match=message), tracer.invoke(B):
            raise AssertionError("the block is not entered")


def test_an_invoke_with_input_after_a_read_of_the_whole_batch() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            pass
        whole = _model().first.output.save()
        with pytest.raises(fxsight.TraceError, match="the whole batch has been seen already"), tracer.invoke(B):
            raise AssertionError("the block is not entered")
    assert torch.equal(whole, _net().first(A))


def test_a_trace_with_an_input_of_its_own() -> None:
    with _model().trace(A) as tracer:
        with pytest.raises(fxsight.TraceError, match="has its input from trace"), tracer.invoke(B):
            raise AssertionError("the block is not entered")
        with tracer.invoke():
            out = _model().output.save()
    assert torch.equal(out, _net()(A))


def test_values_before_the_first_invoke() -> None:
    with _model().trace() as tracer:
        with pytest.raises(fxsight.TraceError, match="no input yet"):
            print(_model().output)
        with pytest.raises(fxsight.TraceError, match="the first invoke of a trace needs an input"), tracer.invoke():
            raise AssertionError("the block is not entered")
        with tracer.invoke(A):
            out = _model().output.save()
    assert torch.equal(out, _net()(A))


def test_a_trace_without_any_input() -> None:
    with pytest.raises(fxsight.TraceError, match="needs an input, or at least one"), _model().trace():
        pass


# ----------------------------------------------------------------------------------------------------------- the rest


def test_barrier_invoker_and_inputs() -> None:
    with _model().trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(A, gain=1.0) as invoker:
            barrier()
            assert tracer.invoker is invoker and invoker.inputs[0][0] is A and invoker.inputs[1] == {"gain": 1.0}
        with tracer.invoke(B, gain=1.0):
            barrier()
            assert tracer.invoker is not invoker
            out = _model().output.save()
    assert torch.equal(out, _hooks(x=torch.cat([A, B]))[0][2:])


def test_numbers_on_demand_in_invokes() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            a = _model().first.output.sum().item()
            if _model().first.output[0, 0, 0] < 100:
                _model().first.output *= 2
        with tracer.invoke(B):
            b = float(_model().first.output.sum())
            crossed = _model().first.output[:, :1] * a
            _model().first.output[:, :1] = crossed
            assert _model().first.output.shape == (1, 3, 6)
        out = _model().output.save()
        total = _model().output.sum().item()
    first = _net().first(torch.cat([A, B]))
    first[:2] *= 2
    first[2:, :1] *= a
    expected, _ = _hooks(Edit("first", "output", "assign", lambda live: first), x=torch.cat([A, B]))
    assert torch.equal(out, expected) and total == expected.sum().item()
    assert a == pytest.approx(_net().first(A).sum().item()) and b == pytest.approx(_net().first(B).sum().item())


def test_an_error_inside_an_invoke_leaves_the_model_usable() -> None:
    with pytest.raises(IndexError), _model().trace() as tracer:
        with tracer.invoke(A):
            pass
        with tracer.invoke(B):
            print(_model().first.output[:, 17])
    with _model().trace() as tracer, tracer.invoke(A):
        with pytest.raises(ZeroDivisionError):
            print(1 / 0)
        out = _model().output.save()
    assert torch.equal(out, _net()(A))


def test_an_error_caught_around_an_invoke() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            a = _model().output.save()
        try:
            with tracer.invoke(B):
                raise KeyError("mine")
        except KeyError:
            pass
        whole = _model().output.save()
    assert whole.shape == (3, 3, 6) and torch.equal(a, whole[:2])


def test_a_stop_in_an_invoke_ends_the_block() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            a = _model().output.save()
        with tracer.invoke(B):
            tracer.stop()
            a[:] = 0
    assert torch.equal(a, _hooks(x=torch.cat([A, B]))[0][:2])


def test_the_program_of_invokes_on_other_inputs_of_these_sizes() -> None:
    with _model().trace() as tracer:
        with tracer.invoke(A):
            _model().first.output[:] = 0
            _model().output.save()
        with tracer.invoke(C):
            _model().output.save()
    other = _x(5, 9)
    expected, _ = _hooks(Edit("first", "output", "inplace", _rows(slice(0, 2), Tensor.zero_)), x=other)
    found = tracer.program(other)
    assert torch.equal(found[0], expected[:2]) and torch.equal(found[1], expected[2:])
    with pytest.raises(fxsight.InputError, match="batch = 5"):
        tracer.program(_x(4))


def test_the_same_invokes_again_are_the_same_program() -> None:
    def programs(a: Tensor, c: Tensor) -> Any:
        with _model().trace() as tracer:
            with tracer.invoke(a):
                _model().first.output[:] = 0
            with tracer.invoke(c):
                _model().output.save()
        return tracer.program.program

    assert programs(A, C) is programs(_x(2, 8), _x(3, 8)) and programs(A, C) is not programs(C, A)


def test_a_stale_handle_of_another_invoke_warns() -> None:
    with pytest.warns(LostEditWarning, match="read before first:output was written again"), _model().trace() as tracer:
        with tracer.invoke(A):
            handle = _model().first.output
            _model().first.output = handle * 2
            handle[:] = 0
        with tracer.invoke(B):
            out = _model().first.output.save()
    assert torch.equal(out, _net().first(torch.cat([A, B]))[2:])


def test_a_handle_of_rows_while_other_rows_are_edited() -> None:
    """The value it was; edited in place, it warns: the location has been written since."""
    with pytest.warns(LostEditWarning, match="read the location anew and edit that"), _model().trace() as tracer:
        with tracer.invoke(A):
            mine = _model().first.output.save()
        with tracer.invoke(B):
            _model().first.output[:] = 1.0
        mine[:] = 2.0
        whole = _model().first.output.save()
    first = _net().first(torch.cat([A, B]))
    assert torch.equal(whole[:2], first[:2]) and (whole[2:] == 1).all() and (mine == 2).all()
