"""Reading the leaves of a call by its shape, and putting new tensors into its caches."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from fxsight.access import Access
from fxsight.tree import flatten

Pair = namedtuple("Pair", ["a", "b"])


def _cache(layers: int = 2) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), layer)
    return cache


CALLS: list[Any] = [
    ((), {}),
    ((torch.zeros(2),), {}),
    ((torch.zeros(2), None), {"past_key_values": _cache(), "use_cache": True, "logits_to_keep": 1}),
    (([torch.zeros(1), [torch.ones(1)]], {"x": {"y": torch.zeros(1)}}), {"name": "it's", "scale": 0.5}),
    ((Pair(torch.zeros(1), 2), BaseModelOutput(last_hidden_state=torch.zeros(1))), {"past": (_cache(1), _cache(2))}),
    ((torch.nn.Parameter(torch.zeros(1)), torch.float16), {}),
]


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_the_leaves_are_those_of_flatten(call: Any) -> None:
    leaves, tree = flatten(call)
    found = Access(tree)(call)
    assert found is not None
    assert len(found) == len(leaves)
    assert all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(found, leaves, strict=True))


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_a_call_of_another_shape_is_none_of_it(number: int) -> None:
    access = Access(flatten(CALLS[number])[1])
    others = [call for call in CALLS if flatten(call)[1] != access.tree]
    assert len(others) == len(CALLS) - 1 and all(access(call) is None for call in others)
    assert access(None) is None and access([*CALLS[number]]) is None


def test_keys_and_classes_are_looked_at() -> None:
    access = Access(flatten(((), {"a": 1, "b": 2}))[1])
    assert access(((), {"a": 3, "b": 4})) == [3, 4]
    assert access(((), {"b": 3, "a": 4})) is None
    assert access(((), {"a": 3, "b": [4]})) is None
    cached = Access(flatten(((_cache(),), {}))[1])
    assert cached(((_cache(),), {})) is not None
    assert cached(((_cache(3),), {})) is None
    other = _cache()
    other.layers[1].keys = [other.layers[1].keys]
    assert cached(((other,), {})) is None
    other = _cache()
    other.layers[0].dtype = torch.float16
    assert cached(((other,), {})) is None
