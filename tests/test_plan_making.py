"""What the making of a plan does once for all that is alike: counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxsight
from fxsight import captures, staged
from fxsight.stage import Stage
from tests import small

LAYERS = 3


def ids(seed: int) -> Tensor:
    return torch.randint(0, 97, (2, 5), generator=torch.Generator().manual_seed(seed))


def made() -> Any:
    return fxsight.Model(small.gpt2(n_layer=LAYERS), cache=False)


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first arguments of the calls of a function, from now on."""
    found: list[Any] = []
    plain: Callable[..., Any] = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        found.append(args[0] if args else None)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return found


def test_an_attention_is_opened_once_for_all_cells_and_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    opened = counted(monkeypatch, captures, "open_place")

    def inside(layer: int) -> Any:
        call = model.transformer.h[layer].attn.ops.attention_interface_0
        return call.ops.torch_nn_functional_scaled_dot_product_attention_0.ops

    def patterns(layer: int, head: int) -> Any:
        inside(layer).softmax_0.output[:, head] = 0.25
        return model.lm_head.output[:, -1]

    def scores(layer: int, head: int) -> Any:
        inside(layer).torch_matmul_0.output[:, head] = 0.5
        return model.lm_head.output[:, -1]

    grid = model.sweep(patterns, ids(0), layer=range(LAYERS), head=range(2))
    assert len(opened) == LAYERS
    others = model.sweep(scores, ids(0), layer=range(LAYERS), head=range(2))
    assert len(opened) == LAYERS
    for body, values in ((patterns, grid.values), (scores, others.values)):
        with model.trace(ids(0)):
            alone = body(1, 1).save()
        assert torch.equal(values[1, 1], alone)


def scale_at(model: Any) -> Callable[..., Any]:
    def scale(layer: int, position: int) -> Any:
        model.transformer.h[layer].input[:, position] *= 2.0
        return model.lm_head.output[:, -1]

    return scale


def test_blocks_that_are_alike_are_written_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    written = counted(monkeypatch, staged, "straight")
    plan = model.plan(scale_at(model), ids(0), layer=range(LAYERS), position=range(2))
    parts = [part for group in plan.groups for part in group.parts]
    stages = {n.target for p in parts for n in p.program.graph.nodes if isinstance(n.target, Stage)}
    blocks = [stage for stage in stages if stage.title.startswith("transformer.h.")]
    codes = [stage.run.__code__ for stage in blocks]
    assert len(blocks) > 1 and len(set(codes)) == 1
    assert [code.co_filename for code in codes] == [f"<{stage.title}>" for stage in blocks]
    assert len(written) <= 4, "what is before the blocks, a block, what is after them"


def test_a_stage_has_no_graph_before_it_is_asked_for() -> None:
    model = made()
    plan = model.plan(scale_at(model), ids(0), layer=range(LAYERS), position=range(2))
    parts = [part for group in plan.groups for part in group.parts]
    stages = {n.target for p in parts for n in p.program.graph.nodes if isinstance(n.target, Stage)}
    assert sum("graph" in vars(stage) for stage in stages) <= 2
    for stage in stages:
        assert [n.name for n in stage.graph.nodes if n.op == "output"] == ["output"]
        assert stage.graph is stage.graph


@pytest.mark.parametrize("order", [range(LAYERS), range(LAYERS - 1, -1, -1)])
def test_fast_programs_open_what_an_edit_reaches_and_share_the_rest(order: Any) -> None:
    model = made()
    body = scale_at(model)
    fast = model.sweep(body, ids(0), mode="fast", layer=order, position=range(5))
    exact = model.sweep(body, ids(0), layer=order, position=range(5))
    assert torch.allclose(fast.values, exact.values, rtol=1e-4, atol=1e-4)
    assert len(fast.plan.together) == LAYERS and all(t.stride.partial for _, t in fast.plan.together)
    for group, together in fast.plan.together:
        stages = [n for n in group.program.graph.nodes if isinstance(n.target, Stage)]
        steps = (*together.stride.early, *together.stride.late)
        assert not any(isinstance(step.node.target, Stage) for step in steps)
        assert len(stages) >= list(order)[fast.plan.together.index((group, together))]
    once = fast.plan.shared.flops / exact.plan.naive.flops * LAYERS * 5
    assert once < (1.05 if order[0] == 0 else 2.05), "the run without edits, once; twice where stages came first"


def test_a_value_that_replaces_what_a_stage_gives() -> None:
    model = made()
    new = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))

    def replace(layer: int, row: int) -> Any:
        hidden = model.transformer.h[layer].input
        kept = (torch.arange(5) == row)[:, None]
        model.transformer.h[layer].input = torch.where(kept, new, hidden)
        return model.lm_head.output[:, -1]

    fast = model.sweep(replace, ids(0), mode="fast", layer=range(LAYERS), row=range(5))
    exact = model.sweep(replace, ids(0), layer=range(LAYERS), row=range(5))
    assert torch.allclose(fast.values, exact.values, rtol=1e-4, atol=1e-4)
    assert all(t.stride.partial for _, t in fast.plan.together)
