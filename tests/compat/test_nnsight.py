"""The programs of nnsight's documents as they are written there, on ``fxsight.compat.nnsight``; only models differ."""

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
import fxsight.compat.nnsight as nnsight
from fxsight.compat.nnsight import CONFIG, LanguageModel, NNsight
from tests.oracle import Edit, Read, run

DEMO = Path(__file__).parents[2] / "docs" / "demo" / "model"
prompt = "The Eiffel Tower is in the city of"

input_size = 5
hidden_dims = 10
output_size = 2

_ = torch.manual_seed(0)
net = nn.Sequential(
    OrderedDict(
        [
            ("layer1", torch.nn.Linear(input_size, hidden_dims)),
            ("layer2", torch.nn.Linear(hidden_dims, output_size)),
        ]
    )
).requires_grad_(False)
input = torch.rand((1, input_size))
layer1: Tensor = net[0](input)
layer2: Tensor = net(input)


@cache
def _tiny_model() -> Any:
    return NNsight(net, cache=False)


@cache
def _gpt2() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    module = GPT2LMHeadModel.from_pretrained(DEMO).eval().requires_grad_(False)
    return LanguageModel(module, tokenizer=tokenizer, cache=False)


class OldBlock(nn.Module):
    """A block as language models had them: it returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden + torch.tanh(self.mlp(hidden)), None


class OldModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(1024, 8)
        self.layers = nn.ModuleList([OldBlock() for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed_tokens(ids)
        for layer in self.layers:
            hidden, _ = layer(hidden.cumsum(1))
        return hidden


class OldLlama(nn.Module):
    """A tiny language model whose tree has Llama's names."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = OldModel(), nn.Linear(8, 1024)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.lm_head(self.model(input_ids))}


@cache
def _llama() -> Any:
    torch.manual_seed(0)
    return LanguageModel(OldLlama().eval(), tokenizer=AutoTokenizer.from_pretrained(DEMO), cache=False)


# ----------------------------------------------------------------------------------------------- 001, tiny net


def test_the_model_prints_as_its_module() -> None:
    assert repr(_tiny_model()) == repr(net)


def test_t1() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input) as tracer:
        pass
    assert tracer.program(input) == ()
    assert torch.equal(tiny_model.trace(input, trace=False), layer2)


def test_t2() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input) as tracer:  # noqa: F841
        output = tiny_model.output
    with pytest.raises(ValueError, match=r"^Accessing value before it's been set\."):
        print(output.value)


def test_t3(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input) as tracer:  # noqa: F841
        output = tiny_model.output.save()
    print(output.value)
    assert torch.equal(output, layer2)
    assert capsys.readouterr().out == f"{layer2}\n"


def test_t4() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input):
        l2_input = tiny_model.layer2.input.save()
    assert torch.equal(l2_input.value, layer1)


def test_t5(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input) as tracer:
        tracer.log("Layer 1 - out: ", tiny_model.layer1.output)
    assert capsys.readouterr().out == f"Layer 1 - out:  {layer1}\n"


def test_t6() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input):
        # Note we don't need to call .save() on the output,
        # as we're only using its value within the tracing context.
        l1_output = tiny_model.layer1.output

        # We do need to save the argmax tensor however,
        # as we're using it outside the tracing context.
        l1_amax = torch.argmax(l1_output, dim=1).save()  # type: ignore[attr-defined]
    assert torch.equal(l1_amax[0], layer1.argmax())


def test_t7() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input):
        value = (tiny_model.layer1.output.sum() + tiny_model.layer2.output.sum()).save()
    assert torch.equal(value, layer1.sum() + layer2.sum())


def test_t8() -> None:
    # Take a tensor and return the sum of its elements
    def tensor_sum(tensor: Any) -> Any:
        flat = tensor.flatten()
        total = 0
        for element in flat:
            total += element.item()

        return torch.tensor(total)

    tiny_model = _tiny_model()
    with tiny_model.trace(input) as tracer:  # noqa: F841
        # Specify the function name and its arguments (in a coma-separated form) to add to the intervention graph
        custom_sum = nnsight.apply(tensor_sum, tiny_model.layer1.output).save()
        sum = tiny_model.layer1.output.sum()
        sum.save()
    assert torch.equal(custom_sum, tensor_sum(layer1)) and torch.equal(sum, layer1.sum())


def test_t9() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input):
        # Save the output before the edit to compare.
        # Notice we apply .clone() before saving as the setting operation is in-place.
        l1_output_before = tiny_model.layer1.output.clone().save()

        # Access the 0th index of the hidden state dimension and set it to 0.
        tiny_model.layer1.output[:, 0] = 0

        # Save the output after to see our edit.
        l1_output_after = tiny_model.layer1.output.save()
    expected = layer1.clone()
    expected[:, 0] = 0
    assert torch.equal(l1_output_before, layer1) and torch.equal(l1_output_after, expected)


@pytest.mark.parametrize("flags", [{}, {"scan": True, "validate": True}])
def test_t10_t11(flags: dict[str, bool]) -> None:
    tiny_model = _tiny_model()
    with (
        pytest.raises(IndexError, match=r"^index 10 is out of bounds for dimension 1 with size 10$") as caught,
        tiny_model.trace(input, **flags),
    ):
        l1_output_before = tiny_model.layer1.output.clone().save()
        # the error is happening here
        tiny_model.layer1.output[:, hidden_dims] = 0
        tiny_model.layer1.output.save()
    (statement,) = caught.traceback[0].statement.lines
    assert statement.strip() == "tiny_model.layer1.output[:, hidden_dims] = 0"
    with pytest.raises(ValueError, match="Accessing value before it's been set"):
        print("Before:", l1_output_before)


def test_t12(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input):
        l1_output_before = tiny_model.layer1.output.clone().save()

        print(f"Layer 1 output shape: {tiny_model.layer1.output.shape}")

        # Access the last index of the hidden state dimension and set it to 0.
        tiny_model.layer1.output[:, hidden_dims - 1] = 0

        l1_output_after = tiny_model.layer1.output.save()
    assert capsys.readouterr().out == "Layer 1 output shape: torch.Size([1, 10])\n"
    expected = layer1.clone()
    expected[:, -1] = 0
    assert torch.equal(l1_output_before, layer1) and torch.equal(l1_output_after, expected)


def test_t13() -> None:
    tiny_model = _tiny_model()
    torch.manual_seed(3)
    with tiny_model.trace(input):
        l1_output_before = tiny_model.layer1.output.clone().save()

        # Create random noise with variance of .001
        noise = (0.001**0.5) * torch.randn(l1_output_before.shape)

        # Add to original value and replace.
        tiny_model.layer1.output = l1_output_before + noise
        l1_output_after = tiny_model.layer1.output.save()
    torch.manual_seed(3)
    assert torch.equal(l1_output_before, layer1)
    assert torch.equal(l1_output_after, layer1 + (0.001**0.5) * torch.randn(1, hidden_dims))


def test_t14(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model = _tiny_model()
    with tiny_model.scan(input):
        dim = tiny_model.layer1.output.shape[-1]
    print(dim)
    assert capsys.readouterr().out == "10\n"


def test_t17() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input) as tracer:
        l1_out = tiny_model.layer1.output.save()
        tiny_model.layer1.output.stop()
    # get the output of the first layer and stop tracing
    assert torch.equal(l1_out, layer1)
    assert str(tracer.program).count("aten.linear") == 1


def test_t18() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input):
        l2_out = tiny_model.layer2.output.save()
        tiny_model.layer1.output.stop()
    with pytest.raises(ValueError, match=r"Accessing value before it's been set.*where the forward is stopped"):
        print("L2 - Output: ", l2_out)


@pytest.mark.parametrize("seed", range(4))
def test_t19(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model = _tiny_model()
    torch.manual_seed(seed)
    with tiny_model.trace(input) as tracer:
        rand_int = torch.randint(low=-10, high=10, size=(1,))

        with tracer.cond(rand_int % 2 == 0):
            tracer.log("Random Integer ", rand_int, " is Even")

        with tracer.cond(rand_int % 2 == 1):
            tracer.log("Random Integer ", rand_int, " is Odd")
    torch.manual_seed(seed)
    number = torch.randint(low=-10, high=10, size=(1,))
    assert capsys.readouterr().out == f"Random Integer  {number}  is {'Odd' if number % 2 else 'Even'}\n"


def test_t20(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input) as tracer:
        non_rand_int = 8

        with tracer.cond(non_rand_int > 0), tracer.cond(non_rand_int % 2 == 0):
            tracer.log("Rand Int ", non_rand_int, " is Positive and Even")
        with tracer.cond(non_rand_int < 0), tracer.cond(non_rand_int % 2 == 0):
            tracer.log("Rand Int ", non_rand_int, " is Negative and Even")
    assert capsys.readouterr().out == "Rand Int  8  is Positive and Even\n"


# ---------------------------------------------------------------------------------------------- 004, the forum

n_layers = 4


def _tokens() -> dict[str, Tensor]:
    return dict(_gpt2().tokenizer(prompt, return_tensors="pt"))


def _hooked(*steps: Edit | Read) -> tuple[Tensor, list[Tensor]]:
    out, reads = run(_gpt2()._module, (), _tokens(), steps)
    return out.logits, reads


def _in_order(op: Any, with_own: bool) -> Tensor:
    """What F4 and F5 mean, by hand: each MLP gives something of the inputs collected before (and here)."""
    collected: list[Tensor] = []
    handles = []
    for block in _gpt2()._module.transformer.h:
        handles.append(block.ln_2.register_forward_pre_hook(lambda module, args: collected.append(args[0].clone())))

        def patch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            value = op(collected if with_own else collected[:-1])
            return value if isinstance(value, Tensor) else torch.full_like(output, value)

        handles.append(block.mlp.register_forward_hook(patch))
    logits: Tensor = _gpt2()._module(**_tokens()).logits
    for handle in handles:
        handle.remove()
    return logits


def fancy_op(cache: Any) -> Any:
    return sum(0.1 * (n + 1) * value for n, value in enumerate(cache))


def test_f1() -> None:
    gpt2, batch = _gpt2(), prompt
    with gpt2.trace(batch) as tracer:  # noqa: F841
        gpt2.transformer.h[3].mlp.output = gpt2.transformer.h[1].mlp.output
        out = gpt2.output.logits.save()
    _, (earlier,) = _hooked(Read("transformer.h.1.mlp", "output"))
    assert torch.equal(out, _hooked(Edit("transformer.h.3.mlp", "output", "assign", lambda _: earlier))[0])


def test_f2() -> None:
    gpt2, batch = _gpt2(), prompt
    with pytest.raises(nnsight.OutOfOrderError) as caught, gpt2.trace(batch) as tracer:  # noqa: F841
        gpt2.transformer.h[1].mlp.output = gpt2.transformer.h[3].mlp.output
    assert "transformer.h.1.mlp:output -> transformer.h.3.mlp:output -> transformer.h.1.mlp:output" in str(caught.value)
    assert "model.session()" in str(caught.value)


def test_f3() -> None:
    gpt2, batch = _gpt2(), prompt
    with pytest.raises(nnsight.OutOfOrderError) as caught, gpt2.trace(batch) as tracer:  # noqa: F841
        mlp_ins: Any = []
        for l in range(n_layers):  # noqa: E741
            mlp_ins.append(gpt2.transformer.h[l].ln_2.input)  # cache activations
        mlp_ins = torch.stack(mlp_ins)
        mlp_outs = mlp_ins - mlp_ins.mean(0)  # calculate from the concatenated mlp_ins
        for l in range(n_layers):  # noqa: E741
            gpt2.transformer.h[l].mlp.output = mlp_outs[l]  # patch activations
    assert "transformer.h.0.mlp:output -> transformer.h.1.ln_2:input" in str(caught.value)


def test_f4() -> None:
    gpt2, input = _gpt2(), prompt
    with gpt2.trace(input):
        cache = []
        for l in range(n_layers):  # noqa: E741
            cache.append(gpt2.transformer.h[l].ln_2.input)
            new_actvs = fancy_op(cache)
            gpt2.transformer.h[l].mlp.output = new_actvs
        out = gpt2.output.logits.save()
    assert torch.equal(out, _in_order(fancy_op, with_own=True))


def test_f5() -> None:
    gpt2, input = _gpt2(), prompt
    with gpt2.trace(input):
        cache: Any = []
        for l in range(n_layers):  # noqa: E741
            cache.append(gpt2.transformer.h[l].ln_2.input)
        cache = torch.stack(cache).unbind(0)  # concat all values into one tensor and reverse it
        for l in range(n_layers):  # noqa: E741
            new_actvs = fancy_op(cache[:l])
            gpt2.transformer.h[l].mlp.output = new_actvs
        out = gpt2.output.logits.save()
    assert torch.equal(out, _in_order(fancy_op, with_own=False))


def test_f6() -> None:
    gpt2, input = _gpt2(), prompt
    with gpt2.session():
        with gpt2.trace(input):
            mlp_ins: Any = []
            for l in range(n_layers):  # noqa: E741
                mlp_ins.append(gpt2.transformer.h[l].ln_2.input)  # cache activations
            mlp_ins = torch.stack(mlp_ins)
            mlp_outs = mlp_ins - mlp_ins.mean(0)  # calculate from the concatenated mlp_ins

        with gpt2.trace(input):
            for l in range(n_layers):  # noqa: E741
                gpt2.transformer.h[l].mlp.output = mlp_outs[l]
            out = gpt2.output.logits.save()
    _, ins = _hooked(*(Read(f"transformer.h.{n}.ln_2", "input") for n in range(n_layers)))
    outs = torch.stack(ins) - torch.stack(ins).mean(0)
    edits = [Edit(f"transformer.h.{n}.mlp", "output", "assign", lambda _, n=n: outs[n]) for n in range(n_layers)]  # type: ignore[misc]
    assert torch.equal(out, _hooked(*edits)[0])


def test_f7() -> None:
    gpt2, input = _gpt2(), prompt
    with gpt2.trace(input):  # the forum writes gpt2(input), which nnsight has never taken
        for l in range(n_layers):  # noqa: E741
            gpt2.transformer.h[l].mlp.output = gpt2.transformer.h[l].ln_2.input
        out = gpt2.output.logits.save()
    assert torch.equal(out, _in_order(lambda collected: collected[-1], with_own=True))


# -------------------------------------------------------------------------------------------------- 000, source


def test_s1(capsys: pytest.CaptureFixture[str]) -> None:
    model = _gpt2()
    print(model.transformer.h[0].attn.source)
    text = capsys.readouterr().out
    for name in ("attention_interface_0", "split_1", "self_c_attn_1", "self_c_proj_0", "self_resid_dropout_0"):
        assert name in text


def test_s2() -> None:
    model = _gpt2()
    with model.trace(prompt):
        attention = model.transformer.h[0].attn.source.attention_interface_0.output.save()
    module, seen = model._module, []
    handle = module.transformer.h[0].attn.c_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    module(**_tokens())
    handle.remove()
    assert type(attention) is not list and len(attention) == 2 and attention[1] is None
    assert attention[0].shape == (1, _tokens()["input_ids"].shape[1], 4, 16)
    assert torch.equal(attention[0].flatten(2), seen[0])


def test_s3() -> None:
    model = _gpt2()
    with model.trace(prompt):
        attention_0 = model.transformer.h[0].attn.source.attention_interface_0.output.save()
        # change attention of layer 7 to that of layer 0
        model.transformer.h[3].attn.source.attention_interface_0.output = attention_0
        out = model.output.logits.save()
    edit = Edit("transformer.h.3.attn.c_proj", "input", "assign", lambda _: attention_0[0].flatten(2))
    assert torch.equal(out, _hooked(edit)[0])


def test_s4(capsys: pytest.CaptureFixture[str]) -> None:
    model = _gpt2()
    with model.trace(prompt):
        print(model.transformer.h[0].attn.source.attention_interface_0.source)
    assert "torch_nn_functional_scaled_dot_product_attention_0" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- 001, what it does remotely


def test_r1_there_is_no_service() -> None:
    CONFIG.set_default_api_key("YOUR_API_KEY")
    assert CONFIG.API.APIKEY == "YOUR_API_KEY"
    CONFIG.set_default_api_key("")
    llama, told = _llama(), "^remote=True: there is no service to run on yet; leave it out, and the block runs here$"
    with pytest.raises(fxsight.TraceError, match=told), llama.trace(prompt, remote=True):
        pass
    with pytest.raises(fxsight.TraceError, match=told), llama.session(remote=True):
        pass
    with pytest.raises(fxsight.TraceError, match=r"^remote='local': there"), nnsight.session(remote="local"):
        pass
    with llama.trace(prompt, remote=False, blocking=True) as runner:  # noqa: F841
        hidden_states = llama.model.layers[-1].output.save()
        output = llama.output.save()
    tokens = llama.tokenizer(prompt, return_tensors="pt")
    assert torch.equal(output["logits"], llama._module(**tokens)["logits"])
    assert isinstance(hidden_states, tuple) and hidden_states[1] is None


def test_r2() -> None:
    llama = _llama()
    with llama.session() as session:  # noqa: F841
        with llama.trace("The Eiffel Tower is in the city of") as t1:  # noqa: F841
            # capture the hidden state from the last layer at the last token
            hs_79 = llama.model.layers[2].output[0][:, -1, :]  # no .save()
            t1_tokens_out = llama.lm_head.output.argmax(dim=-1).save()

        with llama.trace("Buckingham Palace is in the city of") as t2:  # noqa: F841
            llama.model.layers[1].output[0][:, -1, :] = hs_79[:]
            t2_tokens_out = llama.lm_head.output.argmax(dim=-1).save()
    first = dict(llama.tokenizer("The Eiffel Tower is in the city of", return_tensors="pt"))
    second = dict(llama.tokenizer("Buckingham Palace is in the city of", return_tensors="pt"))
    out, (hidden,) = run(llama._module, (), first, [Read("model.layers.2", "output")])
    assert torch.equal(t1_tokens_out, out["logits"].argmax(-1))

    def patch(live: Tensor) -> None:
        live[:, -1, :] = hidden[:, -1, :]

    out, _ = run(llama._module, (), second, [Edit("model.layers.1", "output", "inplace", patch)])
    assert torch.equal(t2_tokens_out, out["logits"].argmax(-1))


def test_r3(capsys: pytest.CaptureFixture[str]) -> None:
    llama = _llama()
    with llama.session() as session:
        session.log("-- Early Stop --")
        session.exit()
    assert capsys.readouterr().out == "-- Early Stop --\n"


def test_r4() -> None:
    llama = _llama()
    with llama.session() as session, session.iter([0, 1, 2]) as item:  # noqa: F841
        # define intervention body here ...

        with llama.trace("_"):
            # define interventions here ...
            pass

        with llama.trace("_"):
            # define interventions here ...
            pass


def test_r5(capsys: pytest.CaptureFixture[str]) -> None:
    llama = _llama()
    with llama.session() as session:
        li = nnsight.list()
        [li.append([num]) for num in range(0, 3)]  # adding [0], [1], [2] to the list
        li2 = nnsight.list().save()

        # You can create nested Iterator contexts
        with session.iter(li) as item, session.iter(item) as item_2:
            li2.append(item_2)
    print("\nList: ", li2)
    assert capsys.readouterr().out == "\nList:  [0, 1, 2]\n"


def test_r6(capsys: pytest.CaptureFixture[str]) -> None:
    llama = _llama()
    with llama.session() as session, session.iter([0, 1, 2, 3], return_context=True) as (item, iterator):
        iterator.log(item)

        with iterator.cond(item == 2):
            iterator.exit()
    assert capsys.readouterr().out == "0\n1\n2\n"


# -------------------------------------------------------------------------------------------- names and words


def test_names() -> None:
    for name in nnsight.__all__:
        assert hasattr(nnsight, name), name
    assert isinstance(_tiny_model(), fxsight.Model) and isinstance(_tiny_model().layer1, nnsight.Envoy)
    assert isinstance(_tiny_model(), nnsight.Envoy) and isinstance(_tiny_model().layer1.call(1), nnsight.Envoy)
    assert nnsight.__version__ == fxsight.__version__
    assert nnsight.list is fxsight.list and nnsight.save is fxsight.save and nnsight.CacheDict is fxsight.Cache
    assert issubclass(nnsight.OutOfOrderError, nnsight.NNsightException)
    with pytest.raises(nnsight.MissedProviderError), _tiny_model().trace(input):
        _tiny_model().layer1.call(1).output.save()


def test_config_holds_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = nnsight.Config()
    config.APP.REMOTE_LOGGING = False
    config.API.HOST = "example"
    config.set_default_app_debug(True)
    config.save()
    assert (config.APP.REMOTE_LOGGING, config.APP.DEBUG, config.API.HOST) == (False, True, "example")
    assert not list(tmp_path.iterdir())


def test_paths_begin_with_model() -> None:
    tiny_model = _tiny_model()
    assert [view.path for view in tiny_model.modules()] == ["model.layer1", "model.layer2", "model"]
    assert [path for path, _ in tiny_model.named_modules()] == ["model.layer1", "model.layer2", "model"]
    assert tiny_model.get("layer1") is tiny_model.layer1
    with tiny_model.trace(input) as tracer:
        found = tiny_model.get("layer1.output").save()
        kept = tracer.cache(modules=[tiny_model.layer1, "model.layer2"])
    assert torch.equal(found, layer1) and torch.equal(kept["model.layer1"].output, layer1)
    assert torch.equal(kept.model.layer2.output, layer2)


def test_values_under_their_other_names() -> None:
    tiny_model = _tiny_model()
    with tiny_model.trace(input):
        tiny_model.layer1.wait_for_output()
        before, inputs = tiny_model.layer1.nns_output.clone().save(), tiny_model.layer1.nns_inputs
        tiny_model.layer1.nns_output = before * 2
        tiny_model.layer2.nns_input = tiny_model.layer2.nns_input + 1
        after = tiny_model.nns_output.save()
        given = inputs[0][0].save()
        tiny_model.layer1.wait_for_input()
        tiny_model.layer1.nns_inputs = ((given,), {})
    assert torch.equal(before, layer1) and torch.equal(after, net[1](layer1 * 2 + 1)) and torch.equal(given, input)
    assert "nns_output" not in vars(net[0])


def test_several_models_in_one_session() -> None:
    tiny_model, llama = _tiny_model(), _llama()
    with nnsight.session():
        with tiny_model.trace(input):
            total = tiny_model.layer1.output.sum()
        with llama.trace(prompt):
            llama.model.layers[0].mlp.output[:] = total
            logits = llama.output["logits"].save()
    edit = Edit("model.layers.0.mlp", "output", "inplace", lambda live: live.fill_(layer1.sum()))
    tokens = dict(llama.tokenizer(prompt, return_tensors="pt"))
    assert torch.equal(logits, run(llama._module, (), tokens, [edit])[0]["logits"])


def test_a_language_model() -> None:
    gpt2 = _gpt2()
    with gpt2.scan(prompt):
        dim = gpt2.transformer.h[-1].mlp.output.shape[-1]
    assert dim == 64
    with warnings.catch_warnings(), gpt2.trace(prompt):
        warnings.simplefilter("ignore")
        # Access the last layer using h[-1] as it's a ModuleList
        # Access the first index of .output as that's where the hidden states are.
        gpt2.transformer.h[-1].mlp.output[0][:] = 0

        # Logits come out of model.lm_head and we apply argmax to get the predicted token ids.
        token_ids = gpt2.lm_head.output.argmax(dim=-1).save()
    assert gpt2.tokenizer.decode(token_ids[0][-1]) == " Delhi"
    with gpt2.trace(**_tokens()):
        token_ids = gpt2.lm_head.output.argmax(dim=-1).save()
    assert gpt2.tokenizer.decode(token_ids[0][-1]) == " Paris"


def test_a_language_model_is_loaded_by_name() -> None:
    model = LanguageModel(str(DEMO), cache=False)
    with model.trace("The Eiffel Tower is in the city of"):
        token_ids = model.lm_head.output.argmax(dim=-1).save()
    assert model.tokenizer.decode(token_ids[0][-1]) == " Paris" and model.lm_head.path == "model.lm_head"
    model = LanguageModel(net, cache=False)
    with pytest.raises(fxsight.InputError, match=r"a text needs a tokenizer, and this model has none: LanguageModel\("):
        model.trace("text")
    with pytest.raises(TypeError, match="device_map"):
        LanguageModel(net, device_map="auto")
