"""Cells whose programs have stages: the numbers of hooks, wherever they read and write."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import fxsight
from fxsight.stage import Stage, operators
from tests import small

LAYERS = 4


@cache
def gpt2() -> Any:
    return small.gpt2(n_layer=LAYERS)


@cache
def model() -> Any:
    return fxsight.Model(gpt2(), cache=False)


def ids(seed: int) -> Tensor:
    return torch.randint(0, 97, (2, 5), generator=torch.Generator().manual_seed(seed))


def with_hook(module: nn.Module, port: str, change: Callable[[Tensor], Any], read: Any, x: Tensor) -> Any:
    """What ``read`` gives of the logits when a copy of a module's input or output is changed."""

    def changed(value: Any) -> Any:
        own = (value[0] if isinstance(value, tuple) else value).clone()
        change(own)
        return (own, *value[1:]) if isinstance(value, tuple) else own

    handle = (
        module.register_forward_pre_hook(lambda _m, args: changed(args))
        if port == "input"
        else module.register_forward_hook(lambda _m, _a, out: changed(out))
    )
    try:
        return read(gpt2()(x).logits)
    finally:
        handle.remove()


PLACES = ["", "ln_1", "attn", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.act"]
READS: dict[str, Callable[[Any], Any]] = {"last": lambda logits: logits[:, -1, 3], "all": lambda logits: logits}


@pytest.mark.parametrize("port", ["input", "output"])
@pytest.mark.parametrize("read", READS)
def test_each_place_of_a_block_in_one_sweep(port: str, read: str) -> None:
    """Every place is one where stages are cut, for all cells."""

    def change(value: Any) -> None:
        value[:, 2] *= 1.5

    def body(place: str, layer: int) -> Any:
        block = model().get(f"transformer.h.{layer}{place and '.'}{place}")
        value = getattr(block, port)
        own = (value[0] if isinstance(value, tuple) else value).clone()
        change(own)
        setattr(block, port, (own, *value[1:]) if isinstance(value, tuple) else own)
        return READS[read](model().lm_head.output)

    grid = model().sweep(body, ids(2), place=PLACES, layer=range(LAYERS))
    for number, place in enumerate(PLACES):
        for layer in range(LAYERS):
            module = gpt2().get_submodule(f"transformer.h.{layer}{place and '.'}{place}")
            assert torch.equal(grid.values[number, layer], with_hook(module, port, change, READS[read], ids(2)))


@pytest.mark.parametrize("place", [".attn.c_proj.input", ".ln_1.input", ".ln_2.input", ".mlp.output", ".output"])
def test_changes_in_place_reach_all_who_share_the_memory(place: str) -> None:
    """Cells that are each compared with their own trace."""

    def body(layer: int, position: int) -> Any:
        path, _, port = f"transformer.h.{layer}{place}".rpartition(".")
        getattr(model().get(path), port)[:, position] *= 1.5
        return {"hidden": model().transformer.h[2].output, "logits": model().lm_head.output[:, -1]}

    grid = model().sweep(body, ids(2), layer=range(LAYERS), position=range(5))
    for layer in range(LAYERS):
        for position in (0, 3):
            with model().trace(ids(2)):
                found = {name: value.save() for name, value in body(layer, position).items()}
            assert all(torch.equal(grid.values[name][layer, position], found[name]) for name in found)


def test_a_cell_has_few_nodes() -> None:
    def body(layer: int, factor: float) -> Any:
        model().transformer.h[layer].output[:] *= factor
        return model().transformer.ln_f.output

    plan = model().plan(body, ids(2), layer=range(LAYERS), factor=[0.5, 2.0])
    for group in plan.groups:
        assert len(list(group.whole.graph.nodes)) < 20 < len(operators(group.whole.graph))
    ran = [
        n.target for g in plan.groups for p in g.shared for n in p.program.graph.nodes if isinstance(n.target, Stage)
    ]
    assert len(set(ran)) == len(ran), "what is shared runs once"


def test_a_weight_that_is_changed_between_runs_is_seen() -> None:
    def body(layer: int) -> Any:
        model().transformer.h[layer].output[:] *= 2
        return model().lm_head.output

    plan = model().plan(body, ids(2), layer=range(LAYERS))
    before, bias = plan.run().values, gpt2().transformer.h[3].mlp.c_proj.bias
    kept = bias.clone()
    bias.add_(1)
    try:
        after = plan.run().values
        assert not torch.equal(before, after)
        expected = with_hook(gpt2().transformer.h[1], "output", lambda v: v.mul_(2), READS["all"], ids(2))
        assert torch.equal(after[1], expected)
    finally:
        bias.copy_(kept)
    assert torch.equal(plan.run().values, before)


@cache
def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, decoder_start_token_id=0)
    net: nn.Module = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    return fxsight.Model(net, cache=False)


def t5_call(seed: int) -> dict[str, Tensor]:
    return {"input_ids": ids(seed), "decoder_input_ids": ids(seed + 1)}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_an_encoder_and_a_decoder(side: str) -> None:
    """Cells that are each compared with their own trace; what the edit does not reach runs once."""

    def body(layer: int, times: float) -> Any:
        block = t5().get(f"{side}.block.{layer}")
        block.layer[0].output[0][:] *= times
        return t5().lm_head.output[:, -1]

    plan = t5().plan(body, **t5_call(1), layer=range(3), times=[0.5, 2.0])
    grid = plan.run()
    for layer in range(3):
        for number, times in enumerate([0.5, 2.0]):
            with t5().trace(**t5_call(1)):
                found = body(layer, times).save()
            assert torch.equal(grid.values[layer, number], found)
    if side == "decoder":
        keys = "decoder.block.2.layer.1.EncDecAttention.k.weight"
        given = [n.target.weights for g in plan.groups for p in g.own for n in p.program.graph.nodes if _is_stage(n)]
        assert not any(keys in weights for weights in given)


def _is_stage(node: Any) -> bool:
    return isinstance(node.target, Stage)


def test_attention_that_is_opened_in_one_block() -> None:
    def body(layer: int, head: int) -> Any:
        call = model().transformer.h[layer].attn.ops.attention_interface_0
        pattern = call.ops.torch_nn_functional_scaled_dot_product_attention_0.ops.softmax_0
        pattern.output[:, head] = 0
        return model().lm_head.output[:, -1]

    grid = model().sweep(body, ids(2), layer=range(LAYERS), head=range(2))
    for layer in range(LAYERS):
        for head in range(2):
            with model().trace(ids(2)):
                found = body(layer, head).save()
            assert torch.equal(grid.values[layer, head], found)


def test_traces_of_a_session() -> None:
    saved: list[Any] = []
    with torch.no_grad(), model().session():
        for layer in range(LAYERS):
            with model().trace(ids(2)):
                model().transformer.h[layer].mlp.output[:, 1:] = 0
                saved.append(model().lm_head.output.save())
    for layer in range(LAYERS):

        def zero(value: Tensor) -> None:
            value[:, 1:] = 0

        module = gpt2().transformer.h[layer].mlp
        assert torch.equal(saved[layer], with_hook(module, "output", zero, READS["all"], ids(2)))
