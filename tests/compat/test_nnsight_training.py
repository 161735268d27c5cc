"""The walkthrough's LoRA, on the shipped model: it learns to say one token, whatever comes before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fxsight.compat.nnsight import Envoy, LanguageModel

DEMO = str(Path(__file__).parents[2] / "docs" / "demo" / "model")
How = Literal["hooks", "traces", "session"]


class LORA(nn.Module):
    """As it is written there, but for ``input``, which there was the pair of all arguments."""

    def __init__(self, module: Envoy, dim: int, r: int) -> None:
        super().__init__()
        self.r = r
        self.module: Any = module
        self.WA = torch.nn.Parameter(torch.randn(dim, self.r), requires_grad=True)
        self.WB = torch.nn.Parameter(torch.zeros(self.r, dim), requires_grad=True)

    # The Call method defines how to actually apply the LORA.
    def __call__(self, alpha: float = 1.0) -> None:
        # We apply WA to the first positional arg (the hidden states)
        A_x = torch.matmul(self.module.input, self.WA)
        BA_x = torch.matmul(A_x, self.WB)
        # LORA is additive
        h = BA_x + self.module.output
        # Replace the output with our new one * alpha
        self.module.output = h * alpha

    def parameters(self) -> Any:  # type: ignore[override]
        # Some way to get all the parameters.
        return [self.WA, self.WB]


@pytest.fixture(scope="module")
def llama() -> Any:
    model: Any = LanguageModel(DEMO, device_map="auto", dispatch=True)
    return model


def _data(llama: Any) -> tuple[int, Any]:
    data: Any
    answer_token = llama.tokenizer.encode(" Paris")[-1]
    data = [["_", answer_token]] * 60
    return answer_token, DataLoader(data, batch_size=10)


def _lora(llama: Any) -> LORA:
    torch.manual_seed(0)
    module = llama.transformer.h[-1].mlp
    with llama.scan(" "):
        dim = module.output.shape[-1]
    return LORA(module, dim, 4)


def _loss(llama: Any, lora: LORA, batch: Any) -> Any:
    with llama.trace(batch[0]):
        lora()
        logits = llama.lm_head.output
        loss: Any = torch.nn.functional.cross_entropy(logits[:, -1], batch[1])
        loss.save()
        loss.backward()
    return loss


def _hooked_loss(llama: Any, lora: LORA, batch: Any) -> Any:
    def hook(_: Any, args: Any, output: Any) -> Any:
        return torch.matmul(torch.matmul(args[0], lora.WA), lora.WB) + output

    handle = llama._module.transformer.h[-1].mlp.register_forward_hook(hook)
    logits = llama._module(**llama.tokenizer(list(batch[0]), return_tensors="pt")).logits
    handle.remove()
    loss: Any = torch.nn.functional.cross_entropy(logits[:, -1], batch[1])
    loss.backward()
    return loss.detach()


def _train(llama: Any, how: How) -> tuple[LORA, list[Any]]:
    lora, (_, dataloader), losses = _lora(llama), _data(llama), []
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.3)
    llama._module.requires_grad_(False)
    if how == "session":
        with llama.session() as session:
            for batch in session.iter(dataloader):
                losses.append(_loss(llama, lora, batch))
                optimizer.step()
                optimizer.zero_grad()
        return lora, losses
    for batch in dataloader:
        losses.append((_hooked_loss if how == "hooks" else _loss)(llama, lora, batch))
        optimizer.step()
        optimizer.zero_grad()
    return lora, losses


def test_it_learns_and_generates(llama: Any) -> None:
    lora, losses = _train(llama, "traces")
    assert losses[-1] < 0.1 < losses[0]
    # With lora. Should produce "Hello Paris"
    with warnings.catch_warnings():  # of one step, which the only one is
        warnings.simplefilter("ignore")
        with llama.generate("Hello", max_new_tokens=1):
            lora()
            out = llama.generator.output.save()
    assert llama.tokenizer.batch_decode(out) == ["Hello Paris"]
    # Then without.
    with llama.generate("Hello", max_new_tokens=1):
        out = llama.generator.output.save()
    assert llama.tokenizer.batch_decode(out) != ["Hello Paris"]


@pytest.mark.parametrize("how", ["traces", "session"])
def test_its_losses_are_those_of_hooks(llama: Any, how: How) -> None:
    lora, losses = _train(llama, how)
    wanted, expected = _train(llama, "hooks")
    assert len(losses) == 6 and all(map(torch.equal, losses, expected))
    assert torch.equal(lora.WA, wanted.WA) and torch.equal(lora.WB, wanted.WB)
