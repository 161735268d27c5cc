"""``tracer.cache()`` keeps what hooks collect, to the bit, wherever in the block it stands."""

from __future__ import annotations

import gc
import pickle
import re
import warnings
import weakref
from collections import OrderedDict
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.tree import leaves_of
from fxsight.value import Value
from tests import small


class Block(nn.Module):
    """Returns a tuple, and has a child whose name is a word of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.output = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + self.output(torch.relu(self.mix(x)) * scale), None


class Net(nn.Module):
    """Blocks, a module called three times, one never called, one that returns a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.cell, self.idle, self.bias = nn.Linear(6, 6), nn.Linear(6, 6), Weight()
        self.fold = Fold()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x, scale=2.0)
        for _ in range(3):
            x = self.cell(x).tanh()
        return x + self.bias() + self.fold(x).reshape(x.shape)  # type: ignore[no-any-return]


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0))

    def forward(self) -> Tensor:
        return self.weight


class Fold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).reshape(-1)


@cache
def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@cache
def _model() -> fxsight.Model:
    return fxsight.Model(_net(), cache=False)


@cache
def _gpt2() -> fxsight.Model:
    return fxsight.Model(small.gpt2(n_layer=3), cache=False)


def _x(rows: int = 2) -> Tensor:
    return torch.randn((rows, 6), generator=torch.Generator().manual_seed(rows))


def _ids() -> Tensor:
    return torch.randint(0, 97, (2, 5), generator=torch.Generator().manual_seed(0))


def _copied(value: Any) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves_of(value)]


def _hooked(net: nn.Module, *args: Any, edits: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, list[Any]]:
    """Per key, for each call, the leaves of inputs and output, collected by hooks; edits change outputs in place."""
    found: dict[str, list[Any]] = {}
    handles = []
    for path, module in net.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, key: str = f"model.{path}".strip(".")) -> None:
            found.setdefault(key, []).append([_copied((args, kwargs)), None])

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            if edits and path in edits:
                edits[path](output)
            found[f"model.{path}".strip(".")][-1][1] = _copied(output)

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
    with torch.no_grad():
        net(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def _equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else (x == y or not isinstance(x, (int, float, str)))
        for x, y in zip(a, b, strict=True)
    )


def _check(kept: fxsight.Cache, hooked: dict[str, list[Any]], ports: tuple[str, ...] = ("output",)) -> None:
    assert list(kept) == list(hooked)
    for key, calls in hooked.items():
        entries = kept.calls(key)
        assert len(entries) == len(calls), key
        for entry, (inputs, output) in zip(entries, calls, strict=True):
            if "output" in ports:
                assert _equal(leaves_of(entry.output), output), key
            if "inputs" in ports:
                assert _equal(leaves_of(entry.inputs), inputs), key


# ------------------------------------------------------------------------------------------- the same as hooks


def test_all_modules_as_hooks_see_them() -> None:
    with _model().trace(_x()) as tracer:
        kept = tracer.cache(include_inputs=True)
    _check(kept, _hooked(_net(), _x()), ("output", "inputs"))
    assert isinstance(kept["model.blocks.0"].output, tuple) and kept["model.blocks.0"].output[1] is None
    assert kept["model.blocks.0"].inputs[1] == {"scale": 2.0}
    assert all(type(leaf) is not Value for key in kept for e in kept.calls(key) for leaf in leaves_of(e.output))


def test_gpt2_with_its_own_structures() -> None:
    gpt2 = _gpt2()
    with gpt2.trace(_ids()) as tracer:
        kept = tracer.cache()
    hooked = _hooked(gpt2._module, _ids())
    _check(kept, hooked)
    out = kept["model"].output
    assert type(out) is type(gpt2._module(_ids())) and torch.equal(out.logits, kept["lm_head"].output)
    assert out.past_key_values.get_seq_length() == 5 and "save" not in vars(out)


def test_after_all_edits_wherever_it_stands() -> None:
    def cut(output: Tensor) -> None:
        output[:, 0] = 0

    model = _model()
    with model.trace(_x()) as tracer:
        early = tracer.cache()
        model.blocks[0].mix.output[:, 0] = 0
        before = model.cell.output.save()
        late = tracer.cache()
        model.cell.output[:, 0] = 0
    hooked = _hooked(_net(), _x(), edits={"blocks.0.mix": cut})  # hooks would cut all three calls of the cell
    assert torch.equal(early["blocks.0.mix"].output, hooked["model.blocks.0.mix"][0][1][0])
    assert torch.equal(before, hooked["model.cell"][0][1][0])
    assert (early["cell"][0].output[:, 0] == 0).all() and (early["cell"][1].output[:, 0] != 0).all()
    for key in early:
        assert all(
            _equal(leaves_of(a.output), leaves_of(b.output))
            for a, b in zip(early.calls(key), late.calls(key), strict=True)
        )


def test_an_assigned_input_and_output() -> None:
    model, zeros = _model(), torch.zeros(2, 6)
    with model.trace(_x()) as tracer:
        model.cell.input = zeros
        model.blocks[1].output = (zeros + 1, None)
        kept = tracer.cache(include_inputs=True)
    assert torch.equal(kept["cell"][0].input, zeros) and torch.equal(kept["cell"][0].output, _net().cell(zeros))
    assert torch.equal(kept["blocks.1"].output[0], zeros + 1) and torch.equal(kept["blocks.2"].input, zeros + 1)
    kept["blocks.1"].output[0].add_(1)
    assert torch.equal(zeros, torch.zeros(2, 6))


def test_a_module_that_returns_a_weight() -> None:
    with _model().trace(_x()) as tracer:
        kept = tracer.cache()
    assert torch.equal(kept["bias"].output, torch.arange(6.0))
    kept["bias"].output.zero_()
    assert torch.equal(_net().bias.weight, torch.arange(6.0))


def test_the_program_keeps_it_too() -> None:
    with _model().trace(_x()) as tracer:
        out = _model().output.save()
        kept = tracer.cache(["cell", "blocks.0"])
    again, found = tracer.program(_x(5))
    assert torch.equal(tracer.program(_x())[0], out)
    assert list(found) == ["model.blocks.0:output", "model.cell:output", "model.cell#1:output", "model.cell#2:output"]
    hooked = _hooked(_net(), _x(5))
    assert torch.equal(again, hooked["model"][0][1][0])
    assert torch.equal(found["model.cell#2:output"], hooked["model.cell"][2][1][0])
    assert torch.equal(kept["cell#2"].output, tracer.program(_x())[1]["model.cell#2:output"])


def _alive() -> int:
    gc.collect()
    return sum(type(x) is Value for x in gc.get_objects())


def test_values_need_no_save_and_none_stays() -> None:
    model, before = _model(), _alive()
    with model.trace(_x()) as tracer:
        kept = tracer.cache(dtype=torch.float64)
        value = model.cell.output
        watched = weakref.ref(value)
    with pytest.raises(fxsight.NotSavedError, match="was not saved"):
        value + 1
    del value, tracer
    assert _alive() <= before and watched() is None
    assert kept["cell"][0].output.dtype == torch.float64


# ----------------------------------------------------------------------------------------------------- options


def test_chosen_modules() -> None:
    model = _model()
    with model.trace(_x()) as tracer:
        kept = tracer.cache(modules=[model.blocks[2], "blocks.0", "model.cell", "model"])
        single = tracer.cache("blocks.1", include_output=False, include_inputs=True)
    assert list(kept) == ["model", "model.blocks.0", "model.blocks.2", "model.cell"]
    assert list(single) == ["model.blocks.1"] and torch.equal(single["blocks.1"].input, kept["blocks.0"].output[0])


def test_device_and_dtype() -> None:
    with _gpt2().trace(_ids()) as tracer:
        plain = tracer.cache(include_inputs=True)
        small = tracer.cache(include_inputs=True, dtype=torch.bfloat16, device="cpu")
        nowhere = tracer.cache(["transformer.h.0"], device="meta")
    for key in plain:
        assert torch.equal(leaves_of(small[key].output)[0], leaves_of(plain[key].output)[0].to(torch.bfloat16)), (
            f"{key} is another"
        )
    assert small["transformer.wte"].input.dtype == torch.int64
    assert nowhere["transformer.h.0"].output.device.type == "meta"


def test_detach() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with fxsight.Model(net, cache=False).trace(torch.ones(1, 3)) as tracer:
        apart, attached = tracer.cache(), tracer.cache(detach=False)
    assert not apart["1"].output.requires_grad
    attached["1"].output.sum().backward()
    assert net[0].weight.grad is not None


def test_what_was_not_kept() -> None:
    with _model().trace(_x()) as tracer:
        kept = tracer.cache()
        inputs = tracer.cache(include_output=False, include_inputs=True)
    with pytest.raises(fxsight.NotCached) as caught:
        kept["blocks.0"].inputs  # noqa: B018
    assert str(caught.value) == "model.blocks.0:inputs is not kept: write tracer.cache(include_inputs=True)"
    with pytest.raises(AttributeError, match=r"^model\.cell#1:output is not kept: .*include_output=True"):
        inputs["cell"][1].output  # noqa: B018
    assert inputs["bias"].input is None


# ------------------------------------------------------------------------------------------------------ access


@cache
def _kept() -> fxsight.Cache:
    with _model().trace(_x()) as tracer:
        kept: fxsight.Cache = tracer.cache()
    return kept


def test_as_a_mapping() -> None:
    kept = _kept()
    assert list(kept)[:4] == ["model", "model.blocks.0", "model.blocks.0.mix", "model.blocks.0.output"]
    assert len(kept) == 13 == len(kept.keys()) == len(list(kept.values()))
    for name in ("model", "blocks.0", "model.blocks.0", "cell", "cell#2", "model.cell#0"):
        assert name in kept, name
    for other in ("idle", "blocks", "cell#3", "nope", 3, None):
        assert other not in kept, other
    assert kept["blocks.0"] is kept["model.blocks.0"] and kept["model.cell#2"] is kept["cell"][2]
    assert kept.get("nope") is None
    assert [type(x).__name__ for x in kept.values()].count("list") == 1


def test_by_names() -> None:
    kept = _kept()
    assert kept.model.output is kept["model"].output
    assert kept.model.blocks[0].output is kept["blocks.0"].output is kept.blocks[0].output
    assert kept.model.blocks[-1].mix.output is kept["blocks.2.mix"].output
    assert [block.output[0] is kept[f"blocks.{i}"].output[0] for i, block in enumerate(kept.blocks)] == [True] * 3
    assert [part.entry for part in kept.model.blocks[1:]] == [kept["blocks.1"], kept["blocks.2"]]
    assert kept.model.blocks[0]["output"].output is kept["blocks.0.output"].output
    assert kept.model.cell.call(2) is kept["cell"][2]
    assert len(kept.model.blocks) == 3 and len(kept.model.cell) == 0 and kept.model.cell
    assert "mix" in dir(kept.model.blocks[0]) and not hasattr(kept.model, "nope")


def test_sequential_children_by_position() -> None:
    net = nn.Sequential(OrderedDict([("first", nn.Linear(3, 3)), ("second", nn.ReLU())]))
    with fxsight.Model(net, cache=False).trace(torch.ones(1, 3)) as tracer:
        kept = tracer.cache()
    assert kept.model[1].output is kept["second"].output is kept.model.second.output


def test_a_child_called_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.model(x))
            return out

    model = fxsight.Model(Outer(), cache=False)
    with model.trace(torch.ones(1, 3)) as tracer:
        kept, part = tracer.cache(), tracer.cache(["model.0", "model.model"])
    assert list(kept) == ["model", "model.model", "model.model.0", "model.head"]
    assert kept["model.0"] is kept["model.model.0"] and kept["model"].output.shape == (1, 2)
    assert kept.model.model[0].output.shape == (1, 3)
    assert list(part) == ["model.model", "model.model.0"]


NOT_THERE = {
    "nope": "no module 'nope' in this cache; see cache.keys()",
    "model.bloks.0": "no module 'model.bloks.0' in this cache; did you mean 'model.blocks.0', "
    "'model.blocks.2', 'model.blocks.1'?",
    "idle": "idle is not in this cache: it is not called in this forward",
    "cell#3": "no call 3 of cell in this cache: it was called 3 times",
    "bias#x": "no call x of bias in this cache: it was called once",
}


@pytest.mark.parametrize("name", NOT_THERE)
def test_names_that_are_not_there(name: str) -> None:
    with pytest.raises(KeyError) as caught:
        _kept()[name]
    assert str(caught.value) == NOT_THERE[name]


def test_ways_that_lead_nowhere() -> None:
    kept = _kept()
    with pytest.raises(AttributeError, match=r"^model has no module 'block'; did you mean 'blocks'\?$"):
        kept.model.block  # noqa: B018
    with pytest.raises(IndexError, match=r"^model\.blocks has 3 modules; there is no 3$"):
        kept.model.blocks[3]
    with pytest.raises(KeyError, match=r"^model\.cell has no module 'x'; it has no children$"):
        kept.model.cell["x"]
    with pytest.raises(AttributeError, match=r"^model\.blocks is not in this cache: it is not called in this forward"):
        kept.model.blocks.output  # noqa: B018
    with pytest.raises(AttributeError, match=r"^model\.cell was called 3 times: write \.call\(n\)"):
        kept.model.cell.output  # noqa: B018
    with pytest.raises(AttributeError, match=r"^_private$"):
        kept._private  # noqa: B018


def test_it_prints() -> None:
    kept = _kept()
    assert repr(kept).startswith("<Cache of 13 modules: model, model.blocks.0, model.blocks.0.mix,")
    assert str(kept["blocks.0.mix"]) == "model.blocks.0.mix: output f32[2, 6]"
    assert repr(kept.model.cell).splitlines()[2] == "model.cell#2: output f32[2, 6]"
    assert repr(kept.model.idle) == "model.idle: not in this cache"
    assert repr(kept["cell"][1]) == "Entry(name='model.cell#1')"


def test_it_is_data() -> None:
    again = pickle.loads(pickle.dumps(_kept()))
    assert torch.equal(again.model.blocks[0].output[0], _kept()["blocks.0"].output[0])
    assert list(again) == list(_kept())


# --------------------------------------------------------------------------------------- blocks of other kinds


def test_only_what_was_asked_for_is_there() -> None:
    with _model().trace(_x()) as tracer:
        kept = tracer.cache(["cell"])
    with pytest.raises(KeyError, match=r"^blocks\.0 is not in this cache: it was not asked for \(modules=\.\.\.\)"):
        kept["blocks.0"]


def test_modules_that_cannot_be_kept() -> None:
    model = _model()
    with model.trace(_x()) as tracer:
        with pytest.raises(fxsight.UnknownAddress, match=r"^no module 'cel' in this model; did you mean 'mode"):
            tracer.cache(["cel"])
        with pytest.raises(
            fxsight.TraceError, match=re.escape("a cache keeps modules, given as views or paths, and 3")
        ):
            tracer.cache([3])
        with pytest.raises(fxsight.TraceError, match="a cache keeps modules"):
            tracer.cache([model.blocks[0].ops.torch_relu_0])
        with pytest.raises(fxsight.TraceError, match=r"^transformer is a module of another model$"):
            tracer.cache(_gpt2().transformer)


def test_before_the_end_and_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), _model().trace(_x()) as tracer:
        kept = tracer.cache()
        with pytest.raises(fxsight.TraceError) as caught:
            kept["cell"]
        raise ZeroDivisionError
    assert str(caught.value) == (
        "this cache has no values: it is filled when its block ends (in a session, when that ends); inside it, read "
        ".output itself"
    )
    with pytest.raises(fxsight.TraceError, match="this cache has no values"):
        kept.model  # noqa: B018
    assert repr(kept).startswith("<Cache: it is filled")


def test_per_invoke() -> None:
    model = _model()
    with model.trace() as tracer:
        everything = tracer.cache()
        with tracer.invoke(_x(1)):
            first = tracer.cache()
            model.blocks[0].mix.output[:] = 0
        with tracer.invoke(_x(3)):
            second = tracer.cache(include_inputs=True)
        with tracer.invoke():
            whole = tracer.cache(["cell"])
    batch = torch.cat([_x(1), _x(3)])

    def cut(output: Tensor) -> None:
        output[:1] = 0

    hooked = _hooked(_net(), batch, edits={"blocks.0.mix": cut})
    for key, calls in hooked.items():
        for n, (inputs, output) in enumerate(calls):
            assert _equal(leaves_of(everything.calls(key)[n].output), output), key
            if key in ("model.bias", "model.fold"):
                continue
            assert torch.equal(leaves_of(first.calls(key)[n].output)[0], output[0][:1]), key
            assert torch.equal(leaves_of(second.calls(key)[n].output)[0], output[0][1:]), key
            assert torch.equal(leaves_of(second.calls(key)[n].inputs)[0], inputs[0][1:]), key
    assert torch.equal(first["bias"].output, torch.arange(6.0))
    assert torch.equal(whole["cell"][1].output, hooked["model.cell"][1][1][0])
    with pytest.raises(KeyError, match=r"fold is not in this cache: it has no value of its own: fold:output inside an"):
        first["fold"]
    with pytest.raises(KeyError, match=r"^model\.fold:output has no value of its own: fold:output inside an invo"):
        second["fold"].output  # noqa: B018
    assert torch.equal(second["fold"].input, hooked["model.fold"][0][0][0][1:])


def test_an_invoke_that_skips() -> None:
    model = _model()
    with model.trace() as tracer:
        with tracer.invoke(_x(1)):
            model.blocks[1].skip((model.blocks[1].input, None))
            skipped = tracer.cache()
        with tracer.invoke(_x(2)):
            ran = tracer.cache()
    assert torch.equal(skipped["blocks.1"].output[0], skipped["blocks.0"].output[0])
    with pytest.raises(KeyError, match=r"blocks\.1\.mix is not in this cache: it does not run: blocks\.1 around it is"):
        skipped["blocks.1.mix"]
    expected = _net().get_submodule("blocks.1.mix")(ran["blocks.0"].output[0])
    assert torch.equal(ran["blocks.1.mix"].output, expected)


def test_a_skip_for_all_holds_in_an_invoke() -> None:
    model = _model()
    with model.trace() as tracer:
        with tracer.invoke(_x(1)):
            pass
        with tracer.invoke():
            model.blocks[1].skip((model.blocks[1].input, None))
        with tracer.invoke(), pytest.raises(fxsight.NotExecuted, match=r"blocks\.1 around it is skipped"):
            model.blocks[1].mix.output  # noqa: B018


def test_a_forward_that_is_stopped() -> None:
    model = _model()
    with model.trace(_x()) as tracer:
        kept = tracer.cache(include_inputs=True)
        model.blocks[1].mix.output.stop()
    assert list(kept) == ["model", "model.blocks.0", "model.blocks.0.mix", "model.blocks.0.output", "model.blocks.1",
                          "model.blocks.1.mix"]  # fmt: skip
    assert torch.equal(kept["model"].input, _x())
    with pytest.raises(AttributeError, match=r"^model:output comes later than blocks\.1\.mix:output, where the f"):
        kept.model.output  # noqa: B018
    with pytest.raises(KeyError, match=r"^cell is not in this cache: it comes later than blocks\.1\.mix:output, where"):
        kept["cell"]
    assert "linear" in str(tracer.program) and str(tracer.program).count("aten.linear") == 2


def test_a_block_that_is_stopped() -> None:
    with _model().trace(_x()) as tracer:
        kept = tracer.cache()
        tracer.stop()
    assert len(kept) == 13


def test_in_a_branch() -> None:
    with _model().trace(_x()) as tracer:
        with tracer.cond(False):
            never = tracer.cache()
        with tracer.cond(True):
            kept = tracer.cache()
    assert len(kept) == 13
    with pytest.raises(fxsight.TraceError, match=r"no values: it belongs to a branch whose condition was false$"):
        never["cell"]


def test_after_a_number() -> None:
    model = _model()
    with model.trace(_x()) as tracer:
        if model.cell.output.sum() > -1000:
            model.blocks[0].mix.output[:, 0] = 0
        kept = tracer.cache()
    assert (kept["blocks.0.mix"].output[:, 0] == 0).all() and len(kept) == 13


def test_in_a_scan() -> None:
    with _model().scan(_x()) as tracer:
        kept = tracer.cache(include_inputs=True)
    assert kept["blocks.0"].output[0].device.type == "meta" and kept["cell"][2].input.shape == (2, 6)


def test_in_sessions() -> None:
    model = _model()
    with model.session() as session:
        with model.trace(_x()) as tracer:
            first = tracer.cache()
            hidden = model.blocks[0].output[0]
        with pytest.raises(fxsight.TraceError, match="in a session, when that ends"):
            first["cell"]
        with model.trace(_x()) as tracer:
            model.blocks[1].output = (hidden, None)
            second = tracer.cache(["blocks.1"])
    _check(first, _hooked(_net(), _x()))
    assert torch.equal(second["blocks.1"].output[0], first["blocks.0"].output[0])
    found = []
    with model.session() as session:
        for rows in (1, 2):
            with model.trace(_x(rows)) as tracer:
                found.append(tracer.cache())
        with session.iter([_x(2), _x(3)]) as item, model.trace(item) as tracer:
            last = tracer.cache()
    for rows, kept in ((1, found[0]), (2, found[1]), (3, last)):
        _check(kept, _hooked(_net(), _x(rows)))


def test_inductor() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with fxsight.Model(net, cache=False).trace(torch.ones(2, 3), backend="inductor") as tracer:
        kept = tracer.cache()
    for key, ((_, output),) in _hooked(net, torch.ones(2, 3)).items():
        assert torch.allclose(kept[key].output, output[0], rtol=1e-4, atol=1e-4)


def test_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with _model().trace(_x()) as tracer:
            tracer.cache(dtype=torch.float16)
