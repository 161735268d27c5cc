"""The programs of nnsight's documents, as a user of ours writes them: a single forward, on a tiny net and on GPT-2."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel

import fxsight
from tests.oracle import Edit, Read, run

HIDDEN = 10
DEMO = Path(__file__).parent.parent / "docs" / "demo" / "model"
PROMPT = "The Eiffel Tower is in the city of"


@cache
def _net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict([("layer1", nn.Linear(5, HIDDEN)), ("layer2", nn.Linear(HIDDEN, 2))])
    return nn.Sequential(layers).requires_grad_(False)  # type: ignore[arg-type]


@cache
def _tiny() -> fxsight.Model:
    return fxsight.Model(_net(), cache=False)


@cache
def _gpt2() -> fxsight.Model:
    return fxsight.Model(GPT2LMHeadModel.from_pretrained(DEMO).eval().requires_grad_(False), cache=False)


@cache
def _prompt() -> dict[str, Tensor]:
    return dict(AutoTokenizer.from_pretrained(DEMO)(PROMPT, return_tensors="pt"))


def _input() -> Tensor:
    return torch.rand((1, 5), generator=torch.Generator().manual_seed(1))


def _layer1() -> Tensor:
    found: Tensor = _net()[0](_input())
    return found


# ----------------------------------------------------------------------------------------------- 001, tiny net


def test_t1_an_empty_trace() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()) as tracer:
        pass
    assert tracer.program(_input()) == ()


def test_t2_an_unsaved_output() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        output = tiny_model.output
    with pytest.raises(ValueError, match=r"^Accessing value before it's been set\."):
        print(output.value)


def test_t3_a_saved_output() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        output = tiny_model.output.save()
    assert torch.equal(output, _net()(_input()))
    assert torch.equal(output.value, _net()(_input()))


def test_t4_an_input() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        l2_input = tiny_model.layer2.input.save()
    assert torch.equal(l2_input, _layer1())


def test_t6_functions() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        l1_output = tiny_model.layer1.output
        l1_amax = torch.argmax(l1_output, dim=1).save()  # type: ignore[attr-defined]
    assert l1_amax[0] == _layer1().argmax()


def test_t7_operators() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        value = (tiny_model.layer1.output.sum() + tiny_model.layer2.output.sum()).save()
    assert torch.equal(value, _layer1().sum() + _net()(_input()).sum())


def test_t8_a_function_with_item() -> None:
    def tensor_sum(tensor: Any) -> Tensor:
        total = 0.0
        for element in tensor.flatten():
            total += element.item()
        return torch.tensor(total)

    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        custom_sum = tensor_sum(tiny_model.layer1.output)
        total = tiny_model.layer1.output.sum()
        total.save()
    assert torch.allclose(custom_sum, total)


def test_t9_before_and_after() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        l1_output_before = tiny_model.layer1.output.clone().save()
        tiny_model.layer1.output[:, 0] = 0
        l1_output_after = tiny_model.layer1.output.save()
    expected = _layer1()
    assert torch.equal(l1_output_before, expected)
    expected[:, 0] = 0
    assert torch.equal(l1_output_after, expected)


def test_t9_the_last_dimension() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        l1_output_before = tiny_model.layer1.output.save()
        tiny_model.layer1.output[:, HIDDEN - 1] = 0
        l1_output_after = tiny_model.layer1.output.save()
    assert l1_output_before[0, -1] != 0 and l1_output_after[0, -1] == 0
    assert torch.equal(l1_output_before[:, :-1], l1_output_after[:, :-1])


def test_t10_an_index_error() -> None:
    tiny_model = _tiny()
    with pytest.raises(IndexError) as caught, tiny_model.trace(_input()):
        tiny_model.layer1.output.clone().save()
        tiny_model.layer1.output[:, HIDDEN] = 0
    assert str(caught.value) == "index 10 is out of bounds for dimension 1 with size 10"
    assert [line.strip() for line in caught.traceback[0].statement.lines] == ["tiny_model.layer1.output[:, HIDDEN] = 0"]


def test_t12_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        print(f"{tiny_model.layer1.output.shape}")
    assert capsys.readouterr().out == "torch.Size([1, 10])\n"


def test_t13_noise() -> None:
    tiny_model = _tiny()
    with tiny_model.trace(_input()):
        l1_output_before = tiny_model.layer1.output.clone().save()
        torch.manual_seed(0)
        noise = (0.001**0.5) * torch.randn(l1_output_before.shape)
        tiny_model.layer1.output = l1_output_before + noise
        l1_output_after = tiny_model.layer1.output.save()
    assert torch.equal(l1_output_before, _layer1())
    assert torch.equal(l1_output_after, _layer1() + noise)


# ---------------------------------------------------------------------------------------------- 004, the forum


def _check_mlps(out: Tensor, edits: list[Edit]) -> None:
    expected, _ = run(_gpt2()._module, (), _prompt(), edits)
    assert torch.equal(out, expected.logits)


def _fancy_op(cache: list[Any] | tuple[Any, ...]) -> Any:
    """Something of all that has been collected so far."""
    return sum(0.1 * (n + 1) * value for n, value in enumerate(cache))


def test_f1_a_later_output_from_an_earlier_one() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(**_prompt()):
        gpt2.transformer.h[3].mlp.output = gpt2.transformer.h[1].mlp.output
        out = gpt2.output.logits.save()
    _, (earlier,) = run(gpt2._module, (), _prompt(), [Read("transformer.h.1.mlp", "output")])
    _check_mlps(out, [Edit("transformer.h.3.mlp", "output", "assign", lambda _: earlier)])


def test_f2_an_earlier_output_from_a_later_one() -> None:
    gpt2 = _gpt2()
    with pytest.raises(fxsight.CausalityError) as caught, gpt2.trace(**_prompt()):
        gpt2.transformer.h[1].mlp.output = gpt2.transformer.h[3].mlp.output
    line = caught.traceback[0].lineno + 1
    assert str(caught.value) == (
        f"{__file__}:{line}: what is written to transformer.h.1.mlp:output depends on what lies downstream of it:\n"
        "  transformer.h.1.mlp:output -> transformer.h.3.mlp:output -> transformer.h.1.mlp:output\n"
        "  read it in a first trace and write it in a second: with model.session(): with model.trace(x): v = ...save()"
    )


def test_f3_patches_from_the_whole_stack() -> None:
    gpt2 = _gpt2()
    with pytest.raises(fxsight.CausalityError) as caught, gpt2.trace(**_prompt()):
        mlp_ins = torch.stack([block.ln_2.input for block in gpt2.transformer.h])
        mlp_outs = mlp_ins - mlp_ins.mean(0)
        for number, block in enumerate(gpt2.transformer.h):
            block.mlp.output = mlp_outs[number]
    assert (
        "  transformer.h.0.mlp:output -> transformer.h.1.ln_2:input -> transformer.h.2.ln_2:input -> "
        "transformer.h.3.ln_2:input -> transformer.h.0.mlp:output\n"
    ) in str(caught.value)


def _in_order(with_own: bool) -> Tensor:
    """What F4 and F5 mean, by hand: each layer's MLP gives something of the inputs collected before (and here)."""
    cache_: list[Tensor] = []
    handles = []
    for block in _gpt2()._module.transformer.h:
        handles.append(block.ln_2.register_forward_pre_hook(lambda module, args: cache_.append(args[0].clone())))

        def patch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            value = _fancy_op(cache_ if with_own else cache_[:-1])
            return value if isinstance(value, Tensor) else torch.full_like(output, value)

        handles.append(block.mlp.register_forward_hook(patch))
    logits: Tensor = _gpt2()._module(**_prompt()).logits
    for handle in handles:
        handle.remove()
    return logits


def test_f4_patches_that_depend_on_each_other() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(**_prompt()):
        collected: list[Any] = []
        for block in gpt2.transformer.h:
            collected.append(block.ln_2.input)
            block.mlp.output = _fancy_op(collected)
        out = gpt2.output.logits.save()
    assert torch.equal(out, _in_order(with_own=True))


def test_f5_the_same_in_two_loops() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(**_prompt()):
        collected: Any = []
        for layer in range(4):
            collected.append(gpt2.transformer.h[layer].ln_2.input)
        collected = torch.stack(collected).unbind(0)
        for layer in range(4):
            gpt2.transformer.h[layer].mlp.output = _fancy_op(collected[:layer])
        out = gpt2.output.logits.save()
    assert torch.equal(out, _in_order(with_own=False))


def test_f7_all_mlps_skipped() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(**_prompt()) as tracer:
        for block in gpt2.transformer.h:
            block.mlp.output = block.ln_2.input
        out = gpt2.output.logits.save()
    handles = []
    for block in gpt2._module.transformer.h:
        seen: dict[str, Tensor] = {}
        handles.append(block.ln_2.register_forward_pre_hook(lambda m, args, s=seen: s.update(x=args[0])))
        handles.append(block.mlp.register_forward_hook(lambda m, args, output, s=seen: s["x"]))
    expected = gpt2._module(**_prompt()).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(out, expected)
    calls = [n for n in tracer.program.program.nodes.values() if n.op == "call_function"]
    assert not any("mlp" in argument.name for node in calls for argument in node.all_input_nodes)


# ----------------------------------------------------------------------------------------- 001 and 003, GPT-2


def test_g2_ablation_changes_the_answer() -> None:
    gpt2, tokenizer = _gpt2(), AutoTokenizer.from_pretrained(DEMO)
    answers = []
    for ablate in (False, True):
        with warnings.catch_warnings(), gpt2.trace(**_prompt()):
            warnings.simplefilter("ignore")
            if ablate:
                gpt2.transformer.h[-1].mlp.output[:] = 0
            token_ids = gpt2.lm_head.output.argmax(dim=-1).save()
        answers.append(tokenizer.decode(token_ids[0, -1]))
    assert answers[0] == " Paris" and answers[1] != " Paris"


def test_g8_hidden_states() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(**_prompt()):
        hidden_states = gpt2.transformer.h[-1].output[0].save()
    _, (expected,) = run(gpt2._module, (), _prompt(), [Read("transformer.h.3", "output")])
    assert torch.equal(hidden_states, expected[0])


# --------------------------------------------------------------------------------------------------- 000, source


def test_s1_the_source_is_shown_with_its_operations() -> None:
    text = str(_gpt2().transformer.h[0].attn.source)
    for name in ("attention_interface_0", "split_1", "self_c_proj_0", "self_resid_dropout_0"):
        assert name in text


def test_s2_an_operation_is_read() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(**_prompt()) as tracer:
        attention = tracer.at("transformer.h.0.attn/attention_interface_0").output.save()
        again = gpt2.transformer.h[0].attn.source.attention_interface_0.output[0].save()
    length = _prompt()["input_ids"].shape[1]
    assert isinstance(attention, tuple) and attention[0].shape == (1, length, 4, 16) and attention[1] is None
    assert torch.equal(attention[0], again)


def test_s3_an_operation_is_set() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(**_prompt()) as tracer:
        attention_0 = tracer.at("transformer.h.0.attn/attention_interface_0").output.save()
        tracer.at("transformer.h.3.attn/attention_interface_0").output = attention_0
        projected = gpt2.transformer.h[3].attn.c_proj.input.save()
        out = gpt2.output.logits.save()
    assert torch.equal(projected, attention_0[0].flatten(2))
    _check_mlps(out, [Edit("transformer.h.3.attn.c_proj", "input", "assign", lambda _: attention_0[0].flatten(2))])


def test_s4_the_source_of_an_operation() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(**_prompt()):
        text = str(gpt2.transformer.h[0].attn.source.attention_interface_0.source)
    assert "torch_nn_functional_scaled_dot_product_attention_0" in text
