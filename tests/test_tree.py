"""Structured values: leaves and a shape, and back; the shape as JSON."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from fxsight.tree import LEAF, Tree, flatten, leaves_of, map_leaves


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Boxes:
    corners: torch.Tensor
    label: str
    more: Any = None


@dataclass
class Options:
    """A dataclass without tensors is one leaf."""

    depth: int = 3


_SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3))
_NESTED = st.recursive(
    _SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 9)), inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


@given(_NESTED)
def test_build_is_the_inverse_of_flatten(value: Any) -> None:
    leaves, tree = flatten(value)
    built = tree.build(leaves)
    assert built == value and type(built) is type(value)
    assert tree.size == len(leaves) == len(list(tree.paths()))


@given(_NESTED)
def test_paths_lead_to_the_leaves(value: Any) -> None:
    leaves, tree = flatten(value)
    for leaf, path in zip(leaves, tree.paths(), strict=True):
        found = value
        for key in path:
            found = found[key]
        assert found is leaf


@given(_NESTED)
def test_json_round_trip(value: Any) -> None:
    tree = flatten(value)[1]
    assert Tree.from_json(json.loads(json.dumps(tree.to_json()))) == tree


@given(_NESTED, _NESTED)
def test_equal_structures_have_equal_trees(left: Any, right: Any) -> None:
    same = flatten(left)[1] == flatten(right)[1]
    assert same == (flatten(map_leaves(lambda _: 0, left))[1] == flatten(map_leaves(lambda _: 1, right))[1])


def test_a_leaf_is_its_own_structure() -> None:
    tensor = torch.zeros(2)
    assert flatten(tensor) == ([tensor], LEAF)
    assert LEAF.build([tensor]) is tensor
    options = Options()
    assert flatten(options) == ([options], LEAF)


def test_dataclasses_with_tensors() -> None:
    boxes = Boxes(torch.arange(3), "cat", (torch.zeros(1), None))
    leaves, tree = flatten(boxes)
    assert (tree.kind, tree.keys, tree.size) == ("fields", ("corners", "label", "more"), 4)
    built = tree.build(leaves)
    assert type(built) is Boxes and built.corners is boxes.corners and built.more[0] is boxes.more[0]


def test_model_outputs() -> None:
    out = CausalLMOutputWithPast(logits=torch.zeros(1, 2), hidden_states=(torch.ones(1), torch.ones(2)))
    leaves, tree = flatten(out)
    assert (tree.kind, tree.keys, len(leaves)) == ("fields", ("logits", "hidden_states"), 3)
    built = tree.build(leaves)
    assert type(built) is CausalLMOutputWithPast
    assert built.logits is out.logits and built.hidden_states[1] is leaves[2] and built.loss is None


def test_caches() -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.full((1, 2, 3, 4), 1.0), torch.full((1, 2, 3, 4), 2.0), layer)
    leaves, tree = flatten(BaseModelOutputWithPast(last_hidden_state=torch.zeros(1), past_key_values=cache))
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 5
    assert Tree.from_json(json.loads(json.dumps(tree.to_json()))) == tree
    built = tree.build(leaves).past_key_values
    assert type(built) is DynamicCache and built.get_seq_length() == 3
    assert torch.equal(built.layers[1].values, cache.layers[1].values)


@pytest.mark.parametrize("value", [(), [], {}, ((), [{}]), Pair((), [])])
def test_empty_containers_are_not_leaves(value: Any) -> None:
    leaves, tree = flatten(value)
    assert leaves == [] and tree.size == 0 and tree.build([]) == value


def test_ordered_dicts_keep_their_order() -> None:
    value = OrderedDict([("b", 1), ("a", 2)])
    leaves, tree = flatten(value)
    assert leaves == [1, 2] and list(tree.build(leaves)) == ["b", "a"]


def test_a_subclass_of_list_is_a_leaf() -> None:
    class Special(list[int]):
        """Whoever makes such a list may give it a meaning that a plain one has not."""

    value = Special([1])
    assert leaves_of([value, 2]) == [value, 2]


def test_map_leaves() -> None:
    assert map_leaves(lambda x: -x, {"a": (1, [2]), "b": Pair(3, 4)}) == {"a": (-1, [-2]), "b": Pair(-3, -4)}
