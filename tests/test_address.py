"""The grammar of addresses: printing and parsing are inverse, order is natural, errors show what cannot be read."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fxsight.address import PORTS, Address, Key, Step
from fxsight.errors import AddressError

_PART = st.text(st.characters(blacklist_categories=("Z", "C"), blacklist_characters="./:#[]"), min_size=1, max_size=8)
_MODULE = st.lists(_PART, max_size=4).map(".".join)
_NAME = st.from_regex(r"[^\W\d]\w*", fullmatch=True)
_STEP = st.builds(Step, _NAME, st.integers(0, 99))
_KEY: st.SearchStrategy[Key] = st.one_of(st.integers(-9, 99), st.text(max_size=6))


@st.composite
def _addresses(draw: st.DrawFn) -> Address:
    port = draw(st.sampled_from(("", *PORTS)))
    keys = tuple(draw(st.lists(_KEY, max_size=3))) if port else ()
    return Address(draw(_MODULE), draw(st.integers(0, 12)), tuple(draw(st.lists(_STEP, max_size=3))), port, keys)


@given(_addresses())
@example(Address(""))
@example(Address("", 0, (), "output"))
@example(Address("", 2, (), "input", (0, "a'b", -1)))
@example(Address("", 0, (), "output", ("]:['/",)))
@example(Address("h.0", 0, (), "output", ('it\'s "both"',)))
@example(Address("h.0", 0, (), "output", ('"',)))
def test_parse_is_the_inverse_of_str(address: Address) -> None:
    assert Address.parse(str(address)) == address


@given(st.text(max_size=24))
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    try:
        found = Address.parse(text)
    except AddressError:
        return
    assert Address.parse(str(found)) == found


@given(st.lists(_addresses(), max_size=6))
def test_order_is_total_and_the_same_from_any_start(addresses: list[Address]) -> None:
    backwards = addresses[::-1]
    assert sorted(addresses) == sorted(backwards)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":output",
        "transformer.h.3.mlp:output",
        "transformer.h.3.attn:output[0]",
        "cell#2:input",
        "h.3.attn/split_1:output",
        "h.3.attn/attention_interface_0/torch_nn_functional_scaled_dot_product_attention_0/softmax_0",
        "h.3/add#1:output[0]['logits'][-1]",
        "a-b.0:inputs[0][1]",
    ],
)
def test_addresses_print_as_they_are_written(text: str) -> None:
    assert str(Address.parse(text)) == text


def test_order_is_natural() -> None:
    written = [
        "h.10",
        "h.2:output",
        "h.2",
        "h.2#1",
        "h.2/b_0",
        "h.2/b_0#2",
        "h.2/b_0#10",
        "h.10.mlp",
        "g",
        "h.2.mlp",
        "",
    ]
    ordered = [
        "",
        "g",
        "h.2",
        "h.2:output",
        "h.2/b_0",
        "h.2/b_0#2",
        "h.2/b_0#10",
        "h.2#1",
        "h.2.mlp",
        "h.10",
        "h.10.mlp",
    ]
    assert [str(a) for a in sorted(map(Address.parse, written))] == ordered


def test_members_are_ordered_by_number() -> None:
    written = ["x:output[10]", "x:output[2]", "x:output"]
    assert [str(a) for a in sorted(map(Address.parse, written))] == ["x:output", "x:output[2]", "x:output[10]"]


def test_ways_around() -> None:
    value = Address.parse("h.3.attn#1/interface_0/softmax_0#2:output[0]")
    assert str(value.place) == "h.3.attn#1/interface_0/softmax_0#2"
    assert [str(value.parent), str(value.parent.parent)] == ["h.3.attn#1/interface_0", "h.3.attn#1"]
    assert str(value.parent.parent.parent) == "h.3"
    assert str(Address("h.0").step("a", 1).step("b").at("output", 0, "k")) == "h.0/a#1/b:output[0]['k']"


WRITE = "write for example 'h.3.mlp/self_act_0:output[0]'"


@pytest.mark.parametrize(
    "text, message",
    [
        ("h 3", f"not an address: 'h 3': cannot read 'h 3'; {WRITE}"),
        ("h..3", f"not an address: 'h..3': cannot read 'h..3'; {WRITE}"),
        ("h.3/", f"not an address: 'h.3/': cannot read ''; {WRITE}"),
        ("h.3/3x", f"not an address: 'h.3/3x': cannot read '3x'; {WRITE}"),
        ("h.3/a#b", f"not an address: 'h.3/a#b': cannot read 'a#b'; {WRITE}"),
        ("h.3:out", "not an address: 'h.3:out': after ':' comes one of output, input, inputs, not 'out'"),
        ("h.3:", "not an address: 'h.3:': after ':' comes one of output, input, inputs, not ''"),
        ("h.3:output[a]", f"not an address: 'h.3:output[a]': cannot read '[a]'; {WRITE}"),
        ("h.3:output[0]x", f"not an address: 'h.3:output[0]x': cannot read 'x'; {WRITE}"),
    ],
)
def test_errors_show_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(AddressError) as caught:
        Address.parse(text)
    assert str(caught.value) == message


def test_errors_of_the_constructor() -> None:
    with pytest.raises(AddressError) as caught:
        Address("h.0", port="out")
    assert str(caught.value) == "no port 'out': a value is one of output, input, inputs"
    with pytest.raises(AddressError) as caught:
        Address("h.0", keys=(0,))
    assert str(caught.value) == "keys need a port: write ':output[0]'"
