"""Many places with one expression: ``model.select(of(nn.Linear) & path("h.*.mlp.*") & ~layers(0))``.

    of(nn.Linear), of("GPT2Block")   modules of a class, or of one derived from it
    path("transformer.h.*.mlp")      modules whose path fits; ``*`` is within a part, ``**`` across parts
    layers(3), layers(range(4, 8))   modules in the blocks of these numbers: the numbers in their paths
    calls("relu")                    operations by what they call, of the last forward: a pattern or a function

``&``, ``|`` and ``~`` combine them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsight.errors import SelectionError, nearest


class Selector(ABC):
    """A condition on places; combined with ``&``, ``|`` and ``~``."""

    @abstractmethod
    def holds(self, at: Candidate) -> bool:
        """Whether a place is selected."""

    def __and__(self, other: Selector) -> Selector:
        return Both(self, selector_of(other))

    def __or__(self, other: Selector) -> Selector:
        return Either(self, selector_of(other))

    def __invert__(self) -> Selector:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a selector is neither true nor false: combine with &, | and ~, not with and, or and not")

    @property
    def asks_for_operations(self) -> bool:
        """Whether it selects operations, and not modules."""
        return False


@dataclass(frozen=True)
class Candidate:
    """One place that may be selected: a module, or an operation in it.

    labels: of an operation, the names of what it calls.  handle: what is selected with it.
    """

    module: nn.Module
    path: str
    labels: tuple[str, ...] = ()
    handle: Any = None


@dataclass(frozen=True)
class Of(Selector):
    """Modules of a class."""

    cls: type[nn.Module] | str

    def holds(self, at: Candidate) -> bool:
        """Also of a class derived from it."""
        return any(self.cls in (cls, cls.__name__) for cls in type(at.module).__mro__)

    def __str__(self) -> str:
        return f"of({self.cls if isinstance(self.cls, str) else self.cls.__name__})"


@dataclass(frozen=True)
class PathPattern(Selector):
    """Modules whose path fits a pattern."""

    pattern: str

    def holds(self, at: Candidate) -> bool:
        """The whole path, part by part."""
        return re.fullmatch(_regex(self.pattern), at.path) is not None

    def __str__(self) -> str:
        return f"path({self.pattern!r})"


@dataclass(frozen=True)
class Layers(Selector):
    """Modules below one of some numbered blocks, and these blocks."""

    numbers: frozenset[int]

    def holds(self, at: Candidate) -> bool:
        """The first number in the path is the block's."""
        number = next((int(part) for part in at.path.split(".") if part.isdecimal()), None)
        return number in self.numbers

    def __str__(self) -> str:
        return f"layers({', '.join(map(str, sorted(self.numbers)))})"


@dataclass(frozen=True)
class Calls(Selector):
    """Operations by what they call."""

    pattern: str

    def holds(self, at: Candidate) -> bool:
        """One of the names of the operation fits."""
        return any(re.fullmatch(_regex(self.pattern), label) for label in at.labels)

    @property
    def asks_for_operations(self) -> bool:
        """Yes."""
        return True

    def __str__(self) -> str:
        return f"calls({self.pattern!r})"


@dataclass(frozen=True)
class Both(Selector):
    """What two selectors select."""

    left: Selector
    right: Selector

    def holds(self, at: Candidate) -> bool:
        """Both hold."""
        return self.left.holds(at) and self.right.holds(at)

    @property
    def asks_for_operations(self) -> bool:
        """Whether one of them does."""
        return self.left.asks_for_operations or self.right.asks_for_operations

    def __str__(self) -> str:
        return f"({self.left} & {self.right})"


@dataclass(frozen=True)
class Either(Selector):
    """What one of two selectors selects."""

    left: Selector
    right: Selector

    def holds(self, at: Candidate) -> bool:
        """One of them holds."""
        return self.left.holds(at) or self.right.holds(at)

    @property
    def asks_for_operations(self) -> bool:
        """Whether one of them does."""
        return self.left.asks_for_operations or self.right.asks_for_operations

    def __str__(self) -> str:
        return f"({self.left} | {self.right})"


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

    def __str__(self) -> str:
        return f"~{self.inner}"


def of(cls: type[nn.Module] | str) -> Selector:
    """Modules of a class, given as itself or by its name, or of one derived from it."""
    given: Any = cls
    if not isinstance(given, str) and not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise SelectionError(f"of({cls!r}): give a class of modules, or its name")
    return Of(cls)


def path(pattern: str) -> Selector:
    """Modules by path: ``*`` stands for anything within one part of it, ``**`` for any parts."""
    given: Any = pattern
    if not isinstance(given, str):
        raise SelectionError(f"path({pattern!r}): give a pattern, such as 'h.*.mlp'")
    return PathPattern(pattern)


def layers(*numbers: int | Iterable[int]) -> Selector:
    """The blocks of these numbers and what is in them; the number of a place is the first in its path."""
    found: list[Any] = [n for each in numbers for n in ([each] if isinstance(each, int) else each)]
    if not found or any(type(n) is not int or n < 0 for n in found):
        raise SelectionError(f"layers{numbers!r}: give numbers of blocks, from 0: layers(3) or layers(range(4, 8))")
    return Layers(frozenset(found))


def calls(target: str | Callable[..., Any]) -> Selector:
    """Operations that call a function, operator or module class, given as itself or by a pattern of its name."""
    name = target if isinstance(target, str) else getattr(target, "__name__", None)
    if not isinstance(name, str):
        raise SelectionError(f"calls({target!r}): give a function, or a pattern such as 'relu'")
    return Calls(name if isinstance(target, str) else name.strip("_"))


def chosen(selector: Selector, candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that a selector selects, in order.

    Raises: SelectionError when there are none, with the nearest names.
    """
    known = list(candidates)
    found = [at for at in known if selector_of(selector).holds(at)]
    if not found:
        raise SelectionError(f"{selector} selects nothing; {_hint(selector, known)}")
    return found


def _hint(selector: Selector, known: list[Candidate]) -> str:
    classes = sorted({type(at.module).__name__ for at in known})
    paths = [at.path for at in known if at.path]
    match selector:
        case Of(cls):
            name = cls if isinstance(cls, str) else cls.__name__
            return nearest(name, classes) or f"there are {', '.join(classes)}"
        case PathPattern(pattern):
            return nearest(pattern, paths) or f"paths are such as {', '.join(map(repr, paths[:3]))}"
        case Calls(pattern):
            labels = sorted({label for at in known for label in at.labels})
            return nearest(pattern, labels) or f"this forward calls {', '.join(labels)}"
        case Both(left, right):
            empty = [s for s in (left, right) if not any(s.holds(at) for at in known)]
            return _hint(empty[0], known) if empty else f"{left} and {right} select something, and nothing in common"
        case _:
            return f"{len(known)} places were looked at"


def selector_of(selector: Any) -> Selector:
    """A selector, which it must be.

    Raises: SelectionError.
    """
    given: Any = selector
    if not isinstance(given, Selector):
        raise SelectionError(f"not a selector: {selector!r}; write of(...), path(...), layers(...) or calls(...)")
    return given


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return "".join({"**": ".*", "*": "[^.]*", "?": "[^.]"}.get(part, re.escape(part)) for part in parts)
