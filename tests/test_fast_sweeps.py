"""A fast sweep gives, within the tolerance, what an exact one gives, whatever is edited and read."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxsight
from tests import small

LENGTH, WIDTH, LAYERS, WORDS = 6, 16, 3, 31
SIZES = {"vocab_size": WORDS, "num_hidden_layers": LAYERS}


def ids(seed: int, length: int = LENGTH) -> Tensor:
    return torch.randint(0, WORDS, (2, length), generator=torch.Generator().manual_seed(seed))


@cache
def gpt2(attention: str = "sdpa") -> Any:
    net = small.gpt2(vocab_size=WORDS, n_positions=128, n_layer=LAYERS, attn_implementation=attention)
    return fxsight.Model(net, cache=False)


@cache
def llama() -> Any:
    return fxsight.Model(small.llama(**SIZES, num_attention_heads=4), cache=False)


@cache
def mistral() -> Any:
    return fxsight.Model(small.mistral(**SIZES, num_attention_heads=4), cache=False)


@cache
def bert() -> Any:
    return fxsight.Model(small.bert(**SIZES), cache=False)


def blocks(model: Any) -> Any:
    if model is gpt2() or model is gpt2("eager"):
        return model.transformer.h
    return model.encoder.layer if model is bert() else model.model.layers


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gpt2 eager": lambda: gpt2("eager"),
    "llama": llama,
    "mistral": mistral,
    "bert": bert,
}


def compare(model: Any, body: Any, *args: Any, **axes: Any) -> Any:
    """The fast plan; its grid is that of the exact one within the tolerance."""
    exact = model.sweep(body, *args, **axes)
    plan = model.plan(body, *args, mode="fast", **axes)
    found = plan.run()
    assert found.mode == "fast" and found.done.all()
    for mine, theirs in zip(found.leaves, exact.leaves, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    return plan


def last(model: Any) -> Any:
    """What is read: of the last position."""
    if model is bert():
        return model.output.last_hidden_state[:, -1]
    return model.lm_head.output[:, -1, 3] - model.lm_head.output[:, -1, 7]


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_patching_by_position(name: str) -> None:
    model, x = MODELS[name](), ids(2)
    with model.trace(ids(1)):
        clean = [block.input.save() for block in blocks(model)]

    def patch(layer: int, position: int) -> Any:
        blocks(model)[layer].input[:, position] = clean[layer][:, position]
        return last(model)

    plan = compare(model, patch, x, layer=range(LAYERS), position=range(LENGTH))
    done = [rows for group in plan.groups if group.together for rows in group.together.done]
    assert len(plan.groups) == LAYERS and all(group.together for group in plan.groups)
    computed, whole = (sum(column) for column in zip(*done, strict=True))
    by_position = name in ("gpt2", "llama", "mistral")  # bert sees what comes later; eager attention goes by prompts
    assert (computed < 0.8 * whole) == by_position


@pytest.mark.parametrize("name", MODELS)
def test_steering_with_vectors(name: str) -> None:
    model, x = MODELS[name](), ids(2)
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))

    def steer(layer: int, vector: Tensor, strength: float) -> Any:
        blocks(model)[layer].output[:] += strength * vector
        return last(model)

    compare(model, steer, x, layer=range(LAYERS), vector=vectors, strength=[0.5, 2.0])


@pytest.mark.parametrize("read", ["last", "all", "slice", "hidden", "mean"])
def test_what_is_read(read: str) -> None:
    model, x = gpt2(), ids(2)

    def ablate(position: int) -> Any:
        model.transformer.h[1].mlp.output[:, position] = 0
        logits = model.lm_head.output
        if read == "hidden":
            return {"early": model.transformer.h[1].output, "late": model.transformer.ln_f.output[:, 2:4].sum(-1)}
        return {"last": logits[:, -1], "all": logits, "slice": logits[:, 1:3, 5], "mean": logits.mean(1)}[read]

    compare(model, ablate, x, position=range(LENGTH))


def test_edits_inside_attention() -> None:
    model, x = gpt2(), ids(2)

    def heads(layer: int, head: int, what: str) -> Any:
        attend = model.transformer.h[layer].attn.source.attention_interface_0
        if what == "z":
            attend.output[0][:, :, head] = 0
        else:
            attend.inputs[0]["qkv".index(what) + 1][:, head] *= 0.5
        return last(model)

    compare(model, heads, x, layer=range(LAYERS), head=range(2), what=["z", "q", "k", "v"])


def test_two_edits_the_later_of_rows() -> None:
    model, x = gpt2(), ids(2)

    def twice(first: int, second: int) -> Any:
        model.transformer.h[0].output[:, first] *= 2
        model.transformer.h[2].output[:, second] *= 2
        return last(model)

    compare(model, twice, x, first=range(3), second=range(3))


def test_a_value_that_is_assigned() -> None:
    model, x = gpt2(), ids(2)
    given = torch.randn(3, 2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))

    def assign(layer: int, value: Tensor) -> Any:
        model.transformer.h[layer].mlp.output = value
        return last(model)

    compare(model, assign, x, layer=range(LAYERS), value=given)


def test_long_cells_attend_one_by_one() -> None:
    model, x = gpt2(), ids(2, 70)

    def ablate(position: int) -> Any:
        model.transformer.h[0].output[:, position] = 0
        return last(model)

    compare(model, ablate, x, position=[0, 33, 68, 69])


def test_a_padded_batch() -> None:
    model, x = gpt2(), ids(2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

    def ablate(layer: int, position: int) -> Any:
        model.transformer.h[layer].output[:, position] = 0
        return last(model)

    compare(model, ablate, x, attention_mask=mask, layer=range(LAYERS), position=range(LENGTH))


def test_models_without_positions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).eval()
    model, x = fxsight.Model(net.requires_grad_(False), cache=False), torch.randn(5, 1, 6, 6)

    def ablate(layer: int, channel: int) -> Any:
        model[layer].output[:, channel] = 0
        return model.output

    plan = compare(model, ablate, x, layer=[0, 1, 2], channel=range(4))
    assert all(group.together for group in plan.groups)


def test_nothing_changes_in_some_cells() -> None:
    """What an edit leaves as it was is not computed again."""
    model, x = gpt2(), ids(2)

    def scale(position: int, factor: float) -> Any:
        model.transformer.h[0].output[:, position] *= factor
        return model.lm_head.output

    plan = compare(model, scale, x, position=range(LENGTH), factor=[1.0, 2.0])
    ((rows, _),) = plan.groups[0].together.done
    assert rows == sum(range(1, LENGTH + 1)) + LENGTH  # a suffix for each that changes; one row for each that does not


def test_in_place_operators_of_the_model_are_done_exactly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)).eval().requires_grad_(False)
    model, x = fxsight.Model(net, cache=False), torch.randn(3, 4)

    def scale(factor: float) -> Any:
        model[0].output[:] *= factor
        return model.output

    plan = compare(model, scale, x, factor=[0.5, 2.0])
    assert plan.groups[0].together is None


# -- anything --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_sweeps(seed: int) -> None:
    """Places, indices, vectors, strengths and readings drawn at random; exact and fast against each other."""
    draw = random.Random(seed)
    model, x = MODELS[draw.choice(list(MODELS))](), ids(seed)
    layers = draw.sample(range(LAYERS), 2)
    inner = draw.choice(["input", "output"])
    index = draw.choice([(slice(None),), (slice(None), slice(1, 3)), (slice(None), [0, 2]), (0,), (..., slice(3, 9))])
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
    how = draw.choice(["add", "set", "mean"])
    read = draw.choice(["last", "all", "block"])

    def body(layer: int, vector: Tensor, position: int, strength: float) -> Any:
        value = getattr(blocks(model)[layer], inner)
        if how == "add":
            value[:, position] += strength * vector
        elif how == "set":
            value[:, position:] = 0
        else:
            value[:, position] = value.mean(1) * strength
        if draw_second:
            blocks(model)[LAYERS - 1].output[index] *= 0.5
        if read == "block":
            return blocks(model)[LAYERS - 1].output
        return last(model) if read == "last" else model.output[0]

    draw_second = draw.random() < 0.5
    axes = {"layer": layers, "vector": vectors, "position": draw.sample(range(LENGTH), 3), "strength": [0.0, 1.5]}
    compare(model, body, x, **axes)


# -- the plan --------------------------------------------------------------------------------------------------------


def ablation(position: int) -> Any:
    gpt2().transformer.h[0].output[:, position] = 0
    return last(gpt2())


def test_chunks_fit_the_budget() -> None:
    plan = gpt2().plan(ablation, ids(2), mode="fast", budget=1, position=range(LENGTH))
    assert f"{LENGTH} cells by length, in at most {LENGTH} chunks of 1 B" in plan.explain()
    grid = plan.run()
    assert len(plan.groups[0].together.done) == LENGTH
    assert_close(grid.values, gpt2().sweep(ablation, ids(2), position=range(LENGTH)).values, rtol=1e-4, atol=1e-5)
    assert f"computed       {sum(range(1, LENGTH + 1))} of {LENGTH**2} rows" in plan.explain()


@pytest.mark.parametrize("budget", [0, -1, 2.5, "1 GB"])
def test_a_budget_is_a_number_of_bytes(budget: Any) -> None:
    with pytest.raises(fxsight.TraceError, match=r"budget=.*: a number of bytes, for example budget=256 \* 2\*\*20"):
        gpt2().sweep(ablation, ids(2), mode="fast", budget=budget, position=range(LENGTH))


def test_interrupted_it_returns_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gpt2().plan(ablation, ids(2), mode="fast", budget=1, position=range(LENGTH))
    keep, seen = plan._keep, list[int]()

    def interrupted(grid: Any, number: int, results: Any) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(number)
        keep(grid, number, results)

    monkeypatch.setattr(plan, "_keep", interrupted)
    with pytest.warns(fxsight.SweepWarning, match="2 of 6 cells were done"):
        grid = plan.run()
    assert grid.done.tolist() == [True, True, False, False, False, False]
    assert grid.values[2:].isnan().all() and grid.mode == "fast"
