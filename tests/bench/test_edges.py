"""Are the scores of all edges what edge attribution patching says they are?"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxsight.attribution import edge_attribution
from tests.bench import edges, models
from tests.bench.eap import Edges
from tests.bench.grid import Task

LAYERS, HEADS = 2, 4


@pytest.fixture(scope="module")
def work() -> Edges:
    net: Any = models.toy()
    return Edges(net, Task.of(net, True))


def _all(work: Edges) -> Tensor:
    """Scores of all pairs, f32[source, target], of the metric without its unit."""
    _, other = work._run(work.task.corrupted, "source")
    loss, clean = work._run(work.task.clean, "source", "stream", "use")
    found: Tensor = edges.scores(work.net, clean, other["source"], torch.autograd.grad(loss, clean["use"]))
    return found.detach()


def _targets(layer: int, part: slice) -> slice:
    first = layer * (3 * HEADS + 1)
    return slice(first + part.start, first + part.stop)


def test_gpt2_small_has_32491_edges() -> None:
    forward = edges.forward(SimpleNamespace(config=SimpleNamespace(n_layer=12, n_head=12)))
    assert forward.shape == (1 + 12 * 13, 12 * 37 + 1)
    assert int(forward.sum()) == 32_491


def test_an_edge_leads_to_what_is_computed_later(work: Edges) -> None:
    forward = edges.forward(work.net)
    assert forward[0].all() and forward[:, -1].all()
    first = _targets(0, slice(0, 3 * HEADS))
    assert forward[:, first].sum(0).eq(1).all()
    assert forward[:, _targets(0, slice(3 * HEADS, 3 * HEADS + 1))].sum() == 1 + HEADS
    assert forward[:, _targets(1, slice(0, 3 * HEADS))].sum(0).eq(2 + HEADS).all()


def test_heads_add_up_to_what_attribution_says_of_layers(work: Edges) -> None:
    blocks = range(LAYERS)
    sources = ["transformer.drop", *(f"transformer.h.{i}.{part}" for i in blocks for part in ("attn", "mlp"))]
    targets = [*(f"transformer.h.{i}.{norm}:input" for i in blocks for norm in ("ln_1", "ln_2"))]
    targets.append("transformer.ln_f:input")

    def metric(model: Any) -> Any:
        return work.task.metric(model.lm_head.output).mean()

    expected = edge_attribution(work.model, work.task.clean, work.task.corrupted, metric, sources, targets)
    scores = _all(work).masked_fill(~edges.forward(work.net), float("nan"))
    rows = torch.stack([row.sum(0) for row in torch.split(scores, [1, *(HEADS, 1) * LAYERS])])
    parts = torch.split(rows, [*(3 * HEADS, 1) * LAYERS, 1], dim=1)
    found = torch.stack([part.sum(1) for part in parts], dim=1)
    torch.testing.assert_close(found, expected.values, equal_nan=True)


@pytest.mark.parametrize("kind", range(3))
def test_a_head_reads_by_its_own_columns(work: Edges, kind: int) -> None:
    """A twin in which all but one head's query, key or value is computed apart from the stream."""
    head, block = 1, work.net.transformer.h[1]
    width = work.net.config.n_embd // HEADS
    columns = slice((kind * HEADS + head) * width, (kind * HEADS + head + 1) * width)
    inputs: list[Tensor] = []

    def own(_module: Any, args: Any) -> Any:
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[0],)

    def alone(_module: Any, _args: Any, output: Tensor) -> Tensor:
        new = output.detach().clone()
        new[..., columns] = output[..., columns]
        return new

    handles = [block.ln_1.register_forward_pre_hook(own), block.attn.c_attn.register_forward_hook(alone)]
    loss = work.task.metric(work.net(work.task.clean).logits).mean()
    for handle in handles:
        handle.remove()
    (gradient,) = torch.autograd.grad(loss, inputs)
    clean, other = (work._run(ids, "source")[1]["source"][0] for ids in (work.task.clean, work.task.corrupted))
    expected = ((other - clean) * gradient).sum()
    found = _all(work)[0, _targets(1, slice(kind * HEADS + head, kind * HEADS + head + 1))]
    torch.testing.assert_close(found, expected.detach()[None], rtol=1e-4, atol=1e-6)


def test_fxsight_gives_the_bits_of_hooks(work: Edges) -> None:
    (found,), (expected,) = work.traced(), work.hooked(False)()
    assert found.shape == (110,)
    assert torch.equal(found, expected)
