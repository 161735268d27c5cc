"""Tokens by the text they stand for: where "the last token of the subject" is, whatever the padding.

Prompts are padded on the left, so positions are counted from the end: they mean the same in a prompt alone, in a list
of prompts, and in an invoke that is padded when a longer one joins it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxsight.errors import InputError

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Span:
    """The tokens of a text, in each row.

    positions: for each row, from its first token to its last; negative, counted from the end, with padding on the left.

        at = tracer.tokens("Eiffel Tower")
        model.transformer.h[5].output[at.last]          # f32[rows, d_model]: reads, and writes with =
        model.transformer.h[5].output[at.all]           # f32[rows, tokens, d_model]
    """

    positions: tuple[tuple[int, ...], ...]

    @property
    def first(self) -> Index:
        """The index of the first token, for a value of shape [rows, length, ...]."""
        return self._index([row[0] for row in self.positions])

    @property
    def last(self) -> Index:
        """The index of the last token, for a value of shape [rows, length, ...]."""
        return self._index([row[-1] for row in self.positions])

    @property
    def all(self) -> Index:
        """The index of all tokens, for a value of shape [rows, length, ...].

        Raises: InputError where the rows have different numbers of them.
        """
        counts = {len(row) for row in self.positions}
        if len(counts) > 1:
            raise InputError(f"the text has {sorted(counts)} tokens in different rows: take .first or .last")
        if len(set(self.positions)) == 1:
            return slice(None), list(self.positions[0])
        return torch.arange(len(self.positions))[:, None], torch.tensor(self.positions)

    def _index(self, positions: list[int]) -> Index:
        if len(set(positions)) == 1:
            return slice(None), positions[0]
        return torch.arange(len(positions)), torch.tensor(positions)

    def __iter__(self) -> Iterator[int]:
        return iter(self._one)

    def __len__(self) -> int:
        return len(self._one)

    def __getitem__(self, key: Any) -> Any:
        """Positions, where there is one row, or all have the same: ``span[-1]`` is a number."""
        return self._one[key]

    @property
    def _one(self) -> tuple[int, ...]:
        if len(set(self.positions)) > 1:
            raise InputError(f"the rows have it at different positions, {self.positions}: take .first, .last or .all")
        return self.positions[0]


class Tokens:
    """The tokens of some prompts: print them, find a text in them.

    ids: token ids of each row, without padding.  positions: where each of them is.
    """

    def __init__(self, ids: Sequence[list[int]], positions: Sequence[list[int]], tokenizer: Any) -> None:
        self.ids, self.positions, self._tokenizer = list(ids), list(positions), tokenizer

    @property
    def texts(self) -> list[list[str]]:
        """The text of each token, row by row."""
        return [[text[a:b] for a, b in ends] for text, ends in map(self._ends, self.ids)]

    def __call__(self, text: str, nth: int | None = None) -> Span:
        """The tokens that a text stands in, in every row.

        nth: which, where a row has the text several times, -1 for the last; they are counted from 0.

        Raises: InputError for a text that a row does not have, and for one it has several times when ``nth`` is None.
        """
        return Span(tuple(self._find(number, text, nth) for number in range(len(self.ids))))

    def _find(self, row: int, text: str, nth: int | None) -> tuple[int, ...]:
        whole, ends = self._ends(self.ids[row])
        starts = _occurrences(whole, text) or _occurrences(whole, text := self._as_decoded(text))
        if not starts:
            raise InputError(f"{text!r} is not in the prompt {whole!r}")
        if nth is None and len(starts) > 1:
            raise InputError(
                f"{text!r} is {len(starts)} times in the prompt {whole!r}: say which, tokens({text!r}, nth=0), or give "
                "more of the text"
            )
        if not -len(starts) <= (nth or 0) < len(starts):
            raise InputError(f"{text!r} is {len(starts)} times in the prompt {whole!r}; there is no number {nth}")
        start = starts[nth or 0]
        stop = start + len(text)
        found = [
            i for i, (a, b) in enumerate(ends) if a < stop and b > start and whole[max(a, start) : min(b, stop)].strip()
        ]
        return tuple(self.positions[row][i] for i in found)

    def _ends(self, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """The text of some tokens, and where in it each begins and ends."""
        if self._tokenizer is None:
            raise InputError(
                "a text is found by the tokenizer, and this model has none: LanguageModel(..., tokenizer=)"
            )
        texts = [self._decode(ids[:n]) for n in range(1, len(ids) + 1)]
        ends = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts]  # half a character is none yet
        return texts[-1], [(a, max(a, b)) for a, b in zip([0, *ends], ends, strict=False)]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _as_decoded(self, text: str) -> str:
        """A text as the tokenizer gives it back: in small letters, for instance."""
        return self._decode(self._tokenizer(text, add_special_tokens=False)["input_ids"]).strip()

    def __repr__(self) -> str:
        lines = []
        for texts, positions in zip(self.texts, self.positions, strict=True):
            lines.append(" ".join(f"{position}:{text!r}" for position, text in zip(positions, texts, strict=True)))
        return "\n".join(lines)


def _occurrences(whole: str, text: str) -> list[int]:
    found: list[int] = []
    start = whole.find(text) if text else -1
    while start >= 0:
        found.append(start)
        start = whole.find(text, start + 1)
    return found
