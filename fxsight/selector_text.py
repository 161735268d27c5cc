"""Selectors as text: ``class:GPT2Block and layer:4-7``, ``path:transformer.h.*.mlp and not layer:0``.

    any       = all {"or" all}
    all       = one {"and" one}
    one       = "not" one | "(" any ")" | condition
    condition = word ":" pattern             word: class, path, layer, op
    pattern   = characters other than spaces, quotes, parentheses and & | ~ !, or any in quotes: path:'a b'

So ``not`` binds more than ``and``, and ``and`` more than ``or``. This file knows the grammar alone: what a condition
becomes is given to it, and ``&``, ``|`` and ``~`` combine what comes of them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxsight.errors import SelectionError, nearest

LONGEST, DEEPEST = 10_000, 50  # characters of a text; parentheses and nots within each other
Words = Mapping[str, Callable[[str], Any]]

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PLAIN = r"""[^\s()'"&|~!]+"""
_TOKENS = {
    "bracket": r"[()]",
    "condition": rf"(?P<word>\w+):(?P<pattern>{_PLAIN}|{_QUOTED})",
    "sign": r"[&|~!]+",
    "other": rf"(?:{_PLAIN}|{_QUOTED})+|.",
}
_TOKEN = re.compile(r"\s*(?:" + "|".join(f"(?P<{kind}>{text})" for kind, text in _TOKENS.items()) + ")", re.DOTALL)
_JOINTS = ("and", "or", "not")
_MEANT = {"&": "and", "|": "or", "~": "not", "!": "not"}


def quoted(pattern: str) -> str:
    """A pattern as it stands in a text."""
    return pattern if re.fullmatch(_PLAIN, pattern) else repr(pattern)


def parse_text(text: str, words: Words, examples: str) -> Any:
    """What a text says.

    words: what each word makes of its pattern; a ``SelectionError`` of theirs is shown at its place in the text.
    examples: conditions, for messages.

    Raises: SelectionError with the place, what is wrong there, and the nearest right words.
    """
    if len(text) > LONGEST:
        raise SelectionError(f"a selector is a text of at most {LONGEST} characters, not {len(text)}")
    parser = _Parser(text, words, examples)
    found = parser.any()
    if parser.next.kind != "end":
        raise parser.wrong(parser.meant("here comes 'and', 'or' or the end, not"))
    return found


@dataclass(frozen=True)
class _Token:
    kind: str  # one of _TOKENS, or end
    text: str
    at: int
    word: str = ""
    pattern: str = ""


class _Parser:
    """One text on its way to a selector."""

    def __init__(self, text: str, words: Words, examples: str) -> None:
        self.text, self.words, self.examples = text, words, examples
        self.tokens = [
            _Token(m.lastgroup or "", m[kind], m.start(kind), m["word"] or "", m["pattern"] or "")
            for m in _TOKEN.finditer(text.rstrip())
            for kind in _TOKENS
            if m[kind]
        ]
        self.tokens.append(_Token("end", "", len(text)))
        self.number = self.depth = 0

    @property
    def next(self) -> _Token:
        """The token that comes next."""
        return self.tokens[self.number]

    @property
    def shown(self) -> str:
        """The same in words."""
        return repr(self.next.text) if self.next.text else "nothing"

    def takes(self, text: str) -> bool:
        """Whether a bracket or a joint comes next, which is taken then."""
        found = self.next.text == text
        self.number += found
        return found

    def any(self) -> Any:
        """One of several."""
        found = self.all()
        while self.takes("or"):
            found = found | self.all()
        return found

    def all(self) -> Any:
        """All of several."""
        found = self.one()
        while self.takes("and"):
            found = found & self.one()
        return found

    def one(self) -> Any:
        """A condition, the contrary of one, or what is in parentheses."""
        if self.next.kind == "condition":
            return self._condition()
        begun = self.next
        if self.depth == DEEPEST:
            raise self.wrong(f"more than {DEEPEST} parentheses and nots within each other")
        self.depth += 1
        if self.takes("not"):
            found = ~self.one()
        elif self.takes("("):
            found = self.any()
            if not self.takes(")"):
                raise self.wrong(f"here comes ')', 'and' or 'or', not {self.shown}: '(' of {begun.at} is open")
        else:
            raise self._no_condition()
        self.depth -= 1
        return found

    def _condition(self) -> Any:
        token = self.next
        if token.word not in self.words:
            hint = nearest(token.word, self.words) or f"words are {', '.join(self.words)}"
            raise self.wrong(f"no word {token.word!r}: {hint}")
        is_quoted = token.pattern[0] in "'\""
        try:
            pattern = ast.literal_eval(token.pattern) if is_quoted else token.pattern
        except (SyntaxError, ValueError):
            raise self.wrong(f"{token.pattern} cannot be read as a text in quotes") from None
        try:
            made = self.words[token.word](pattern)
        except SelectionError as error:
            raise self.wrong(str(error)) from None
        self.number += 1
        return made

    def _no_condition(self) -> SelectionError:
        """What is wrong where a condition should come."""
        word = re.split("[:=]", self.next.text)[0]
        if word in self.words:
            return self.wrong(f"after {word!r} come ':' and a pattern, without spaces: {self.examples}")
        return self.wrong(self.meant(f"here comes a condition, such as {self.examples}, not"))

    def meant(self, expected: str) -> str:
        """What was expected here, and what may be meant by what is here."""
        text = self.next.text
        if text[:1] in _MEANT:
            return f"in a text, write {_MEANT[text[0]]!r} for {text!r}"
        hint = nearest(re.split("[:=]", text)[0].lower(), (*self.words, *_JOINTS), 1)
        return f"{expected} {self.shown}" + (hint and f"; {hint}")

    def wrong(self, what: str) -> SelectionError:
        """An error at the token that comes next."""
        at = self.next.at
        begin = max(at - 60, 0)
        line = self.text[begin : at + 40].replace("\n", " ").replace("\t", " ")
        return SelectionError(f"cannot read a selector at character {at}: {what}\n  {line}\n  {' ' * (at - begin)}^")


def parse_ranges(text: str) -> frozenset[int]:
    """``0,4-7``: with both ends.

    Raises: SelectionError.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise SelectionError(f"layer:{quoted(text)}: give numbers and ranges of blocks, such as 3, 4-7 or 0,4-7")
        numbers |= set(range(first, last + 1))
    return frozenset(numbers)


def ranges_text(numbers: Iterable[int]) -> str:
    """``0,4-7``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
