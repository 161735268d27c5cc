"""Random programs with edits in the forward and in the backward pass, on five architectures: hooks' bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache, partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from tests.test_gradients_models import Pixels, _bert, _first, _gpt2, _ids, _llama, _mamba

Edit = Callable[[Any], Any]
QUICK, LONG, PIECES = 2, 200, 4  # programs of each architecture
FORWARD: Mapping[str, Edit] = {
    "none": lambda h: h,
    "scaled": lambda h: h * 0.7,
    "shifted": lambda h: h + 0.25,
    "squashed": lambda h: h.tanh() + h,
    "half": lambda h: torch.where(h > 0, h, h * 0.1),
    "mixed": lambda h: h + h.mean(-1, keepdim=True),
    "flipped": lambda h: h + 0.1 * h.flip(0),
}
BACKWARD: Mapping[str, Edit] = {
    "none": lambda g: g,
    "halved": lambda g: g * 0.5,
    "clamped": lambda g: g.clamp(-0.01, 0.01),
    "signs": lambda g: g.sign(),
    "centred": lambda g: g - g.mean(-1, keepdim=True),
    "normed": lambda g: g / (g.norm() + 1e-3),
}
LOSSES: Mapping[str, Edit] = {
    "squares": lambda out: out.pow(2).sum(),
    "last": lambda out: out[:, -1].pow(2).sum(),
    "difference": lambda out: (out[:, -1, ..., 1] - out[:, -1, ..., 2]).mean(),
    "surprise": lambda out: -out.log_softmax(-1)[:, -1].mean(),
}


class _Image(nn.Module):
    """A net of pixels whose result has rows, as logits have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pixels()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out[:, None]


def _pixels() -> tuple[nn.Module, str]:
    return _Image(), "net"


MAKES = {"gpt2": _gpt2, "llama": _llama, "bert": _bert, "mamba": _mamba, "pixels": _pixels}


@cache
def _made(name: str, frozen: bool) -> tuple[Any, Any, list[str]]:
    torch.manual_seed(0)
    net, blocks = MAKES[name]()
    net.eval().requires_grad_(not frozen)
    inside = [f"{blocks}.0", f"{blocks}.1"]
    if name == "pixels":
        inside = ["net.c1", "net.bn", "net.c2"]
    elif name != "mamba":
        kinds = (nn.LayerNorm, nn.Linear, type(net.get_submodule(inside[0])))
        inside += [n for n, m in net.named_modules() if n.startswith(inside[0] + ".") and isinstance(m, kinds)]
    return net, fxsight.Model(net, cache=False), inside


def _out(result: Any) -> Any:
    return getattr(result, "logits", result)


def _with_hooks(net: Any, x: Tensor, chosen: Mapping[str, tuple[str, str]], loss: str) -> list[Tensor]:
    found: dict[str, Tensor] = {}

    def arrive(name: str, edit: Edit, gradient: Tensor) -> Tensor:
        found[name] = edit(gradient)
        return found[name]

    def change(name: str, forward: Edit, backward: Edit, _module: Any, _args: Any, output: Any) -> Any:
        value = forward(_first(output))
        value = value if value.requires_grad else value.detach().requires_grad_()
        if value.is_leaf and name.startswith("net."):
            value = value.clone()  # the activation changes it in place
        value.register_hook(partial(arrive, name, backward))
        return (value, *output[1:]) if isinstance(output, tuple) else value

    with ExitStack() as stack:
        for name, (forward, backward) in chosen.items():
            hook = partial(change, name, FORWARD[forward], BACKWARD[backward])
            stack.callback(net.get_submodule(name).register_forward_hook(hook).remove)
        LOSSES[loss](_out(net(x))).backward()
    return [found[name] for name in chosen]


def _with_fxsight(model: Any, x: Tensor, chosen: Mapping[str, tuple[str, str]], loss: str) -> list[Tensor]:
    with model.trace(x):
        values: list[Any] = []
        for name, (forward, backward) in chosen.items():
            module = _at(model, name)
            value = _first(module.output)
            if forward != "none":
                value = FORWARD[forward](value)
                module.output = (value, *module.output[1:]) if isinstance(module.output, tuple) else value
            if backward != "none":
                value.grad = BACKWARD[backward](value.grad)
            values.append(value)
        LOSSES[loss](_out(model.output)).backward()
        saved = [value.grad.save() for value in values]
    return list(saved)


def _at(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else model[part] if part == "output" else getattr(model, part)
    return model


def _learned(net: nn.Module) -> list[Tensor]:
    found = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    return found


def check(name: str, first: int, count: int) -> None:
    """Compare programs beginning at one seed."""
    for seed in range(first, first + count):
        random = Random(f"{name} {seed}")
        frozen = random.random() < 0.6
        net, model, inside = _made(name, frozen)
        x = torch.randn(2, 1, 6, 6) if name == "pixels" else _ids(*random.choice([(3, 7), (2, 5)]))
        places = sorted(random.sample(range(len(inside)), random.randint(1, min(3, len(inside)))))
        order = {n: number for number, (n, _) in enumerate(net.named_modules())}
        ends = {n: max(order[m] for m in order if f"{m}.".startswith(f"{n}.")) for n in inside}
        # As hooks run: what a module returns may be what its last part returns, and is edited after that.
        names = sorted((inside[i] for i in places), key=lambda n: (ends[n], -order[n]))
        chosen = {n: (random.choice(list(FORWARD)), random.choice(list(BACKWARD))) for n in names}
        loss = random.choice(list(LOSSES))
        expected, weights = _with_hooks(net, x, chosen, loss), _learned(net)
        try:
            found, own = _with_fxsight(model, x, chosen, loss), _learned(net)
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed} fails: {error!r}: {chosen}, {loss}, {frozen}") from error
        for a, b in zip([*found, *own], [*expected, *weights], strict=True):
            assert torch.equal(a, b), f"{name}, seed {seed} differs: {chosen}, {loss}, frozen={frozen}"


@pytest.mark.parametrize("name", MAKES)
def test_random_backward_passes(name: str) -> None:
    check(name, 0, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("name", MAKES)
def test_a_thousand_random_backward_passes(name: str, piece: int) -> None:
    check(name, QUICK + piece * (LONG // PIECES), LONG // PIECES)
