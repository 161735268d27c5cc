"""``model.trace(mode=...)``: invokes that share what they have in common, against hooks on each invoke alone."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxsight
from fxsight.model import Model
from tests import oracle, small
from tests.executed import Count
from tests.random_blocks import Script, describe, random_script, run_with_hooks
from tests.random_programs import places
from tests.test_language import DEMO
from tests.test_random_blocks import run_step_all
from tests.test_session_sharing import Deep, deep, x
from tests.test_sweep import LAYERS, bitwise, edited, gpt2, gpt2_model, tokens, zero
from tests.zoo import tiny_transformer, token_ids

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
MODES = ("exact", "fast")


def agree(mode: str, found: Tensor, expected: Tensor) -> None:
    """Bit for bit, or in mode fast within the tolerance."""
    assert type(found) is Tensor and found.shape == expected.shape
    bitwise(found, expected) if mode == "exact" else assert_close(found, expected, **CLOSE)


def head(number: int) -> Any:
    """The part of ``c_proj``'s input that is one head's."""
    return Ellipsis, slice(number * 8, number * 8 + 8)


# -- against hooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_heads_of_all_layers(mode: str) -> None:
    """Gradients are enabled and the weights require them; what is computed has no graph."""
    model, ids = gpt2_model(), tokens(1)
    found: dict[tuple[int, int], Any] = {}
    with model.trace(mode=mode) as tracer:
        with tracer.invoke(ids):
            clean = model.lm_head.output.save()
        for layer in range(LAYERS):
            for number in range(2):
                with tracer.invoke(ids):
                    model.transformer.h[layer].attn.c_proj.input[head(number)] = 0
                    found[layer, number] = model.lm_head.output[:, -1].save()
    with torch.no_grad():
        bitwise(clean, gpt2()(ids).logits)
        for (layer, number), out in found.items():
            with edited(gpt2().transformer.h[layer].attn.c_proj, "input", zero(head(number))):
                agree(mode, out, gpt2()(ids).logits[:, -1])
    shown = tracer.explain()
    assert shown.startswith(f"7 invokes have run; {mode}\n") and f"{1 + LAYERS} programs for 7 invokes" in shown
    assert ("together" in shown) is (mode == "fast") and not clean.requires_grad
    assert tracer.mode == mode and tracer.tier == "eager"


@pytest.mark.parametrize("mode", MODES)
def test_values_flow_from_one_invoke_to_another(mode: str) -> None:
    """Also from a late layer to an early one; prompts of several lengths, none of them padded."""
    model, clean, other = gpt2_model(), tokens(1), tokens(2)[:1, :3]
    blocks = model.transformer.h
    found: list[Any] = []
    with model.trace(mode=mode) as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(clean):
            kept = [block.output for block in blocks]
            barrier()
        with tracer.invoke(other) as invoker:
            alone = model.lm_head.output.save()
        for layer in range(LAYERS):
            with tracer.invoke(tokens(3)):
                blocks[0].output[:, -1] = kept[layer][:, -1] * 2
                found.append(model.lm_head.output.save())
    assert invoker.inputs == ((other,), {}) and tracer.invoker.inputs[0][0].shape == (2, 5)
    net = gpt2()
    with torch.no_grad():
        bitwise(alone, net(other).logits)
        reads = [oracle.Read(f"transformer.h.{layer}", "output") for layer in range(LAYERS)]
        _, states = oracle.run(net, (clean,), {}, reads)
        for out, state in zip(found, states, strict=True):

            def put(h: Tensor, state: Tensor = state) -> None:
                h[:, -1] = state[:, -1] * 2

            with edited(net.transformer.h[0], "output", put):
                agree(mode, out, net(tokens(3)).logits)


def run_with_invokes(script: Script, model: Model, mode: str) -> tuple[list[Any], list[Any]]:
    """All blocks of a script as invokes of one trace: the saved values in order, and the logits of each."""
    known, saved, logits = dict[str, Any](), list[Any](), list[Any]()
    with model.trace(mode=mode) as tracer:
        for invoke in (invoke for trace in script for invoke in trace):
            with tracer.invoke(invoke.ids()):
                run_step_all(invoke, model, known, saved)
                logits.append(model.output.save())
    return saved, logits


def check(first: int, count: int, mode: str) -> None:
    """Compare ``count`` scripts beginning at one seed; half of the invokes have the inputs of another."""
    net = tiny_transformer().eval()
    model = Model(net, cache=False)
    at = places(net, token_ids(2, 5))
    for seed in range(first, first + count):
        script = random_script(seed, at)
        script = tuple((replace(invoke, seed=invoke.seed % 2),) for trace in script for invoke in trace)
        expected = run_with_hooks(script, net)
        try:
            found = run_with_invokes(script, model, mode)
            for one, right in zip(chain(*found), chain(*expected), strict=True):
                agree(mode, one, right)
        except Exception as error:
            raise AssertionError(f"seed {seed} fails: {error!r}\n{describe(script)}") from error


@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")  # copies that nothing reads are edited, too
@pytest.mark.parametrize("mode", MODES)
def test_random_scripts_equal_hooks(mode: str) -> None:
    check(0, 20, mode)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")
@pytest.mark.parametrize("first", range(20, 1020, 100))
@pytest.mark.parametrize("mode", MODES)
def test_many_random_scripts_equal_hooks(mode: str, first: int) -> None:
    check(first, 100, mode)


@pytest.mark.parametrize("mode", MODES)
def test_random_edits_of_a_plain_network(mode: str) -> None:
    """Many invokes on two inputs, each with some edits of rows, units and layers."""
    net, model = deep()
    for seed in range(10):
        rng = random.Random(seed)
        edits = [(rng.randrange(2), [_random_edit(rng) for _ in range(rng.randrange(3))]) for _ in range(8)]
        found = []
        with model.trace(mode=mode) as tracer:
            for given, steps in edits:
                with tracer.invoke(x(given)):
                    for layer, index, factor in steps:
                        model.layers[layer].output[index] *= factor
                    found.append(model.output.save())
        for out, (given, steps) in zip(found, edits, strict=True):
            hooks = [oracle.Edit(f"layers.{n}", "output", "inplace", _scaled(i, f)) for n, i, f in steps]
            agree(mode, out, oracle.run(net, (x(given),), {}, hooks)[0])


def _random_edit(rng: random.Random) -> tuple[int, Any, float]:
    index = rng.choice([rng.randrange(2), (slice(None), rng.randrange(6)), (rng.randrange(2), slice(1, 4))])
    return rng.randrange(4), index, rng.choice((0.0, 2.0, -1.5))


def _scaled(index: Any, factor: float) -> Any:
    def change(h: Tensor) -> None:
        h[index] *= factor

    return change


def test_texts_of_several_lengths_are_not_padded() -> None:
    """Positions and tokens are those of each prompt; equal texts share."""
    model = fxsight.LanguageModel(str(DEMO))
    prompts = ["The Eiffel Tower is in", "The Eiffel Tower is in", "Rome is"]
    found: list[Any] = []
    with model.trace(mode="exact") as tracer:
        for number, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                model.transformer.h[0].output[tracer.tokens(" is").last] *= number
                found.append(model.logits.save())
    for number, (prompt, logits) in enumerate(zip(prompts, found, strict=True)):
        with model.trace(prompt) as alone:
            model.transformer.h[0].output[alone.tokens(" is").last] *= number
            right = model.logits.save()
        bitwise(logits, right)
    assert found[0].shape[1] > found[2].shape[1] and "one program for 2 invokes" in tracer.explain()
    with refused("mode='exact' is for a trace of invokes"):
        model.generate("Rome is", max_new_tokens=2, mode="exact")


# -- what is computed ------------------------------------------------------------------------------------------------


def test_what_they_have_in_common_runs_once() -> None:
    _, model = deep()

    def run(**options: Any) -> int:
        with Count() as executed, model.trace(**options) as tracer:
            for row in range(2):
                with tracer.invoke(x()):
                    model.layers[2].output[row] = 0
                    model.output.save()
        count: int = executed.linears
        return count

    assert (run(), run(mode="exact")) == (4, 5)
    assert run(mode="exact") == 5  # the plan is there


def test_the_budget_cuts_what_is_computed_together() -> None:
    net, model = deep()

    def run(budget: int) -> str:
        found = []
        with model.trace(mode="fast", budget=budget) as tracer:
            for unit in range(6):
                with tracer.invoke(x()):
                    model.layers[2].output[:, unit] = 0
                    found.append(model.output.save())
        for unit, out in enumerate(found):
            with edited(net.layers[2], "output", zero((slice(None), unit))):
                assert_close(out, net(x()), **CLOSE)
        return str(tracer.explain())

    assert "6 invokes by batch, in at most 6 chunks of 1 B" in run(1)
    assert "6 invokes by batch, in at most 1 chunks of 1 MB" in run(2**20)


def test_only_what_is_read() -> None:
    model = fxsight.Model(small.gpt2(n_embd=64), cache=False)
    with model.trace(mode="exact") as tracer:
        for number in range(2):
            with tracer.invoke(tokens(1)):
                model.transformer.h[1].attn.c_proj.input[head(number)] = 0
                model.lm_head.output[:, -1].save()
    assert "only rows that are read: 1 programs" in tracer.explain()


def test_each_invoke_has_its_program() -> None:
    _, model = deep()
    with model.trace(mode="exact") as tracer:
        invokers = []
        for row in range(2):
            with tracer.invoke(x()) as invoker:
                model.layers[1].output[row] = 0
                out = model.output.save()
            invokers.append(invoker)
            with pytest.raises(fxsight.TraceError, match="the program is finished when the block ends"):
                _ = invoker.program
    bitwise(invokers[1].program(x())[0], out)
    with pytest.raises(fxsight.TraceError, match="each invoke has a program of its own"):
        _ = tracer.program


def test_what_is_said_in_an_invoke() -> None:
    """A cache, a condition, the result, a place by address, the edits of the model."""
    net, model = deep()
    with model.edit(x()) as edited_model:
        model.layers[0].output[:] *= 2
    with edited_model.trace(mode="exact") as tracer:
        for scale in (1.0, 3.0):
            with tracer.invoke(x()):
                kept = tracer.cache(edited_model.layers[1])
                with tracer.cond(scale > 2):
                    tracer.at("layers.2").output[:] *= scale
                out = tracer.result
                tracer.save(out)
    with edited(net.layers[0], "output", lambda h: h.mul_(2)), edited(net.layers[2], "output", lambda h: h.mul_(3)):
        right, (inner,) = oracle.run(net, (x(),), {}, [oracle.Read("layers.1", "output")])
    bitwise(out, right)
    bitwise(kept["model.layers.1"].output, inner)


def test_a_number_and_a_stop() -> None:
    """A number is that of the invoke; ``stop`` ends the block, and what was written before counts."""
    net, model = deep()
    found, number = [], 0.0
    with model.trace(mode="exact") as tracer:
        for row in range(4):
            with tracer.invoke(x()):
                model.layers[1].output[row % 2] = 0
                out = model.output.save()
                found.append(out)
                if row == 1:
                    number = out.sum().item()
                if row == 2:
                    tracer.stop()
    assert len(found) == 3 and all(type(out) is Tensor for out in found)
    with edited(net.layers[1], "output", zero(1)):
        bitwise(found[1], net(x()))
        assert number == net(x()).sum().item()
    with edited(net.layers[1], "output", zero(0)):
        bitwise(found[2], net(x()))


# -- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_in_an_invoke_and_to_a_tensor_of_the_user() -> None:
    """Weights that require gradients give no graph; a ``backward`` in an invoke and a tensor of the user's do."""
    net = Deep().eval()
    model = fxsight.Model(net, cache=False)
    vector = torch.ones(6, requires_grad=True)
    with model.trace(mode="exact") as tracer:
        plain = []
        for row in range(2):
            with tracer.invoke(x()):
                model.layers[2].output[row] = 0
                plain.append(model.output.save())
        with tracer.invoke(x()):
            model.layers[1].output[:] += vector
            steered = model.output.sum().save()
        with tracer.invoke(x()):
            hidden = model.layers[1].output
            model.output.sum().backward()
            gradient = hidden.grad.save()
    shown = tracer.explain()
    assert "one program for 2 invokes" in shown and "1 alone: gradients are enabled and a tensor of yours" in shown
    assert not any(out.requires_grad for out in plain)
    steered.backward()
    kept: list[Tensor] = []
    own = vector.detach().clone().requires_grad_()
    with edited(net.layers[1], "output", lambda h: h.add_(own)):
        net(x()).sum().backward()
    assert vector.grad is not None and own.grad is not None
    bitwise(vector.grad, own.grad)

    def keep(_m: nn.Module, _a: Any, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    handle = net.layers[1].register_forward_hook(keep)
    net(x()).sum().backward()
    handle.remove()
    assert kept[0].grad is not None
    bitwise(gradient, kept[0].grad)


def test_a_number_has_no_graph_either() -> None:
    """Part of a value that several share may be changed in place, which torch allows without a graph alone."""
    net = Deep().eval()
    model = fxsight.Model(net, cache=False)
    with model.trace(mode="exact") as tracer, tracer.invoke(x()):
        halves = model.layers[1].output.chunk(2, -1)
        halves[0].add_(halves[1])
        positive = bool(model.layers[2].output.sum() > 0)
        hidden = model.layers[2].output.save()
        out = model.output.save()

    def change(h: Tensor) -> None:
        h[:, :3] += h[:, 3:]

    with torch.no_grad(), edited(net.layers[1], "output", change):
        right, (inner,) = oracle.run(net, (x(),), {}, [oracle.Read("layers.2", "output")])
    assert positive is bool(inner.sum() > 0) and not out.requires_grad and not hidden.requires_grad
    bitwise(out, right)
    bitwise(hidden, inner)


# -- errors ----------------------------------------------------------------------------------------------------------


def refused(message: str) -> Any:
    return pytest.raises(fxsight.TraceError, match=message)


def test_what_is_refused() -> None:
    _, model = deep()
    with refused("no mode 'quick'; one of exact, fast"):
        model.trace(mode="quick")
    with refused("budget=0: a number of bytes"):
        model.trace(mode="fast", budget=0)
    with refused("mode='fast' runs op by op: leave backend=\"inductor\" out"):
        model.trace(mode="fast", backend="inductor")
    with refused("mode='exact' is for a trace of invokes: write `with model.trace"):
        model.trace(x(), mode="exact")
    with refused("trace\\(\\) needs an input, or at least one"), model.trace(mode="exact"):
        pass
    with model.session(), refused("inside a session: its traces share what they have in common"):
        model.trace(mode="exact").__enter__()
    with model.trace(x()), refused("inside a trace: end that block first"):
        model.trace(mode="exact").__enter__()
    tracer = model.trace(mode="exact")
    with refused("an invoke outside its trace"), tracer.invoke(x()):
        pass
    with tracer, tracer.invoke(x()):
        with refused("an invoke inside an invoke: end the first block"), tracer.invoke(x()):
            pass
        model.output.save()


def test_what_needs_the_whole_batch_is_refused() -> None:
    _, model = deep()
    with model.trace(mode="exact") as tracer:
        with tracer.invoke(x()):
            model.output.save()
        with refused("an invoke without input sees the whole batch, and with mode='exact' there is none: save in each"):
            tracer.invoke()
        with refused("each invoke is a trace of its own: say this inside"):
            tracer.cache()
        with refused("layers.0:output has a value only inside a trace"):
            _ = model.layers[0].output
        with refused("the inputs of an invoke are there when its block has begun"):
            _ = tracer.invoke(x()).inputs


def test_an_error_of_the_user_abandons_the_block() -> None:
    net, model = deep()
    with pytest.raises(ZeroDivisionError), Count() as executed, model.trace(mode="exact") as tracer:
        with tracer.invoke(x()):
            out = model.output.save()
        with tracer.invoke(x()):
            raise ZeroDivisionError
    assert not executed.linears
    with pytest.raises(fxsight.NotSavedError):
        out.sum()
    with model.trace(x()):
        again = model.output.save()
    bitwise(again, net(x()))


class Pooled(nn.Module):
    """Has an argument ``mode`` of its own."""

    def forward(self, x: Tensor, mode: str = "sum") -> Tensor:
        return x.sum(-1) if mode == "sum" else x.amax(-1)


def test_a_model_with_an_argument_of_that_name() -> None:
    model = fxsight.Model(Pooled(), cache=False)
    with model.trace(x(), mode="max"):
        out = model.output.save()
    bitwise(out, x().amax(-1))
    with model.trace(mode="exact") as tracer, tracer.invoke(x(), mode="max"):
        out = model.output.save()
    bitwise(out, x().amax(-1))
