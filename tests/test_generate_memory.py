"""Memory of a generation: the caches and what is saved grow, and nothing else, as live bytes at each step show."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from fxsight import LanguageModel
from tests import small


class Live(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Counts the bytes of all new tensors that are there, whenever it is asked."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)
        storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in kinds and x.device.type == "cpu"]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.bytes.append(sum(held.values()))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.fixture
def only_new() -> Iterator[None]:
    """What is there already is not looked through at each step."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new")
def test_it_grows_by_the_cache_and_the_saves() -> None:
    module: Any = small.gpt2(n_embd=64, initializer_range=0.3, tie_word_embeddings=False)
    model: Any = LanguageModel(module)
    steps, ids = 12, torch.tensor([[5, 6, 7, 8]])
    options: dict[str, Any] = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    plain, mine, saving = Live(), Live(), Live()
    module.generate(ids, **options, stopping_criteria=[plain])
    vector = torch.ones(64)
    for live in (mine, saving):
        saved: list[Any] = []
        with model.generate(ids, **options, stopping_criteria=[live]) as tracer:
            for _ in tracer.all():
                h = model.transformer.h[0].output
                model.transformer.h[0].output = h + vector
                if live is saving:
                    saved.append(h[:, -1].clone().save())
        assert tracer.result.shape == (1, 4 + steps)
    cache = 2 * 2 * 64 * 4  # keys and values of two blocks, for one token

    def growth(live: Live) -> list[int]:
        return [b - a for a, b in zip(live.bytes[2:], live.bytes[3:], strict=False)]

    assert all(cache <= grown <= cache + 64 for grown in growth(plain))  # and the tokens
    assert growth(mine) == growth(plain)
    assert all(grown <= least + 64 * 4 for grown, least in zip(growth(saving), growth(plain), strict=True))
