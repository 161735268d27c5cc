"""Conditions on places: what a selector is made of, as data that prints as the text it can be read from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsight.errors import SelectionError, nearest
from fxsight.glob import fits
from fxsight.selector_text import parse_ranges, parse_text, quoted, ranges_text

EXAMPLES = "class:GPT2Block, path:h.*.mlp, layer:4-7 or op:relu"


class Selector(ABC):
    """A condition on places; combined with ``&``, ``|`` and ``~``."""

    @abstractmethod
    def holds(self, at: Candidate) -> bool:
        """Whether a place is selected."""

    @abstractmethod
    def nearest(self, known: Sequence[Candidate]) -> str:
        """Why none of these is selected: what comes nearest."""

    @property
    def asks_for_operations(self) -> bool:
        """Whether it selects operations, and not modules."""
        return False

    @staticmethod
    def parse(text: str) -> Selector:
        """Read a text: ``Selector.parse(str(s)) == s``, but for a class given as itself, which is written by its name.

        Raises: SelectionError with the place in the text, and the nearest right words.
        """
        words = {"class": Of, "path": PathPattern, "layer": _layers, "op": Calls}
        found: Selector = parse_text(text, words, EXAMPLES)
        return found

    def __and__(self, other: Selector | str) -> Selector:
        return All((*_parts(All, self), *_parts(All, selector_of(other))))

    def __or__(self, other: Selector | str) -> Selector:
        return Either((*_parts(Either, self), *_parts(Either, selector_of(other))))

    def __rand__(self, other: str) -> Selector:
        return selector_of(other) & self

    def __ror__(self, other: str) -> Selector:
        return selector_of(other) | self

    def __invert__(self) -> Selector:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a selector is neither true nor false: combine with &, | and ~, not with and, or and not")


@dataclass(frozen=True)
class Candidate:
    """One place that may be selected: a module, or an operation in it.

    labels: of an operation, the names of what it calls.  handle: what is selected with it.
    """

    module: nn.Module
    path: str
    labels: tuple[str, ...] = ()
    handle: Any = None

    @property
    def layer(self) -> int | None:
        """The number of its block: the first in its path."""
        return next((int(part) for part in self.path.split(".") if part.isdecimal()), None)


@dataclass(frozen=True)
class Of(Selector):
    """Modules of a class."""

    cls: type[nn.Module] | str

    def holds(self, at: Candidate) -> bool:
        """Also of a class derived from it."""
        if isinstance(self.cls, type):
            return isinstance(at.module, self.cls)
        return any(fits(self.cls, name) for cls in type(at.module).__mro__ for name in (cls.__name__, _full_name(cls)))

    def nearest(self, known: Sequence[Candidate]) -> str:
        """Classes that there are."""
        classes = sorted({type(at.module).__name__ for at in known})
        return nearest(str(self).partition(":")[2], classes) or f"there are {', '.join(classes)}"

    def __str__(self) -> str:
        return f"class:{quoted(self.cls if isinstance(self.cls, str) else _full_name(self.cls))}"


@dataclass(frozen=True)
class PathPattern(Selector):
    """Modules whose path fits a pattern."""

    pattern: str

    def holds(self, at: Candidate) -> bool:
        """The whole path, part by part."""
        return fits(self.pattern, at.path)

    def nearest(self, known: Sequence[Candidate]) -> str:
        """Paths that there are."""
        paths = list(dict.fromkeys(at.path for at in known if at.path))
        return nearest(self.pattern, paths) or f"paths are such as {', '.join(map(repr, paths[:3]))}"

    def __str__(self) -> str:
        return f"path:{quoted(self.pattern)}"


@dataclass(frozen=True)
class Layers(Selector):
    """Modules below one of some numbered blocks, and these blocks."""

    numbers: frozenset[int]

    def holds(self, at: Candidate) -> bool:
        """The first number in the path is the block's."""
        return at.layer in self.numbers

    def nearest(self, known: Sequence[Candidate]) -> str:
        """Numbers that there are."""
        numbers = {at.layer for at in known if at.layer is not None}
        return f"blocks are numbered {ranges_text(numbers)}" if numbers else "no path has a number"

    def __str__(self) -> str:
        return f"layer:{ranges_text(self.numbers)}"


@dataclass(frozen=True)
class Calls(Selector):
    """Operations by what they call."""

    pattern: str

    def holds(self, at: Candidate) -> bool:
        """One of the names of the operation fits."""
        return any(fits(self.pattern, label) for label in at.labels)

    @property
    def asks_for_operations(self) -> bool:
        """Yes."""
        return True

    def nearest(self, known: Sequence[Candidate]) -> str:
        """What is called."""
        labels = sorted({label for at in known for label in at.labels})
        return nearest(self.pattern, labels) or f"this forward calls {', '.join(labels[:20])}"

    def __str__(self) -> str:
        return f"op:{quoted(self.pattern)}"


@dataclass(frozen=True)
class All(Selector):
    """What each of several selectors selects."""

    parts: tuple[Selector, ...]

    def holds(self, at: Candidate) -> bool:
        """All hold."""
        return all(part.holds(at) for part in self.parts)

    @property
    def asks_for_operations(self) -> bool:
        """Whether one of them does."""
        return any(part.asks_for_operations for part in self.parts)

    def nearest(self, known: Sequence[Candidate]) -> str:
        """The first that selects nothing by itself, or nothing of what those before it leave."""
        left = known
        for number, part in enumerate(self.parts):
            if not any(part.holds(at) for at in known):
                return f"{part} alone selects nothing: {part.nearest(known)}"
            rest = [at for at in left if part.holds(at)]
            if not rest:
                before = " and ".join(map(_inner, self.parts[:number]))
                return f"{before} selects {_places(left)}, and {part} none of these"
            left = rest
        return ""

    def __str__(self) -> str:
        return " and ".join(map(_inner, self.parts))


@dataclass(frozen=True)
class Either(Selector):
    """What one of several selectors selects."""

    parts: tuple[Selector, ...]

    def holds(self, at: Candidate) -> bool:
        """One of them holds."""
        return any(part.holds(at) for part in self.parts)

    @property
    def asks_for_operations(self) -> bool:
        """Whether one of them does."""
        return any(part.asks_for_operations for part in self.parts)

    def nearest(self, known: Sequence[Candidate]) -> str:
        """Of each of them."""
        return "; ".join(f"{part}: {part.nearest(known)}" for part in self.parts)

    def __str__(self) -> str:
        return " or ".join(map(str, self.parts))


@dataclass(frozen=True)
class Not(Selector):
    """What a selector does not select."""

    inner: Selector

    def holds(self, at: Candidate) -> bool:
        """It does not hold."""
        return not self.inner.holds(at)

    @property
    def asks_for_operations(self) -> bool:
        """Whether it does."""
        return self.inner.asks_for_operations

    def nearest(self, known: Sequence[Candidate]) -> str:
        """All is selected without the not."""
        return f"{_inner(self.inner)} selects all that was looked at, {_places(known)}"

    def __invert__(self) -> Selector:
        return self.inner

    def __str__(self) -> str:
        return f"not {_inner(self.inner)}"


def selector_of(selector: Any) -> Selector:
    """A selector, or what a text says.

    Raises: SelectionError.
    """
    if isinstance(selector, str):
        return Selector.parse(selector)
    given: Any = selector
    if not isinstance(given, Selector):
        raise SelectionError(
            f"not a selector: {selector!r}; write a text, such as {EXAMPLES}, or of(...), path(...), layers(...) or "
            "calls(...)"
        )
    return given


def _layers(text: str) -> Selector:
    return Layers(parse_ranges(text))


def _parts(kind: type[All | Either], selector: Selector) -> tuple[Selector, ...]:
    """Those of a selector of this kind, and itself for another: ``a & (b & c)`` is ``a & b & c``."""
    return selector.parts if isinstance(selector, kind) else (selector,)


def _inner(selector: Selector) -> str:
    return f"({selector})" if isinstance(selector, All | Either) else str(selector)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _places(known: Sequence[Candidate]) -> str:
    names = list(dict.fromkeys(str(getattr(at.handle, "address", at.path)) for at in known))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(repr(name) for name in names[:3])}{more}"
