"""What one trace gives back: saves of every structure, plain tensors, any order, and a program for other inputs."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

import fxsight
from fxsight.lower import TOLERANCE
from tests import small
from tests.zoo import tiny_transformer, token_ids


@dataclass
class Both:
    """A dataclass with tensors, as a model may return."""

    hidden: Tensor
    extra: dict[str, Any]


class Net(nn.Module):
    """Three layers, dropout, a module called several times, and structures of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.cell, self.drop, self.pack = nn.Linear(6, 6), nn.Dropout(0.5), Pack()
        self.register_buffer("scale", torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.drop(layer(x).relu()) + x
        for _ in range(3):
            x = self.cell(x).tanh()
        self.pack(x)
        scaled: Tensor = x * self.scale  # type: ignore[operator]
        return scaled


class Pack(nn.Module):
    def forward(self, x: Tensor) -> Both:
        return Both(x * 2, {"list": [x + 1, 7], "none": None})


@cache
def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@cache
def _model() -> fxsight.Model:
    return fxsight.Model(_net(), cache=False)


@cache
def _gpt2() -> fxsight.Model:
    return fxsight.Model(small.gpt2().requires_grad_(), cache=False)


@cache
def _lm() -> fxsight.Model:
    return fxsight.Model(tiny_transformer().eval(), cache=False)


def _x(batch: int = 3) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(batch))


def _layer(number: int, x: Tensor) -> Tensor:
    """The output of one of the layers, by hand."""
    for layer in _net().layers[:number]:
        x = layer(x).relu() + x
    found: Tensor = _net().layers[number](x)
    return found


# ----------------------------------------------------------------------------------------------------- saves


def test_saves_of_containers() -> None:
    with torch.no_grad(), _model().trace(_x()):
        first, last = _model().layers[0].output, _model().layers[2].output
        kept = fxsight.save({"pair": (first, [last, 3, None]), "again": first, "sum": first + last})
    assert type(kept["pair"]) is tuple and type(kept["pair"][1]) is list
    assert torch.equal(kept["pair"][0], _layer(0, _x())) and torch.equal(kept["again"], kept["pair"][0])
    assert torch.equal(kept["pair"][1][0], _layer(2, _x())) and kept["pair"][1][1:] == [3, None]
    assert all(type(t) is Tensor for t in (first, last, kept["sum"]))


def test_saves_in_a_list_of_the_user() -> None:
    with torch.no_grad(), _model().trace(_x()):
        found = [layer.output.save() for layer in _model().layers]
    assert all(torch.equal(value, _layer(n, _x())) for n, value in enumerate(found))


def test_saves_of_a_dataclass() -> None:
    with torch.no_grad(), _model().trace(_x()):
        packed = _model().pack.output.save()
        parts = fxsight.save(_model().pack.output)
    assert type(packed) is Both and type(packed.hidden) is Tensor
    assert torch.equal(packed.hidden, parts.hidden) and torch.equal(packed.extra["list"][0], packed.hidden / 2 + 1)
    assert packed.extra["list"][1] == 7 and packed.extra["none"] is None
    assert "save" not in vars(packed)


def test_saves_of_a_model_output_with_its_cache() -> None:
    ids = token_ids(2, 5)
    with torch.no_grad(), _gpt2().trace(ids, output_hidden_states=True):
        out = _gpt2().output.save()
        logits = _gpt2().output.logits.save()
        same = _gpt2().output["logits"].save()
    with torch.no_grad():
        expected = _gpt2()._module(ids, output_hidden_states=True)
    assert type(out) is CausalLMOutputWithCrossAttentions and list(out.keys()) == list(expected.keys())
    assert all(torch.equal(a, expected.logits) and type(a) is Tensor for a in (out.logits, logits, same, out[0]))
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, expected.hidden_states, strict=True))
    assert torch.equal(out.past_key_values.layers[1].keys, expected.past_key_values.layers[1].keys)
    assert "save" not in vars(out)


def test_saves_of_a_tuple_of_the_model() -> None:
    ids = token_ids(2, 5)
    with torch.no_grad(), _gpt2().trace(ids):
        pair = _gpt2().transformer.h[0].attn.output.save()
        value, weights = _gpt2().transformer.h[1].attn.output
        value.save()
    assert isinstance(pair, tuple) and type(pair[0]) is Tensor and pair[1] is None and weights is None
    assert type(value) is Tensor and value.shape == (2, 5, 16)


def test_saves_of_a_cache() -> None:
    ids = token_ids(2, 5)
    with torch.no_grad(), _gpt2().trace(ids):
        cache_ = fxsight.save(_gpt2().output.past_key_values)
    with torch.no_grad():
        expected = _gpt2()._module(ids).past_key_values
    assert cache_.get_seq_length() == 5
    assert torch.equal(cache_.layers[0].values, expected.layers[0].values)


def test_a_view_of_inputs_as_args_and_kwargs() -> None:
    with torch.no_grad(), _lm().trace(token_ids(2, 5)):
        args, kwargs = _lm().blocks[1].inputs
        first = _lm().blocks[1].input.save()
        args[0].save()
    assert torch.equal(args[0], first) and kwargs == {}


def test_saved_twice_is_saved_once() -> None:
    with torch.no_grad(), _model().trace(_x()) as tracer:
        kept = _model().layers[0].output.save().save()
        same = fxsight.save([kept])
    assert same[0] is kept and torch.equal(kept, _layer(0, _x())) and len(tracer.program(_x())) == 3


def test_structured_results_of_torch() -> None:
    """``max(1)``, ``topk`` and ``sort`` have their results by name, as in torch."""
    with torch.no_grad(), _model().trace(_x()):
        h = _model().layers[0].output
        largest, top, order = h.max(1).values.save(), h.topk(2).indices.save(), torch.sort(h, -1).values.save()  # type: ignore[attr-defined]
        values, indices = h.max(1)
        fxsight.save((values, indices))
    h = _layer(0, _x())
    assert torch.equal(largest, h.max(1).values) and torch.equal(top, h.topk(2).indices)
    assert torch.equal(order, h.sort(-1).values) and torch.equal(indices, h.argmax(1)) and torch.equal(values, largest)


# ------------------------------------------------------------------------------------------- after the block


def test_the_type_after_the_block_is_tensor_for_every_variable() -> None:
    held: dict[str, Any] = {}
    with torch.no_grad(), _model().trace(_x()):
        value = _model().layers[0].output
        held["a"], other, listed = value, value, [value]
        inside = value.value
        value.save()
    assert type(value) is Tensor and held["a"] is value and other is value and listed[0] is value and inside is value
    assert torch.equal(value + 1, _layer(0, _x()) + 1) and value.tolist() == _layer(0, _x()).tolist()
    assert value.requires_grad is False and value.is_leaf


def test_value_after_the_block() -> None:
    """Proxies of older code ask for ``.value``: a saved tensor still has it."""
    with torch.no_grad(), _model().trace(_x()):
        kept = _model().layers[0].output.save()
    assert torch.equal(kept.value, _layer(0, _x()))


def test_value_inside_the_block() -> None:
    with torch.no_grad(), _model().trace(_x()):
        value = (_model().layers[0].output.value * 2).value.save()
    assert torch.equal(value, _layer(0, _x()) * 2)


def test_saved_tensors_can_be_copied_and_stored(tmp_path: Any) -> None:
    import copy
    import pickle

    with torch.no_grad(), _model().trace(_x()):
        kept = _model().layers[0].output.save()
        view = _model().layers[0].output[:, :2].T.save()
    torch.save({"kept": kept, "view": view}, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(loaded["kept"], kept) and torch.equal(loaded["view"], view)
    assert torch.equal(copy.deepcopy(kept), kept) and torch.equal(pickle.loads(pickle.dumps(view)), view)


def test_saving_weights_and_inputs_does_not_alias_them() -> None:
    x = _x()
    with torch.no_grad(), _model().trace(x):
        given, whole = _model().input.save(), _model().inputs[0][0].save()
        weight = (_model().layers[0].output[0, :1] * 0 + _model().layers[0].weight).save()
        scale = fxsight.save(_model().output * 0 + _model().scale)
    for kept in (given, whole, weight, scale):
        kept.zero_()
    assert torch.equal(x, _x()) and _net().layers[0].weight.abs().sum() > 0 and (_net().scale == 0.5).all()  # type: ignore[operator, union-attr]


def test_gradients_flow_as_in_the_model() -> None:
    """Without ``no_grad`` a saved value has the graph of the model behind it."""
    net = Net().eval()
    model = fxsight.Model(net, cache=False)
    with model.trace(_x()):
        out = model.output.save()
    out.sum().backward()
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net(_x()).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, net.parameters(), strict=True))  # type: ignore[arg-type]


def test_nothing_else_of_a_trace_stays_alive() -> None:
    with torch.no_grad(), _model().trace(_x()):
        unsaved = _model().layers[1].output
        kept = _model().layers[0].output.save()
    gone, there = weakref.ref(unsaved), kept
    del unsaved
    gc.collect()
    assert gone() is None and there is kept


# ------------------------------------------------------------------------------------------------- exceptions


class Mine(Exception):
    """The user's own."""


def test_an_exception_in_the_body_is_the_user_s() -> None:
    mine = Mine("here")
    with pytest.raises(Mine) as caught, torch.no_grad(), _model().trace(_x()) as tracer:
        _model().layers[0].output[:] = 0
        kept = _model().layers[1].output.save()
        raise mine
    assert caught.value is mine and [f.name for f in caught.traceback] == [
        "test_an_exception_in_the_body_is_the_user_s"
    ]
    with pytest.raises(fxsight.NotSavedError):
        print(kept)
    with pytest.raises(fxsight.TraceError):
        print(tracer.program)
    with torch.no_grad(), _model().trace(_x()):
        again = _model().layers[0].output.save()
    assert torch.equal(again, _layer(0, _x()))


def test_leaving_a_body_early() -> None:
    def body() -> Any:
        with torch.no_grad(), _model().trace(_x()):
            kept = _model().layers[0].output.save()
            return kept

    def loop() -> list[Any]:
        found = []
        for number in range(3):
            with torch.no_grad(), _model().trace(_x()):
                found.append(_model().layers[number].output.save())
                if number == 1:
                    break
        return found

    assert torch.equal(body(), _layer(0, _x()))
    assert [torch.equal(value, _layer(n, _x())) for n, value in enumerate(loop())] == [True, True]


def test_bodies_that_are_not_source() -> None:
    """One line, ``exec``, a lambda: a body is run in place, so nobody needs its text."""
    scope = {"model": _model(), "x": _x()}
    exec("with model.trace(x): kept = model.layers[0].output.save()", scope)
    assert torch.equal(scope["kept"], _layer(0, _x()))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- order


def test_reads_in_any_order() -> None:
    with torch.no_grad(), _model().trace(_x()) as tracer:
        out, last = _model().output.save(), _model().layers[2].output.save()
        operation = tracer.at("/relu_0#1").output.save()
        first, given = _model().layers[0].output.save(), _model().layers[0].input.save()
    assert torch.equal(last, _layer(2, _x())) and torch.equal(first, _layer(0, _x())) and torch.equal(given, _x())
    assert torch.equal(operation, _layer(1, _x()).relu()) and torch.equal(out, _net()(_x()))


def test_writes_in_any_order() -> None:
    with torch.no_grad(), _model().trace(_x()):
        _model().layers[2].output *= 2
        _model().layers[0].output = _model().layers[0].output + 1
        forward = _model().output.save()
    with torch.no_grad(), _model().trace(_x()):
        _model().layers[0].output = _model().layers[0].output + 1
        _model().layers[2].output *= 2
        backward = _model().output.save()
    assert torch.equal(forward, backward) and not torch.equal(forward, _net()(_x()))


def test_a_read_after_a_write_upstream_sees_it_wherever_it_stands() -> None:
    with torch.no_grad(), _model().trace(_x()):
        later = _model().layers[2].output.save()
        _model().layers[0].output[:] = 0
    x = _x()
    x = _net().layers[1](x).relu() + x
    assert torch.equal(later, _net().layers[2](x))


# --------------------------------------------------------------------------------------------- work that is not done


def _operations(tracer: Any) -> list[str]:
    return [str(n.target) for n in tracer.program.program.nodes.values() if n.op == "call_function"]


def test_what_nobody_reads_is_not_run() -> None:
    with torch.no_grad(), _model().trace(_x()) as tracer:
        _model().layers[1].output.save()
    assert _operations(tracer).count("aten.linear.default") == 2
    with torch.no_grad(), _model().trace(_x()) as tracer:
        pass
    assert _operations(tracer) == []


def test_what_a_constant_replaces_is_not_run() -> None:
    with torch.no_grad(), _model().trace(_x()) as tracer:
        _model().layers[2].output = torch.zeros(3, 6)
        _model().output.save()
    assert _operations(tracer).count("aten.linear.default") == 5


def test_an_edit_downstream_of_what_is_saved_is_not_run() -> None:
    with torch.no_grad(), _model().trace(_x()) as tracer:
        _model().layers[2].output[:, 0] = 0
        kept = _model().layers[0].output.save()
    assert _operations(tracer).count("aten.linear.default") == 1 and torch.equal(kept, _layer(0, _x()))


# ----------------------------------------------------------------------------------------------- calls of a module


def test_a_module_called_several_times() -> None:
    with torch.no_grad(), _model().trace(_x()):
        _model().cell.call(1).output = _model().cell.output
        kept = [_model().cell.call(n).output.save() for n in range(3)]
        plain = _model().cell.output.save()
    first = _net().cell(_net().layers[2](_before_last()).relu() + _before_last())
    assert torch.equal(plain, first) and torch.equal(kept[0], first) and torch.equal(kept[1], first)
    assert torch.equal(kept[2], _net().cell(first.tanh()))


def _before_last() -> Tensor:
    x = _x()
    for layer in _net().layers[:2]:
        x = layer(x).relu() + x
    return x


# ------------------------------------------------------------------------------------------------------ training


def test_dropout_in_training_equals_eager_with_the_same_seed() -> None:
    torch.manual_seed(0)
    net = Net().train()
    model = fxsight.Model(net, cache=False)
    torch.manual_seed(7)
    expected = net(_x())
    torch.manual_seed(7)
    with model.trace(_x()):
        out, first = model.output.save(), model.drop.output.save()
    assert torch.equal(out, expected) and (first == 0).any()
    net.eval()
    with torch.no_grad(), model.trace(_x()):
        out = model.output.save()
    assert torch.equal(out, net(_x()))


def test_dropout_that_nobody_reads_still_draws() -> None:
    """The numbers of later dropouts are those of the model, whatever is cut away."""
    torch.manual_seed(0)
    net = Net().train()
    model = fxsight.Model(net, cache=False)
    found: list[Tensor] = []
    hooks = [
        net.drop.register_forward_hook(lambda module, args, output: found.append(output)),
        net.layers[2].register_forward_pre_hook(lambda module, args: (torch.zeros(3, 6),)),
    ]
    torch.manual_seed(7)
    net(_x())
    for hook in hooks:
        hook.remove()
    torch.manual_seed(7)
    with model.trace(_x()):
        model.layers[2].input = torch.zeros(3, 6)
        last = model.drop.call(2).output.save()
    assert torch.equal(last, found[2])


# ---------------------------------------------------------------------------------------------- torch on values


def test_modules_and_einops_on_values() -> None:
    probe, norm = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2)), nn.LayerNorm(6)
    with torch.no_grad(), _model().trace(_x(4)):
        h = _model().layers[1].output
        pairs = einops.rearrange(h, "(a b) (c d) -> a d (b c)", a=2, c=3).save()
        mean = einops.reduce(h, "b (c d) -> d", "mean", d=2).save()
        tiled = einops.repeat(h, "b c -> b k c", k=2).save()
        mixed = torch.einsum("bi,bj->ij", h, h).save()  # type: ignore[attr-defined]
        probed, normed = probe(h).save(), F.layer_norm(norm(h), (6,)).save()  # type: ignore[attr-defined]
    h = _layer(1, _x(4))
    with torch.no_grad():
        assert torch.equal(pairs, einops.rearrange(h, "(a b) (c d) -> a d (b c)", a=2, c=3))
        assert torch.equal(mean, einops.reduce(h, "b (c d) -> d", "mean", d=2))
        assert torch.equal(tiled, einops.repeat(h, "b c -> b k c", k=2))
        assert torch.equal(mixed, torch.einsum("bi,bj->ij", h, h))
        assert torch.equal(probed, probe(h)) and torch.equal(normed, F.layer_norm(norm(h), (6,)))


def test_functions_of_the_user_with_values_inside_containers() -> None:
    def combine(parts: dict[str, list[Any]], *, weights: tuple[float, ...]) -> Any:
        return sum(w * part for w, part in zip(weights, parts["all"], strict=True))

    with torch.no_grad(), _model().trace(_x()):
        values = [layer.output for layer in _model().layers]
        mixed = combine({"all": values}, weights=(0.5, 0.25, 0.125)).save()
        stacked, joined = torch.stack(values, 1).save(), torch.cat([values[0], torch.ones(3, 1)], dim=1).save()  # type: ignore[attr-defined]
        chosen = torch.where(values[0] > 0, values[1], values[2]).save()  # type: ignore[attr-defined]
        blocks = torch.block_diag(*values).save()  # type: ignore[no-untyped-call]
    real = [_layer(n, _x()) for n in range(3)]
    assert torch.equal(mixed, combine({"all": real}, weights=(0.5, 0.25, 0.125)))
    assert torch.equal(stacked, torch.stack(real, 1)) and torch.equal(joined[:, :6], real[0])
    assert torch.equal(chosen, torch.where(real[0] > 0, real[1], real[2]))
    assert torch.equal(blocks, torch.block_diag(*real))  # type: ignore[no-untyped-call]


OPERATORS: dict[str, Callable[[Any, Tensor], Any]] = {
    "1 - x": lambda x, c: 1 - x,
    "2 / x": lambda x, c: 2 / x,
    "2 ** x": lambda x, c: 2**x,
    "x // 2": lambda x, c: x // 2,
    "x % 2": lambda x, c: x % 2,
    "-x": lambda x, c: -x,
    "abs": lambda x, c: abs(x),
    "c - x": lambda x, c: c - x,
    "c @ x": lambda x, c: c.T @ x,
    "c[i]": lambda x, c: c[x.argmax(0)],
    "c.index_select": lambda x, c: c.index_select(0, x.argmax(0)),
    "compare": lambda x, c: (x > c) & ~(x == 1) | (x <= 0),
    "x.T": lambda x, c: x.T,
    "x.mT": lambda x, c: x[None].mT,
    "x[None, ..., 1]": lambda x, c: x[None, ..., 1],
    "x[mask]": lambda x, c: x[c > 0],
    "x[x > 0]": lambda x, c: x[x > 0],
    "nonzero": lambda x, c: torch.nonzero(x > 0),
    "round": lambda x, c: x.round(decimals=2),
    "inf": lambda x, c: x.masked_fill(x < 0, -math.inf).softmax(-1),
    "dtype": lambda x, c: x.to(torch.float64).sum(dtype=torch.float16),
    "bool": lambda x, c: (x > 0).any(),
    "new": lambda x, c: x.new_zeros(2, 2) + 1,
    "like": lambda x, c: torch.ones_like(x) + torch.full_like(x, 2),
    "F": lambda x, c: F.cross_entropy(x, torch.tensor([0, 1, 2]), reduction="sum"),
    "pad": lambda x, c: F.pad(x, (1, 2), value=3.0),
    "one_hot": lambda x, c: F.one_hot(x.argmax(1), 6),
    "linalg": lambda x, c: torch.linalg.norm(x, dim=-1),
    "svd": lambda x, c: torch.linalg.svd(x)[1],
    "fft": lambda x, c: torch.fft.rfft(x).abs(),
    "special": lambda x, c: torch.special.expit(x),
    "cdist": lambda x, c: torch.cdist(x, c),
    "quantile": lambda x, c: torch.quantile(x, torch.tensor([0.1, 0.5]), dim=1),
    "std": lambda x, c: x.std(0, keepdim=True, correction=0),
    "cosine": lambda x, c: F.cosine_similarity(x, c, dim=-1),
    "gather": lambda x, c: x.gather(1, x.argsort(1)),
    "unique": lambda x, c: torch.unique((x > 0).int()),
    "unbind": lambda x, c: torch.unbind(x)[1],
    "tensordot": lambda x, c: torch.tensordot(x, c, dims=([0], [0])),
    "complex": lambda x, c: torch.complex(x, c).real,
    "take_along": lambda x, c: torch.take_along_dim(x, x.argmax(1, keepdim=True), 1),
    "iadd of a result": lambda x, c: x.clone().add_(c).mul_(2),
    "zip": lambda x, c: torch.stack([a + b for a, b in zip(x, c, strict=True)])[1],
    "in": lambda x, c: torch.isin(x.round(), torch.tensor([0.0, 1.0])),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_on_values(name: str) -> None:
    fn, c = OPERATORS[name], _x() + 0.5
    with torch.no_grad(), _model().trace(_x()):
        found = fn(_model().layers[0].output, c).save()
    with torch.no_grad():
        expected = fn(_layer(0, _x()), c)
    assert torch.equal(found, expected) and found.dtype == expected.dtype and type(found) is Tensor


def test_noise_of_the_shape_of_a_value() -> None:
    with torch.no_grad(), _model().trace(_x()):
        h = _model().layers[0].output
        torch.manual_seed(3)
        noise = 0.1 * torch.randn(h.shape)
        _model().layers[0].output = h + noise
        out = _model().layers[0].output.save()
    torch.manual_seed(3)
    assert torch.equal(out, _layer(0, _x()) + 0.1 * torch.randn(3, 6)) and type(noise) is Tensor


def test_noise_like_a_value() -> None:
    with torch.no_grad(), _model().trace(_x()):
        torch.manual_seed(3)
        noise = torch.randn_like(_model().layers[0].output).save()  # type: ignore[attr-defined]
    assert noise.shape == (3, 6) and noise.std() > 0


def test_logit_lens_shares_the_weights() -> None:
    model, ids = _gpt2(), token_ids(2, 5)
    with torch.no_grad(), model.trace(ids) as tracer:
        lens = [model.lm_head(model.transformer.ln_f(block.output)).save() for block in model.transformer.h]
        logits = model.lm_head.output.save()
    assert torch.equal(lens[-1], logits) and not torch.equal(lens[0], logits)
    assert not any(binding.kind == "constant" for binding in tracer.program.program.bindings.values())


# -------------------------------------------------------------------------------------------------- numbers on demand


def test_numbers_on_demand() -> None:
    with torch.no_grad(), _model().trace(_x()):
        h = _model().layers[0].output
        total = h.sum()
        sign = 1 if total > 0 else -1
        number, listed, array, text = total.item(), h[0].tolist(), h.numpy(), f"{total:.3f}"
        _model().layers[0].output = h * sign * float(total)
        edited = float(_model().layers[1].output.sum())
        kept = _model().layers[0].output.save()
    real = _layer(0, _x()).detach()
    assert number == real.sum().item() and listed == real[0].tolist() and (array == real.numpy()).all()
    assert text == f"{real.sum():.3f}" and torch.equal(kept, real * sign * float(real.sum()))
    with torch.no_grad():
        x = kept.relu() + _x()
        assert edited == float(_net().layers[1](x).sum())


def test_a_list_indexed_by_a_value() -> None:
    with torch.no_grad(), _model().trace(_x()):
        names = ["a", "b", "c", "d", "e", "f"]
        found = names[_model().layers[0].output[0].argmax()]
    assert found == names[int(_layer(0, _x())[0].argmax())]


# ---------------------------------------------------------------------------------------------------- other sizes


def test_one_capture_for_every_batch_and_length() -> None:
    model = fxsight.Model(tiny_transformer().eval(), cache=False)
    for batch, length in [(2, 5), (3, 7), (1, 4), (2, 1), (1, 1), (4, 9)]:
        ids = token_ids(batch, length)
        with torch.no_grad(), model.trace(ids):
            model.blocks[0].output[:, 0] = 0
            out = model.output.save()
        assert out.shape[:2] == (batch, length)
        handle = model.blocks[0]._module.register_forward_hook(lambda m, a, o: o.index_fill(1, torch.tensor([0]), 0))
        with torch.no_grad():
            assert torch.equal(out, model._module(ids)), (batch, length)
        handle.remove()
    assert model._captures.made <= 3


def test_the_program_on_new_inputs_equals_a_new_trace() -> None:
    def body(ids: Tensor) -> tuple[Any, Any]:
        with torch.no_grad(), _lm().trace(ids) as tracer:
            _lm().blocks[0].output[:, -1] *= 2
            kept = fxsight.save({"hidden": _lm().blocks[1].input, "logits": (_lm().output,)})
        return tracer.program, kept

    program, _ = body(token_ids(2, 5))
    for batch, length in [(2, 5), (3, 7), (2, 9)]:
        ids = token_ids(batch, length)
        with torch.no_grad():
            (found,) = program(ids)
        expected = body(ids)[1]
        assert torch.equal(found["hidden"], expected["hidden"]) and torch.equal(
            found["logits"][0], expected["logits"][0]
        )


def test_a_program_refuses_what_does_not_fit_again_and_again() -> None:
    """Inputs that fit are checked once for each kind; others are refused each time."""
    net = nn.Sequential(nn.Linear(3, 3))
    model, x = fxsight.Model(net, cache=False), torch.ones(2, 3)
    with torch.no_grad(), model.trace(x) as tracer:
        model.output[: model.output.shape[0] - 1] = 0
        out = model.output.save()
    for _ in range(3):
        assert torch.equal(tracer.program(x)[0], out)
        for other, why in [(torch.ones(3, 3), "batch = 2"), (torch.ones(2, 4), "takes"), (x.double(), "f64")]:
            with pytest.raises(fxsight.InputError, match=why):
                tracer.program(other)


def test_a_program_sees_new_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    model = fxsight.Model(net, cache=False)
    with torch.no_grad(), model.trace(torch.ones(2, 3)) as tracer:
        model.output.save()
    with torch.no_grad():
        net[0].weight.zero_()  # type: ignore[operator]
        assert torch.equal(tracer.program(torch.ones(2, 3))[0], net(torch.ones(2, 3)))
    net[0].weight = nn.Parameter(torch.ones(3, 3))
    with torch.no_grad():
        assert torch.equal(tracer.program(torch.ones(2, 3))[0], net(torch.ones(2, 3)))


def test_a_repeated_body_is_the_same_program() -> None:
    programs = []
    for scale in (2.0, 3.0):
        vector = torch.full((6,), scale)
        with torch.no_grad(), _model().trace(_x()) as tracer:
            _model().layers[0].output += vector
            out = _model().layers[0].output.save()
        programs.append(tracer.program)
        assert torch.equal(out, _layer(0, _x()) + scale)
    assert programs[0].program == programs[1].program


def test_a_program_keeps_its_own_constants() -> None:
    """Each finished program answers with the constants of its own body, not those of the last one that was equal."""
    programs = []
    for scale in (2.0, 3.0):
        vector = torch.full((6,), scale)
        with torch.no_grad(), _model().trace(_x()) as tracer:
            (_model().layers[0].output + vector).save()
        programs.append(tracer.program)
    with torch.no_grad():
        found = [program(_x())[0] for program in programs]
    assert torch.equal(found[0], _layer(0, _x()) + 2) and torch.equal(found[1], _layer(0, _x()) + 3)


# ---------------------------------------------------------------------------------------------------------- tiers


def test_inductor_agrees_within_the_stated_tolerance() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    model = fxsight.Model(net, cache=False)
    found: dict[str, list[Tensor]] = {}
    for tier in ("eager", "inductor"):
        with warnings.catch_warnings(), torch.no_grad(), model.trace(_x(), backend=tier) as tracer:
            warnings.simplefilter("ignore")
            hidden = model[0].output.save()
            model[1].output[:, 0] = 0
            found[tier] = [hidden, model.output.save()]
        assert tracer.tier == tier
    rtol, atol = TOLERANCE[torch.float32]
    for eager, compiled in zip(*found.values(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)
        assert type(compiled) is Tensor
    with torch.no_grad():
        torch.testing.assert_close(tracer.program(_x(7))[0], net[0](_x(7)), rtol=rtol, atol=atol)


def test_a_program_with_an_assignment_is_free_in_its_sizes() -> None:
    def assigned(x: Tensor) -> tuple[Tensor, Any]:
        with _model().trace(x) as tracer:
            _model().layers[1].output = _model().layers[0].output * 2
            out = _model().output.save()
        return out, tracer.program

    _, program = assigned(torch.randn(3, 6))
    other = torch.randn(5, 6)
    assert torch.equal(program(other)[0], assigned(other)[0])
