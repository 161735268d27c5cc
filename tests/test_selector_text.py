"""Selectors as text: what is read, what is written, and what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxsight import Model
from fxsight.conditions import Selector
from fxsight.errors import SelectionError
from fxsight.glob import fits
from fxsight.selectors import calls, layers, of, path


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("class:GPT2Block", of("GPT2Block")),
        ("class:*Block and layer:4-7", of("*Block") & layers(range(4, 8))),
        ("path:transformer.h.*.mlp and not layer:0", path("transformer.h.*.mlp") & ~layers(0)),
        ("op:aten.softmax.*", calls("aten.softmax.*")),
        ("layer:0,4-7,9", layers(0, 4, 5, 6, 7, 9)),
        ("class:A or class:B and class:C", of("A") | of("B") & of("C")),
        ("(class:A or class:B) and class:C", (of("A") | of("B")) & of("C")),
        ("not class:A and class:B", ~of("A") & of("B")),
        ("not (class:A and class:B)", ~(of("A") & of("B"))),
        ("not not class:A", of("A")),
        ("class:A and (class:B and class:C)", of("A") & of("B") & of("C")),
        ("path:'a b' and path:\"c'd\"", path("a b") & path("c'd")),
        (" ( class:and )or(path:not) ", of("and") | path("not")),
        ("class:A\n  or class:B", of("A") | of("B")),
    ],
)
def test_read(text: str, same: Selector) -> None:
    assert Selector.parse(text) == same
    assert Selector.parse(str(same)) == same


def test_a_text_in_an_expression() -> None:
    assert of("A") & "layer:1 or layer:2" == of("A") & (layers(1) | layers(2))
    assert "class:A" | path("b") == of("A") | path("b")
    assert "class:A" & path("b") == of("A") & path("b")


def test_a_class_is_written_by_its_whole_name() -> None:
    assert str(of(nn.Linear)) == "class:torch.nn.modules.linear.Linear"
    model = Model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), cache=False)
    assert [view.path for view in model.select(str(of(nn.Linear)))] == ["0"]
    assert [view.path for view in model.select("class:torch.nn.**.Re*")] == ["1"]


@pytest.mark.parametrize(
    ("text", "at", "told"),
    [
        ("", 0, "here comes a condition, such as class:GPT2Block, .*, not nothing"),
        ("clas:A", 0, "no word 'clas': did you mean 'class'?"),
        ("zzz:A", 0, "no word 'zzz': words are class, path, layer, op"),
        ("class:A and", 11, "here comes a condition, .*, not nothing"),
        ("class:A adn path:b", 8, "here comes 'and', 'or' or the end, not 'adn'; did you mean 'and'?"),
        ("class:A AND path:b", 8, "did you mean 'and'?"),
        ("class:A & path:b", 8, "in a text, write 'and' for '&'"),
        ("class:A||path:b", 7, r"in a text, write 'or' for '\|\|'"),
        ("~class:A", 0, "in a text, write 'not' for '~'"),
        ("class:A, path:b", 9, "here comes 'and', 'or' or the end, not 'path:b'"),
        ("class: A", 0, "after 'class' come ':' and a pattern, without spaces"),
        ("class=A", 0, "after 'class' come ':' and a pattern"),
        ("h.0", 0, "here comes a condition, such as class:GPT2Block, path:h"),
        ("(class:A", 8, r"here comes '\)', 'and' or 'or', not nothing: '\(' of 0 is open"),
        ("class:A)", 7, r"here comes 'and', 'or' or the end, not '\)'"),
        ("path:'a", 0, "after 'path' come ':' and a pattern"),
        (r"path:'\x'", 0, "cannot be read as a text in quotes"),
        ("layer:a", 0, "layer:a: give numbers and ranges of blocks, such as 3, 4-7 or 0,4-7"),
        ("layer:7-4", 0, "layer:7-4: give numbers and ranges"),
        ("class:A and layer:0-9999999999999999999", 12, "give numbers and ranges"),
        ("(" * 60 + "class:A", 50, "more than 50 parentheses and nots within each other"),
        ("not " * 60 + "class:A", 200, "more than 50 parentheses"),
    ],
)
def test_wrong(text: str, at: int, told: str) -> None:
    with pytest.raises(SelectionError, match=told) as caught:
        Selector.parse(text)
    first, shown, mark = str(caught.value).split("\n")
    assert first.startswith(f"cannot read a selector at character {at}: ")
    assert text[at : at + 5] == shown[mark.index("^") :][:5].rstrip() or not shown[mark.index("^") :].strip()


def test_too_long() -> None:
    with pytest.raises(SelectionError, match="a selector is a text of at most 10000 characters, not 10001"):
        Selector.parse("a" * 10_001)
    assert isinstance(Selector.parse(" or ".join(["class:A"] * 900)), Selector)


def test_patterns() -> None:
    for pattern, name, does in [
        ("h.*.mlp", "h.11.mlp", True),
        ("h.*.mlp", "h.1.x.mlp", False),
        ("**.mlp", "h.1.x.mlp", True),
        ("**", "", True),
        ("h.?", "h.1", True),
        ("h?1", "h.1", False),
        ("*a**", "ba.c", True),
        ("a+(b)", "a+(b)", True),
        ("", "a", False),
    ]:
        assert fits(pattern, name) is does
    assert not fits("**a" * 300 + "b", "a" * 300)  # no time is lost on the way back


_patterns = st.text(min_size=1, max_size=8)
_conditions = st.one_of(
    _patterns.map(of),
    _patterns.map(path),
    _patterns.map(calls),
    st.lists(st.integers(0, 99_999), min_size=1).map(layers),
)
_selectors = st.recursive(
    _conditions,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda selector: ~selector),
    ),
    max_leaves=12,
)


@given(_selectors)
def test_written_and_read(selector: Selector) -> None:
    assert Selector.parse(str(selector)) == selector


_words = [
    "class",
    "path",
    "layer",
    "op",
    "and",
    "or",
    "not",
    ":",
    "(",
    ")",
    "'",
    '"',
    "\\",
    "*",
    "-",
    ",",
    "&",
    "~",
    " ",
    "7",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from([*_words, "class:A", "layer:1-2", "é"])).map(" ".join)))
def test_any_text(text: str) -> None:
    """A selector, which is written and read again, or a clear error."""
    try:
        found: Any = Selector.parse(text)
    except SelectionError as error:
        assert "cannot read a selector at character" in str(error)
    else:
        assert Selector.parse(str(found)) == found
