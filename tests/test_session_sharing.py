"""Traces of one session share what they have in common, and each has the bits of its own run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.own_memory import own_memory
from tests.executed import Count
from tests.test_sweep import LAYERS, LENGTH, bitwise, block_inputs, edited, gpt2, gpt2_model, plus, tokens, zero


def logits(module: nn.Module, port: str, change: Callable[[Tensor], Any], ids: Tensor) -> Tensor:
    """With a hook."""
    with edited(module, port, change):
        found: Tensor = gpt2()(ids).logits
    return found


def put(layer: int, position: int, clean: list[Tensor]) -> Callable[[Tensor], Any]:
    """A change: the clean value at a position."""

    def change(h: Tensor) -> None:
        h[:, position] = clean[layer][:, position]

    return change


class Deep(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.drop(layer(x)).tanh()
        return x


@cache
def deep() -> tuple[Deep, Any]:
    """Captured already, so that what is counted is what runs."""
    net = Deep().eval().requires_grad_(False)
    model = fxsight.Model(net, cache=False)
    with model.trace(x()):
        model.output.save()
    return net, model


@cache
def x(seed: int = 0) -> Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))


# -- against hooks ---------------------------------------------------------------------------------------------------


def test_patching_with_the_values_of_a_clean_trace() -> None:
    model, ids = gpt2_model(), tokens(2)
    cells: dict[tuple[int, int], Any] = {}
    with model.session() as session:
        with model.trace(tokens(1)):
            clean = [block.input for block in model.transformer.h]
        for layer in range(LAYERS):
            for position in range(LENGTH):
                with model.trace(ids):
                    model.transformer.h[layer].input[:, position] = clean[layer][:, position]
                    cells[layer, position] = model.lm_head.output.save()
    kept = block_inputs(tokens(1))
    for (layer, position), found in cells.items():
        assert type(found) is Tensor
        bitwise(found, logits(gpt2().transformer.h[layer], "input", put(layer, position, kept), ids))
    shown = session.explain()
    assert f"{LAYERS} programs for {LAYERS * LENGTH} traces" in shown and "1 alone: no other trace has" in shown


def test_inputs_with_the_same_tokens_are_the_same_inputs() -> None:
    model = gpt2_model()
    with model.session() as session:
        found: list[Any] = []
        for head in range(2):
            with model.trace(tokens(1)):
                model.transformer.h[1].attn.c_proj.input[..., head * 8 : head * 8 + 8] = 0
                found.append(model.output.logits.save())
    assert "one program for 2 traces" in session.explain()
    for head, one in enumerate(found):
        own = (Ellipsis, slice(head * 8, head * 8 + 8))
        bitwise(one, logits(gpt2().transformer.h[1].attn.c_proj, "input", zero(own), tokens(1)))


def test_different_bodies_and_what_they_read() -> None:
    """Bodies that have nothing in common but their inputs; a cache; the same value in two of them."""
    model, ids = gpt2_model(), tokens(3)
    blocks, vector = model.transformer.h, torch.ones(16)
    with model.session() as session:
        with model.trace(ids):
            first = {"mlp": blocks[0].mlp.output.save(), "twice": blocks[0].mlp.output.save()}
        with model.trace(ids) as tracer:
            kept = tracer.cache(blocks[1].mlp)
            blocks[0].output[:] += vector
            second = model.lm_head.output[:, -1].save()
        with model.trace(ids):
            third = blocks[0].mlp.output.save()
            part = third[:, 0].save()
    assert "3 traces" in session.explain() and "alone" not in session.explain()
    with model.trace(ids):
        mlp = blocks[0].mlp.output.save()
    for one in (*first.values(), third):
        bitwise(one, mlp)
    bitwise(part, mlp[:, 0])
    expected = logits(gpt2().transformer.h[0], "output", plus(vector), ids)
    bitwise(second, expected[:, -1])
    with model.trace(ids):
        blocks[0].output[:] += vector
        inner = blocks[1].mlp.output.save()
    bitwise(kept["model.transformer.h.1.mlp"].output, inner)
    third.zero_()
    bitwise(first["mlp"], mlp)
    bitwise(part, torch.zeros_like(part))  # a view of it, as in a trace of its own


def test_values_that_pass_through_several_traces() -> None:
    net, model = deep()
    for share in (True, False):
        with model.session(share=share) as session:
            outs: list[Any] = []
            for seed in range(3):
                with model.trace(x(seed)):
                    late = model.layers[3].output
                for scale in (1.0, 2.0):
                    with model.trace(x(9)):
                        model.layers[1].output[:] += late * scale
                        outs.append(model.output.save())
        expected = []
        for seed in range(3):
            kept: list[Tensor] = []
            handle = net.layers[3].register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
            net(x(seed))
            handle.remove()
            for scale in (1.0, 2.0):
                handle = net.layers[1].register_forward_hook(lambda _m, _a, out, v=kept[0] * scale: out + v)
                expected.append(net(x(9)))
                handle.remove()
        for found, right in zip(outs, expected, strict=True):
            bitwise(found, right)
        assert ("6 traces" in session.explain()) is share
        assert ("9 alone: share=False" in session.explain()) is not share


def test_a_value_that_is_the_input_of_several() -> None:
    net, model = deep()
    with model.session():
        with model.trace(x()):
            out = model.output
        found = []
        for row in range(2):
            with model.trace(out):
                model.layers[2].output[row] = 0
                found.append(model.output.save())
    for row, one in enumerate(found):
        with edited(net.layers[2], "output", zero(row)):
            bitwise(one, net(net(x())))


# -- what is computed ------------------------------------------------------------------------------------------------


def test_what_they_have_in_common_runs_once() -> None:
    _, model = deep()

    def run(share: bool) -> int:
        with Count() as executed, model.session(share=share):
            for row in range(2):
                with model.trace(x()):
                    model.layers[2].output[row] = 0
                    model.output.save()
        count: int = executed.linears
        return count

    assert (run(False), run(True)) == (8, 5)
    assert run(True) == 5  # the plan is there


def test_a_number_runs_what_waits_and_shares_it() -> None:
    net, model = deep()
    with Count() as executed, model.session():
        outs = []
        for row in range(2):
            with model.trace(x()):
                model.layers[3].output[row] = 0
                outs.append(model.output)
        assert executed.linears == 0
        numbers = [out.sum().item() for out in outs]
    assert executed.linears == 4
    for row in range(2):
        with edited(net.layers[3], "output", zero(row)):
            assert numbers[row] == net(x()).sum().item()


def test_new_tensors_of_the_same_plan() -> None:
    """A session in a loop: the plan is kept, the tensors are those of this time."""
    net, model = deep()
    for seed in range(3):
        vectors = [torch.full((6,), float(10 * seed + n)) for n in range(2)]
        with model.session():
            found = []
            for vector in vectors:
                with model.trace(x(seed)):
                    model.layers[1].output[:] += vector
                    found.append(model.output.save())
        for one, vector in zip(found, vectors, strict=True):
            with edited(net.layers[1], "output", plus(vector)):
                bitwise(one, net(x(seed)))


def test_the_program_of_a_trace_is_there_afterwards() -> None:
    _, model = deep()
    with model.session():
        tracers = []
        for row in range(2):
            with model.trace(x()) as tracer:
                model.layers[1].output[row] = 0
                out = model.output.save()
            tracers.append(tracer)
    assert tracers[1].tier == "eager"
    bitwise(tracers[1].program(x())[0], out)


# -- what is not shared ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["traces of a session", "invokes"])
def test_random_numbers_keep_their_order(kind: str) -> None:
    net = Deep().train().requires_grad_(False)
    model: Any = fxsight.Model(net, cache=False)
    is_session = kind == "traces of a session"
    torch.manual_seed(5)
    with model.session() if is_session else model.trace(mode="fast") as around:
        found = []
        for row in range(2):
            with model.trace(x()) if is_session else around.invoke(x()):
                model.layers[2].output[row] = 0
                found.append(model.output.save())
    torch.manual_seed(5)
    for row, one in enumerate(found):
        with edited(net.layers[2], "output", zero(row)):
            bitwise(one, net(x()))
    assert "2 alone" in around.explain()


def test_gradients_are_those_of_each_trace() -> None:
    net = Deep().eval()
    model = fxsight.Model(net, cache=False)
    with model.session() as session:
        found = []
        for row in range(2):
            with model.trace(x()):
                model.layers[2].output[row] = 0
                found.append(model.output.sum().save())
    for one in found:
        one.backward()
    assert "2 alone: gradients are enabled" in session.explain()
    with torch.no_grad(), model.session() as session:
        for row in range(2):
            with model.trace(x()):
                model.layers[2].output[row] = 0
                model.output.save()
    assert "one program for 2 traces" in session.explain()


def test_a_tensor_that_a_trace_changes_is_changed_in_order() -> None:
    _, model = deep()
    totals = [torch.ones(2, 6) for _ in range(2)]
    with model.session() as session:
        for row, total in enumerate(totals):
            with model.trace(x()):
                model.layers[2].output[row] = 0
                total += model.output
    assert "2 alone" in session.explain()
    with edited(deep()[0].layers[2], "output", zero(1)):
        bitwise(totals[1], deep()[0](x()) + 1)


def test_an_error_comes_at_its_trace() -> None:
    _, model = deep()
    used = torch.zeros(6)
    with pytest.raises(fxsight.InputError, match="was changed in place afterwards"), model.session():
        for row in range(2):
            with model.trace(x()):
                model.layers[2].output[row] = used
                model.output.save()
        used += 1


def test_nothing_has_run_yet() -> None:
    _, model = deep()
    with model.session() as session:
        with model.trace(x()):
            model.output.save()
        assert session.explain() == "0 traces have run"


def test_copies_are_laid_out_as_they_were() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    given = [base, base[:, 1], base.t(), base[0].expand(3, 6), base[:, 1], torch.zeros(0), 3, base[1:3, 2:4]]
    given.append(given[1])
    made = own_memory(given)
    for old, new in zip(given, made, strict=True):
        if isinstance(old, Tensor):
            bitwise(new, old)
            assert new.stride() == old.stride()
    made[0][0, 1] = 100.0
    assert made[1][0] == 100.0 and base[0, 1] == 1.0 and made[-1][0] == 1.0
    assert made[6] == 3
    twisted = torch.complex(base, base).conj()
    assert torch.equal(own_memory([twisted])[0], twisted)
