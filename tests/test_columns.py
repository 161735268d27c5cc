"""Where logits of a few tokens are read, only these are computed: in sweeps, in sessions, and compiled."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fxsight
from tests import small

WORDS, LENGTH = 160, 6
ANSWERS = torch.tensor([150, 3, 77])


@cache
def net() -> Any:
    return small.gpt2(vocab_size=WORDS, n_positions=16, n_layer=2)


@cache
def model() -> Any:
    return fxsight.Model(net(), cache=False)


def ids() -> Tensor:
    return torch.randint(0, WORDS, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def difference(logits: Any) -> Any:
    """Of two tokens, at the last position."""
    return logits[:, -1, 5] - logits[:, -1, -2]


def of_answers(logits: Any) -> Any:
    """Of a token for each prompt."""
    return logits[torch.arange(3), -1, ANSWERS]


def of_rows(logits: Any) -> Any:
    """Of several tokens, in two steps."""
    last = logits[:, -1]
    return last[:, [7, 9, 7]] * last[:, 3:8:2].sum()


METRICS = [difference, of_answers, of_rows]


def hooked(layer: int, position: int, metric: Any) -> Tensor:
    """The same by a hook."""

    def zero(module: Any, given: Any, output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        changed[:, position] = 0
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = net().transformer.h[layer].register_forward_hook(zero)
    try:
        with torch.no_grad():
            found: Tensor = metric(net()(ids()).logits)
            return found
    finally:
        handle.remove()


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: str(metric.__name__))
def test_sweeps(metric: Any, mode: str) -> None:
    def body(layer: int, position: int) -> Any:
        model().transformer.h[layer].output[:, position] = 0
        return metric(model().lm_head.output)

    plan = model().plan(body, ids(), layer=range(2), position=[0, 4, 5], mode=mode)
    assert "only columns that are read: 2 programs" in plan.explain()
    assert ("tried to give the same bits" in plan.explain()) == (mode == "exact")
    grid = plan.run()
    for layer in range(2):
        for number, position in enumerate([0, 4, 5]):
            expected = hooked(layer, position, metric)
            if mode == "exact":
                assert torch.equal(grid.values[layer, number], expected)
            assert_close(grid.values[layer, number], expected)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: str(metric.__name__))
def test_compiled(metric: Any) -> None:
    with torch.no_grad():
        with model().trace(ids(), backend="inductor") as tracer:
            model().transformer.h[1].output[:, 2] = 0
            found = metric(model().lm_head.output).save()
        assert any("NarrowColumns" in made for made in tracer.program.history)
        assert_close(found, hooked(1, 2, metric), atol=1e-4, rtol=1e-4)


def test_answers_that_vary_from_cell_to_cell() -> None:
    def body(token: int) -> Any:
        return model().lm_head.output[:, -1, token]

    grid = model().sweep(body, ids(), token=[0, 7, WORDS - 1])
    with torch.no_grad():
        logits = net()(ids()).logits
    for number, token in enumerate([0, 7, WORDS - 1]):
        assert torch.equal(grid.values[number], logits[:, -1, token])


def test_a_token_that_is_not_there() -> None:
    def body(layer: int) -> Any:
        model().transformer.h[layer].output[:, 0] = 0
        return model().lm_head.output[torch.arange(3), -1, torch.tensor([1, WORDS, 2])]

    with pytest.raises(IndexError, match="out of bounds"):
        model().sweep(body, ids(), layer=[0, 1])
