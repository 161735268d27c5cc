"""A sweep gives, cell by cell and bit by bit, what a forward with hooks gives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fxsight
from fxsight.asked import asked_in_all
from fxsight.lift import lifted, outline, varying
from fxsight.stage import operators
from tests import small

LENGTH, WIDTH, LAYERS = 5, 16, 3


@cache
def gpt2() -> Any:
    return small.gpt2(vocab_size=41, n_layer=LAYERS)


@cache
def gpt2_model() -> Any:
    return fxsight.Model(gpt2(), cache=False)


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 41, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@contextmanager
def edited(module: nn.Module, port: str, change: Callable[[Tensor], Any]) -> Iterator[None]:
    """A hook that changes a copy of the module's first argument, or its output in place."""

    def before(_module: nn.Module, args: Any) -> Any:
        own = args[0].clone()
        change(own)
        return (own, *args[1:])

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        own = (output[0] if isinstance(output, tuple) else output).clone()
        change(own)
        return (own, *output[1:]) if isinstance(output, tuple) else own

    handle = module.register_forward_pre_hook(before) if port == "input" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def zero(index: Any) -> Callable[[Tensor], Any]:
    """A change: zero there."""

    def change(h: Tensor) -> None:
        h[index] = 0

    return change


def times(index: Any, factor: float) -> Callable[[Tensor], Any]:
    """A change: multiplied there."""

    def change(h: Tensor) -> None:
        h[index] *= factor

    return change


def plus(vector: Tensor) -> Callable[[Tensor], Any]:
    """A change: a vector added."""
    return lambda h: h.add_(vector)


def bitwise(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def block_inputs(ids: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda _m, args: kept.append(args[0].clone())) for b in gpt2().transformer.h]
    gpt2()(ids)
    for handle in handles:
        handle.remove()
    return kept


# -- against hooks ---------------------------------------------------------------------------------------------------


def test_residual_patching_is_that_of_hooks() -> None:
    model, clean, x = gpt2_model(), block_inputs(tokens(1)), tokens(2)

    def patch(layer: int, position: int) -> Any:
        model.transformer.h[layer].input[:, position] = clean[layer][:, position]
        return model.lm_head.output[:, -1, 3] - model.lm_head.output[:, -1, 7]

    grid = model.sweep(patch, x, layer=range(LAYERS), position=range(LENGTH))
    assert grid.values.shape == (LAYERS, LENGTH, 2)
    for layer in range(LAYERS):
        for position in range(LENGTH):

            def change(h: Tensor, layer: int = layer, position: int = position) -> None:
                h[:, position] = clean[layer][:, position]

            with edited(gpt2().transformer.h[layer], "input", change):
                logits = gpt2()(x).logits
            bitwise(grid.values[layer, position], logits[:, -1, 3] - logits[:, -1, 7])


def test_strengths_and_vectors_of_one_layer() -> None:
    model, x = gpt2_model(), tokens(2)
    vectors = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    strengths = [0.0, -0.0, 0.5, 2.0]

    def steer(vector: Tensor, strength: float) -> Any:
        model.transformer.h[1].output[:] += strength * vector
        return {"last": model.lm_head.output[:, -1], "mean": model.transformer.ln_f.output.mean()}

    grid = model.sweep(steer, x, vector=vectors, strength=strengths)
    for v in range(3):
        for s, strength in enumerate(strengths):
            kept: list[Tensor] = []
            handle = gpt2().transformer.ln_f.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
            with edited(gpt2().transformer.h[1], "output", plus(strength * vectors[v])):
                logits = gpt2()(x).logits
            handle.remove()
            bitwise(grid.values["last"][v, s], logits[:, -1])
            bitwise(grid["mean"].values[v, s], kept[0].mean())


def test_two_edits_of_different_axes_share_what_lies_between() -> None:
    model, x = gpt2_model(), tokens(2)

    def ablate(first: int, second: int) -> Any:
        model.transformer.h[0].mlp.output[:, first] = 0
        model.transformer.h[2].mlp.output[:, second] = 0
        return model.transformer.ln_f.output

    plan = model.plan(ablate, x, first=range(LENGTH), second=range(LENGTH))
    assert len(plan.groups) == 1
    assert [(len(p.depends), len(set(plan.groups[0].keys(p)))) for p in plan.groups[0].parts] == [
        (0, 1),
        (1, 5),
        (2, 25),
    ]
    grid = plan.run()
    for first in range(LENGTH):
        for second in range(LENGTH):
            h = gpt2().transformer.h
            with (
                edited(h[0].mlp, "output", zero((slice(None), first))),
                edited(h[2].mlp, "output", zero((slice(None), second))),
            ):
                bitwise(grid.values[first, second], gpt2().transformer(x).last_hidden_state)


def test_the_layers_share_their_common_beginning() -> None:
    model, x = gpt2_model(), tokens(2)

    def skip(layer: int) -> Any:
        model.transformer.h[layer].mlp.output[:] = 0
        return model.lm_head.output

    plan = model.plan(skip, x, layer=range(LAYERS))
    text = plan.explain()
    assert text.startswith(f"{LAYERS} cells: layer {LAYERS}; exact\n  {LAYERS} programs for {LAYERS} cells\n")
    assert plan.own.operators == 0 and plan.cost.operators < plan.naive.operators
    grid = plan.run()
    for layer in range(LAYERS):
        with edited(gpt2().transformer.h[layer].mlp, "output", zero(...)):
            bitwise(grid.values[layer], gpt2()(x).logits)


class InPlace(nn.Module):
    """A forward that changes its own memory, and views of it, behind the edited place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        early = h[:, :3]
        h.relu_()
        early += 1
        g = self.down(h)
        half = g[:, 2:]
        g.mul_(2)
        result: Tensor = g + torch.cat([half, half], 1)
        return result


@pytest.mark.parametrize("port", ["up.output", "down.input", "down.output"])
def test_a_model_that_changes_memory_in_place(port: str) -> None:
    torch.manual_seed(0)
    net, x = InPlace().eval().requires_grad_(False), torch.randn(3, 4)
    model = fxsight.Model(net, cache=False)
    path, _, side = port.partition(".")

    def edit(column: int, factor: float) -> Any:
        value = getattr(getattr(model, path), side)
        value[:, column] *= factor
        return model.output

    grid = model.sweep(edit, x, column=range(4), factor=[0.0, 1.0, 3.0])
    for column in range(4):
        for f, factor in enumerate([0.0, 1.0, 3.0]):
            with model.trace(x):
                value = getattr(getattr(model, path), side)
                value[:, column] *= factor
                expected = model.output.save()
            bitwise(grid.values[column, f], expected)
            if side == "output":
                with edited(getattr(net, path), side, times((slice(None), column), factor)):
                    bitwise(grid.values[column, f], net(x))


def test_random_numbers_are_drawn_cell_by_cell() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    model, x = fxsight.Model(net, cache=False), torch.randn(3, 4)

    def scale(factor: float) -> Any:
        model[0].output[:] *= factor
        return model.output

    plan = model.plan(scale, x, factor=[1.0, 2.0, 3.0])
    assert "3 cells run alone: random numbers are drawn, or the model changes its own buffers" in plan.explain()
    torch.manual_seed(5)
    grid = plan.run()
    torch.manual_seed(5)
    for f, factor in enumerate([1.0, 2.0, 3.0]):
        with edited(net[0], "output", times(..., factor)), torch.no_grad():
            bitwise(grid.values[f], net(x))


def test_a_body_that_asks_for_numbers_runs_alone() -> None:
    model, x = gpt2_model(), tokens(2)

    def clip(layer: int) -> Any:
        hidden = model.transformer.h[layer].output
        if layer == 1 and hidden.abs().max() > 0:
            hidden[:, 0] = 0
        return model.lm_head.output[:, -1]

    plan = model.plan(clip, x, layer=range(LAYERS))
    assert plan.alone == {1: "its body asks for numbers"}
    grid = plan.run()
    bitwise(grid.values[0], gpt2()(x).logits[:, -1])
    with edited(gpt2().transformer.h[1], "output", zero((slice(None), 0))):
        bitwise(grid.values[1], gpt2()(x).logits[:, -1])


def test_a_body_may_branch_on_its_labels_and_save_besides() -> None:
    model, x = gpt2_model(), tokens(2)
    kept: dict[int, Any] = {}

    def body(layer: int, how: str) -> Any:
        if how == "zero":
            model.transformer.h[layer].attn.output[0][:] = 0
        if how == "none":
            kept[layer] = model.transformer.h[layer].output.save()
        return model.lm_head.output

    grid = model.sweep(body, x, layer=range(LAYERS), how=["none", "zero"])
    for layer in range(LAYERS):
        bitwise(grid.at(layer=layer, how="none").values, gpt2()(x).logits)
        with edited(gpt2().transformer.h[layer].attn, "output", zero(...)):
            bitwise(grid.at(layer=layer, how="zero").values, gpt2()(x).logits)
        assert type(kept[layer]) is Tensor
        with model.trace(x):
            expected = model.transformer.h[layer].output.save()
        bitwise(kept[layer], expected)


def test_inside_attention() -> None:
    model, x = gpt2_model(), tokens(2)

    def patterns(layer: int, head: int) -> Any:
        model.transformer.h[layer].attn.source.attention_interface_0.output[0][:, :, head] = 0
        return model.lm_head.output[:, -1]

    grid = model.sweep(patterns, x, layer=range(LAYERS), head=range(2))
    for layer in range(LAYERS):
        for head in range(2):
            own = slice(head * WIDTH // 2, (head + 1) * WIDTH // 2)
            with edited(gpt2().transformer.h[layer].attn.c_proj, "input", zero((..., own))):
                bitwise(grid.values[layer, head], gpt2()(x).logits[:, -1])


def test_what_a_cell_returns_may_be_given() -> None:
    model, x = gpt2_model(), tokens(2)
    vector = torch.arange(3.0)

    def body(layer: int) -> Any:
        _ = model.transformer.h[layer].output
        return {"vector": vector, "layer": layer, "ids": model.transformer.wte.input}

    values = model.sweep(body, x, layer=range(LAYERS)).values
    bitwise(values["vector"], vector.expand(LAYERS, 3))
    bitwise(values["layer"], torch.arange(LAYERS))
    bitwise(values["ids"], x.expand(LAYERS, -1, -1))


# -- the grid --------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@cache
def scale_model() -> Any:
    return fxsight.Model(Scale(), cache=False)


def double(shift: float, times: int) -> Any:
    return scale_model().output.sum() * times + shift


def small_grid() -> Any:
    return scale_model().sweep(double, torch.ones(2), shift={"low": 0.5, "high": 10.0}, times=[1, 2, 3])


def test_labels() -> None:
    grid = small_grid()
    assert grid.axes == {"shift": ("low", "high"), "times": (1, 2, 3)}
    assert grid.values.tolist() == [[4.5, 8.5, 12.5], [14.0, 18.0, 22.0]]
    assert grid.at(shift="high").values.tolist() == [14.0, 18.0, 22.0]
    assert grid.at(shift="high", times=2).values.item() == 18.0
    assert repr(grid) == "<Grid shift 2 × times 3: each [], exact>"
    assert repr(grid.at(times=3)) == "<Grid shift 2: each [], exact>"


def test_records_and_data_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = small_grid()
    assert grid.to_records()[:2] == [
        {"shift": "low", "times": 1, "value": 4.5},
        {"shift": "low", "times": 2, "value": 8.5},
    ]
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: ("frame", rows)))
    assert grid.to_dataframe() == ("frame", grid.to_records())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas; to_records"):
        grid.to_dataframe()


def test_records_of_vectors_and_members() -> None:
    model = scale_model()
    body = lambda k: {"a": model.output * k, "b": model.output + k}  # noqa: E731
    rows = model.sweep(body, torch.tensor([1.0, 2.0]), k=[1, 3]).to_records()
    assert rows[-1] == {"k": 3, "dim_0": 1, "a": 12.0, "b": 7.0}
    both = model.sweep(lambda k: (model.output * k, model.output.sum()), torch.ones(2), k=[1])
    with pytest.raises(fxsight.InputError, match=r"the members have shapes .*: grid\['name'\] is one"):
        both.to_records()
    assert both[1].to_records() == [{"k": 1, "value": 4.0}]


def test_wrong_labels() -> None:
    grid = small_grid()
    with pytest.raises(fxsight.InputError, match=r"no axis 'time'; did you mean 'times'\?"):
        grid.at(time=1)
    with pytest.raises(fxsight.InputError, match="no label 7 on the axis 'times'; it has 1, 2, 3"):
        grid.at(times=7)
    with pytest.raises(fxsight.InputError, match=r"the cells return no 'shift'; they return one tensor"):
        grid["shift"]


# -- errors ----------------------------------------------------------------------------------------------------------


def test_the_cell_that_fails_is_named() -> None:
    model, x = gpt2_model(), tokens(2)

    def body(layer: int, position: int) -> Any:
        model.transformer.h[layer].output[:, position] = 0
        return model.lm_head.output

    with pytest.raises(IndexError) as failed:
        model.sweep(body, x, layer=[0, 1], position=[0, 99])
    assert failed.value.__notes__ == ["in the cell layer=0, position=99 of the sweep"]


@pytest.mark.parametrize(
    ("body", "axes", "message"),
    [
        (lambda k: None, {"k": [1]}, "the body of a sweep returns a value of the trace, .* this one returns None"),
        (lambda k: scale_model().output, {}, r"the body has a parameter 'k': give its axis, sweep\(\.\.\., k=range"),
        (lambda: scale_model().output, {}, "a sweep has at least one axis"),
        (lambda k: scale_model().output, {"k": 3}, r"the axis k=3 is one value: write k=\[3\]"),
        (lambda k: scale_model().output, {"k": "abc"}, r"the axis k='abc' is one value: write k=\['abc'\]"),
        (lambda k: scale_model().output, {"k": []}, "the axis k is empty"),
        (lambda k: scale_model().output[:k], {"k": [1, 2]}, r"k=1 returns f32\[1\], k=2 returns f32\[2\]"),
    ],
)
def test_refusals(body: Any, axes: dict[str, Any], message: str) -> None:
    with pytest.raises(fxsight.TraceError, match=message):
        scale_model().sweep(body, torch.ones(3), **axes)


def test_modes_and_sessions() -> None:
    with pytest.raises(fxsight.TraceError, match="no mode 'quick'; one of exact, fast"):
        scale_model().sweep(double, torch.ones(2), mode="quick", shift=[0.0], times=[1])
    with fxsight.session(), pytest.raises(fxsight.TraceError, match="a sweep inside a session: it runs at once"):
        small_grid()


def test_a_tensor_changed_between_cells_is_refused() -> None:
    model, buffer = scale_model(), torch.zeros(2)

    def body(k: int) -> Any:
        buffer.fill_(k)
        return model.output + buffer

    with pytest.raises(fxsight.InputError, match="was changed in place afterwards") as failed:
        model.sweep(body, torch.ones(2), k=[1, 2])
    assert failed.value.__notes__ == ["in the cell k=1 of the sweep: all cells are written down before any is computed"]


def test_a_tensor_of_the_users_is_not_changed_by_cells() -> None:
    model, total = scale_model(), torch.zeros(2)

    def body(k: int) -> Any:
        total.add_(model.output)
        return model.output

    with pytest.raises(fxsight.TraceError, match="changes a tensor of yours in place; return the value instead"):
        model.sweep(body, torch.ones(2), k=[1, 2])


def test_weights_are_not_changed_by_cells() -> None:
    net = nn.Linear(2, 2).requires_grad_(False)
    model = fxsight.Model(net, cache=False)

    def body(k: int) -> Any:
        net.weight.mul_(k)
        return model.output

    with pytest.raises(fxsight.TraceError, match="the body changes weights of the model"):
        model.sweep(body, torch.ones(1, 2), k=[1, 2])


def test_a_value_stays_in_its_cell() -> None:
    model, kept = scale_model(), list[Any]()

    def body(k: int) -> Any:
        kept.append(model.output)
        return kept[0] + k

    with pytest.raises(fxsight.TraceError, match="a value of the cell k=1 is used outside of it: return it"):
        model.sweep(body, torch.ones(2), k=[1, 2])


def test_numbers_in_a_model_that_draws_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train().requires_grad_(False)
    model = fxsight.Model(net, cache=False)

    def body(k: int) -> Any:
        return model.output * (k if k == 1 else float(model[0].output.sum()))

    with pytest.raises(fxsight.TraceError, match=r"asks for numbers in the cell k=2, .* trace them one by one"):
        model.sweep(body, torch.ones(1, 4), k=[1, 2])


def test_an_interrupted_sweep_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = scale_model().plan(double, torch.ones(2), shift=[0.0, 1.0], times=[1, 2, 3])
    finish, count = type(plan.cells[0]).finish, iter(range(100))

    def interrupt(cell: Any, results: Any) -> Any:
        if next(count) == 4:
            raise KeyboardInterrupt
        return finish(cell, results)

    monkeypatch.setattr(type(plan.cells[0]), "finish", interrupt)
    with pytest.warns(fxsight.SweepWarning, match=r"4 of 6 cells were done when the sweep was interrupted"):
        grid = plan.run()
    assert grid.done.tolist() == [[True, True, True], [True, False, False]]
    assert grid.values.tolist()[0] == [4.0, 8.0, 12.0] and grid.values.isnan().sum() == 2
    assert repr(grid) == "<Grid shift 2 × times 3: each [], exact, 4 of 6 cells done>"
    assert len(grid.to_records()) == 4


# -- numbers that vary -----------------------------------------------------------------------------------------------


def test_numbers_that_vary_become_constants_and_others_stay() -> None:
    model, x = gpt2_model(), tokens(2)
    bodies = []
    for position in (1, 2):
        with model.trace(x) as tracer:
            model.transformer.h[0].output[:, position, 3:5] = 0.5 * position
            model.lm_head.output.save()
        bodies.append(asked_in_all(tracer.recorder, []))
    outlines = [outline(body) for body in bodies]
    assert outlines[0].text == outlines[1].text
    which = varying(outlines)
    assert [outlines[1].numbers[i] for i in which] == [2, 1.0]
    one = lifted(bodies[0], which)
    assert one.key == lifted(bodies[1], which).key and one.key != bodies[0].key
    assert lifted(bodies[0], ()) is bodies[0]
    assert "number_0 = constant 0" in str(one) and "slice(3, 5, None)" in str(one)


# -- only what is read -----------------------------------------------------------------------------------------------


def test_logits_are_computed_where_they_are_read() -> None:
    model, x = gpt2_model(), tokens(2)

    def last(layer: int, position: int) -> Any:
        model.transformer.h[layer].output[:, position] = 0
        return model.lm_head.output[:, -1, 3]

    plan = model.plan(last, x, layer=range(LAYERS), position=range(LENGTH))
    assert all("NarrowReads(rows=" in str(group.program.history) for group in plan.groups)
    assert "only rows that are read: 3 programs" in plan.explain()
    assert "only columns that are read: 3 programs, tried to give the same bits" in plan.explain()
    grid = plan.run()
    for layer in range(LAYERS):
        for position in range(LENGTH):
            with edited(gpt2().transformer.h[layer], "output", zero((slice(None), position))):
                bitwise(grid.values[layer, position], gpt2()(x).logits[:, -1, 3])


def test_what_comes_before_the_edits_runs_once_for_all_layers() -> None:
    """Also in models whose attention makes an empty cache, takes it off the tape in place and appends to it."""
    model, x = gpt2_model(), tokens(2)

    def scale(layer: int, factor: float) -> Any:
        model.transformer.h[layer].output[:] *= factor
        return model.lm_head.output

    plan = model.plan(scale, x, layer=range(LAYERS), factor=[0.5, 2.0])
    shared = [name for group in plan.groups for part in group.shared for name in operators(part.program.graph)]
    assert sum(name.startswith("scaled_dot_product_attention") for name in shared) == LAYERS
