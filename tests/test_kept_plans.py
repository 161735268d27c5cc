"""A sweep that is run again with other tensors finds its plan, and has its own numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fxsight
from fxsight.passes.weave import Weave
from tests.test_session_sharing import Deep
from tests.test_sweep import LAYERS, LENGTH, bitwise, block_inputs, edited, gpt2, plus, tokens, zero


def steering(model: Any, factor: float = 1.0) -> Callable[..., Any]:
    """A body of three lines, over layers, positions and strengths."""

    def body(layer: int, position: int, strength: float) -> Any:
        model.transformer.h[layer].output[:, position] += factor * strength
        return model.lm_head.output[:, -1]

    return body


@pytest.fixture
def woven(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Filled with what is woven."""
    found: list[Any] = []
    rewrite = Weave.rewrite

    def counted(self: Weave, editor: Any) -> None:
        found.append(self)
        rewrite(self, editor)

    monkeypatch.setattr(Weave, "rewrite", counted)
    return found


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_same_patching_of_other_prompts(mode: str, woven: list[Any]) -> None:
    model = fxsight.Model(gpt2(), cache=False)
    for seed in (1, 3):
        clean, ids = block_inputs(tokens(seed)), tokens(seed + 1)
        woven.clear()

        def patch(layer: int, position: int, clean: list[Tensor] = clean) -> Any:
            model.transformer.h[layer].input[:, position] = clean[layer][:, position]
            return model.lm_head.output[:, -1]

        grid = model.sweep(patch, ids, mode=mode, layer=range(LAYERS), position=range(LENGTH))
        assert len(woven) == (LAYERS if seed == 1 else 0)
        for layer in range(LAYERS):
            for position in range(LENGTH):

                def change(h: Tensor, layer: int = layer, position: int = position, clean: Any = clean) -> None:
                    h[:, position] = clean[layer][:, position]

                with edited(gpt2().transformer.h[layer], "input", change):
                    expected = gpt2()(ids).logits[:, -1]
                if mode == "exact":
                    bitwise(grid.values[layer, position], expected)
                else:
                    assert_close(grid.values[layer, position], expected, rtol=1e-4, atol=1e-4)
        if mode == "fast":
            assert grid.plan.together[0][1].done
    assert len(grid.to_records()) == LAYERS * LENGTH * 2 * 41


def test_other_numbers_and_other_sizes_are_other_plans(woven: list[Any]) -> None:
    model = fxsight.Model(gpt2(), cache=False)
    axes: dict[str, Any] = {"layer": [0, 2], "position": [1, 3], "strength": [0.5, -0.0]}
    for factor, ids, expected in (
        (1.0, tokens(1), 2),
        (1.0, tokens(2), 0),
        (2.0, tokens(1), 2),
        (1.0, tokens(1)[:1], 2),
    ):
        woven.clear()
        grid = model.sweep(steering(model, factor), ids, **axes)
        assert len(woven) == expected

        def change(h: Tensor, factor: float = factor) -> None:
            h[:, 3] += factor * 0.5

        with edited(gpt2().transformer.h[2], "output", change):
            bitwise(grid.at(layer=2, position=3, strength=0.5).values, gpt2()(ids).logits[:, -1])


def test_one_tensor_in_all_cells_or_one_for_each() -> None:
    """What is shared depends on which tensors are one."""
    model = fxsight.Model(gpt2(), cache=False)
    ids = tokens(1)
    one, other = torch.ones(16), torch.full((16,), 2.0)
    for vectors in ([one, one], [one, other], [other, other]):

        def body(number: int, vectors: list[Tensor] = vectors) -> Any:
            model.transformer.h[1].output[:] += vectors[number]
            return model.lm_head.output

        grid = model.sweep(body, ids, number=[0, 1])
        for number, vector in enumerate(vectors):
            with edited(gpt2().transformer.h[1], "output", plus(vector)):
                bitwise(grid.values[number], gpt2()(ids).logits)


def test_random_numbers_keep_their_order_again() -> None:
    net = Deep().train().requires_grad_(False)
    model, given = fxsight.Model(net, cache=False), torch.ones(2, 6)

    def body(row: int) -> Any:
        model.layers[2].output[row] = 0
        return model.output

    for seed in (1, 2):
        torch.manual_seed(seed)
        grid = model.sweep(body, given, row=[0, 1])
        torch.manual_seed(seed)
        for row in range(2):
            with edited(net.layers[2], "output", zero(row)):
                bitwise(grid.values[row], net(given))
