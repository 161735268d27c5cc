"""Structures made by a mould are those that ``Tree.build`` makes, and tell when a member is no more what it was."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache, modeling_outputs
from transformers.utils.generic import ModelOutput

from fxsight.mould import Mould
from fxsight.tree import flatten


def _cache() -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer)
    return cache


@dataclasses.dataclass
class Pair:
    """A dataclass with a number of its own."""

    first: torch.Tensor
    second: torch.Tensor | None = None
    total: Any = 0

    def __post_init__(self) -> None:
        self.total = [self.first]


@dataclasses.dataclass
class Odd(ModelOutput):  # type: ignore[misc]
    """A model output that makes something of its members."""

    logits: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seen", [self.logits])


STRUCTURES: list[Any] = [
    (torch.ones(2), [torch.ones(3), {"a": torch.ones(1), "b": (torch.ones(2), 5, None)}]),
    modeling_outputs.CausalLMOutputWithPast(logits=torch.ones(2), past_key_values=_cache()),
    modeling_outputs.BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.ones(1), torch.ones(2))),
    torch.ones(3, 2).max(0),
    _cache(),
    Pair(torch.ones(2)),
]


def _members(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, int, float, str, type(None), torch.dtype, torch.device, type)):
        return value
    if isinstance(value, (tuple, list)):
        return (type(value), [_members(member) for member in value])
    items = _members(list(value.items())) if isinstance(value, dict) else None
    own = {name: _members(member) for name, member in getattr(value, "__dict__", {}).items()}
    return (type(value), own, items)


@pytest.mark.parametrize("value", STRUCTURES, ids=lambda value: type(value).__name__)
def test_as_built(value: Any) -> None:
    leaves, tree = flatten(value)
    made, filled = Mould(tree).fill(leaves)
    assert str(_members(made)) == str(_members(tree.build(leaves)))
    assert all(a is b or a == b for a, b in zip(flatten(made)[0], leaves, strict=True))
    assert flatten(made)[1] == tree
    assert filled.is_whole()


@pytest.mark.parametrize(
    "cls",
    [c for c in vars(modeling_outputs).values() if isinstance(c, type) and issubclass(c, ModelOutput)],
    ids=lambda cls: str(cls.__name__),
)
def test_every_output_of_transformers(cls: Any) -> None:
    if cls is ModelOutput:
        return
    names = [field.name for field in dataclasses.fields(cls)]
    for some in (names, names[:1], names[-1:], names[::2]):
        value = cls(**{name: torch.ones(2) for name in some})
        leaves, tree = flatten(value)
        made = Mould(tree).fill(leaves)[0]
        assert type(made) is cls
        assert list(vars(made)) == list(vars(value))
        assert all(vars(made)[name] is vars(value)[name] for name in vars(value))
        assert list(made.items()) == list(value.items())
        assert made.to_tuple() == value.to_tuple()


def test_a_class_that_makes_more_of_its_members_is_called() -> None:
    leaves, tree = flatten(Odd(logits=torch.ones(2)))
    made = Mould(tree).fill(leaves)[0]
    assert made.seen[0] is leaves[0]


def test_a_member_replaced_is_seen() -> None:
    leaves, tree = flatten(STRUCTURES[1])
    made, filled = Mould(tree).fill(leaves)
    assert filled.is_whole()
    before, made.logits = made.logits, torch.ones(2)
    assert not filled.is_whole()
    made.logits = before
    assert filled.is_whole()
    made.past_key_values.layers[1].keys = torch.ones(1)
    assert not filled.is_whole()
    made, filled = Mould(tree).fill(leaves)
    made.past_key_values.layers.pop()
    assert not filled.is_whole()
