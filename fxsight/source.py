"""The source of a function with its sites: printed, and found from a frame.

    code object, instruction  →  ``Source``, ``Site``

``instructions.py`` says where an instruction stands, ``sites.py`` what the place is called. No torch here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fxsight.errors import UnknownAddress, nearest
from fxsight.instructions import Kind, Span, located, site_table
from fxsight.sites import Definition, Site, body_span, sites_of

_COMPREHENSIONS: Final = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})


@dataclass(frozen=True)
class Source:
    """The text of one function and the sites in it.

    first_line: of the ``def``, in the file.  lines: from the ``def`` on, without its indentation.
    sites: in the order of the syntax tree, inner before outer; no two have the same name.
    """

    file: str
    function: str
    first_line: int
    lines: tuple[str, ...]
    sites: tuple[Site, ...]

    def names(self, kind: Kind | None = None) -> tuple[str, ...]:
        """The names of all sites, or of those of one kind, in order."""
        return tuple(site.name for site in self.sites if kind in (None, site.kind))

    def find(self, name: str) -> Site | None:
        """The site of that name."""
        return next((site for site in self.sites if site.name == name), None)

    def at(self, span: Span, kind: Kind) -> Site | None:
        """The site an instruction belongs to.

        In a chain over several lines CPython lets a method call, and an attribute, begin at the line of the
        attribute's name; their ends stay, and no two calls (or attributes) end at the same place.
        """
        same = self._by_end.get((kind, span.end), [])
        exact = [site for site in same if site.span == span]
        moved = [site for site in same if site.span.line < span.line and kind in ("call", "attribute")]
        found = exact or moved
        return found[0] if len(found) == 1 else None

    @functools.cached_property
    def _by_end(self) -> dict[tuple[Kind, tuple[int, int]], list[Site]]:
        by_end: dict[tuple[Kind, tuple[int, int]], list[Site]] = {}
        for site in self.sites:
            by_end.setdefault((site.kind, site.span.end), []).append(site)
        return by_end

    def render(self, marks: Mapping[str, str] | None = None, *, operators: bool = False) -> str:
        """The function, each line with its number, and before it the names of its calls.

        marks: name of a site → note (``f32[1, 5, 768]``, ``not executed``), put behind its line as a comment.
        operators: show the sites that are no calls, too.
        """
        shown = [site for site in self.sites if operators or site.kind == "call"]
        names = max((len(site.name) for site in shown), default=0)
        digits = max(3, len(str(len(self.lines))))
        rendered: list[str] = []
        for row, code in enumerate(self.lines, -1):
            number = " *" if row < 0 else f"{row:>{digits}}"
            here = [site.name for site in shown if site.row == row]
            rendered += _render_line(number, code, here, names, digits, marks or {})
        return "\n".join(rendered)

    def render_site(self, path: str, name: str, before: int = 5, after: int = 8) -> str:
        """The lines around one site, its own line as ``--> … <--``; ``path`` is what comes before the name.

        Raises UnknownAddress when there is no such site.
        """
        site = self.find(name)
        if site is None:
            place = f"{self.function} ({self.file}:{self.first_line})"
            hint = nearest(name, self.names())
            raise UnknownAddress(f"no operation {name!r} in {place}" + (f"; {hint}" if hint else ""))
        here = site.row + 1
        first, last = max(0, here - before), min(len(self.lines), here + after + 1)
        window = [f"    {line}".rstrip() for line in self.lines[first:last]]
        window[here - first] = f"    --> {self.lines[here].removeprefix('    ')} <--"
        above, below = ["    ...."] * (first > 0), ["    ...."] * (last < len(self.lines))
        return "\n".join([f"{path}.{name}:\n", *above, *window, *below])


def _render_line(
    number: str, code: str, names: list[str], width: int, digits: int, marks: Mapping[str, str]
) -> Iterator[str]:
    """One line of a function, then one line more for each name beyond the first."""
    for i, name in enumerate(names or [""]):
        column = f" {name:<{width}} -> " if name else " " * (width + 5)
        line = f"{number} {code}" if i == 0 else f"{'+':^{digits}} {_indent(code)}..."
        note = f"    # {marks[name]}" if name in marks else ""
        yield f"{column}{line}{note}".rstrip()


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _dedented(lines: Sequence[str]) -> tuple[str, ...]:
    """Lines without the indentation of the first; lines further left (of a string) stay where they are."""
    indent = _indent(lines[0])
    return tuple((line.removeprefix(indent) if line.strip() else "").rstrip() for line in lines)


def _source(file: str, lines: Sequence[str], node: Definition) -> Source:
    """The source of one definition; ``lines`` are those of the whole file."""
    own = _dedented(lines[node.lineno - 1 : node.end_lineno])
    return Source(file, _name(node), node.lineno, own, sites_of(lines, node))


def _name(node: Definition) -> str:
    return "<lambda>" if isinstance(node, ast.Lambda) else node.name


def _first_line(node: Definition) -> int:
    """The line ``co_firstlineno`` has: that of the first decorator."""
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return decorators[0].lineno if decorators else node.lineno


def _definition(file: _File, code: types.CodeType) -> Definition | None:
    """The def or lambda a code object was compiled from; for a comprehension, the one around it.

    Several lambdas may begin on one line: the innermost whose body has all of the code's spans.
    """
    here = file.defs.get((code.co_name, code.co_firstlineno), [])
    if code.co_name in _COMPREHENSIONS:
        here = [node for nodes in file.defs.values() for node in nodes]
    if code.co_name in _COMPREHENSIONS or len(here) > 1:
        spans = [span for position in set(code.co_positions()) if (span := located(position))]
        here = [node for node in here if spans and all(body_span(node).contains(span) for span in spans)]
    return max(here, key=lambda node: body_span(node).start, default=None)


@dataclass(frozen=True)
class _File:
    """A parsed file: every def and lambda of it, and the sources asked for so far."""

    lines: list[str]
    defs: dict[tuple[str, int], list[Definition]]  # by name and first line, as code objects have them
    sources: dict[Definition, Source] = field(default_factory=dict[Definition, Source])

    def source(self, name: str, node: Definition | None) -> Source | None:
        """That of one of ``defs``; ``name`` is the file's."""
        if node is not None and node not in self.sources:
            self.sources[node] = _source(name, self.lines, node)
        return self.sources[node] if node else None


@dataclass(frozen=True)
class _Code:
    """What is known of one code object; holding it keeps its ``id`` its own."""

    code: types.CodeType
    source: Source | None
    table: dict[int, tuple[Span, Kind]]
    sites: dict[int, Site | None] = field(default_factory=dict[int, Site | None])


class SourceReader:
    """Reads sources of functions through ``linecache`` (so notebook cells have one, too) and remembers them.

    It keeps the code objects it was asked about alive: make one for a capture, and let it go.
    """

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        # By id: equal functions of two files are equal code objects (co_filename is not compared).
        self._codes: dict[int, _Code] = {}

    def of(self, code: types.CodeType) -> Source | None:
        """The source of a function's code; of a comprehension's code, that of the function around it.

        None when there is none to read: ``exec``, generated code, a class body, a module, lines that moved.
        """
        return self._known(code).source

    def of_function(self, fn: Callable[..., object]) -> Source | None:
        """The source of a function, method or partial, under its ``functools.wraps``; None as for ``of``."""
        plain = unwrapped(fn)
        if not isinstance(plain, types.FunctionType):
            return None
        linecache.lazycache(plain.__code__.co_filename, plain.__globals__)  # for a module in a zip file
        return self.of(plain.__code__)

    def find(self, file: str, function: str, first_line: int) -> Source | None:
        """The source of the function of that name whose code begins at that line (its first decorator)."""
        parsed = self._parsed(file)
        return parsed.source(file, next(iter(parsed.defs.get((function, first_line), [])), None))

    def locate(self, code: types.CodeType, lasti: int) -> Site | None:
        """The site at which a frame with this ``f_code`` and ``f_lasti`` is; cheap when asked again."""
        known = self._known(code)
        if lasti not in known.sites:
            at = known.table.get(lasti)
            known.sites[lasti] = known.source.at(*at) if known.source and at else None
        return known.sites[lasti]

    def _known(self, code: types.CodeType) -> _Code:
        known = self._codes.get(id(code))
        if known is None:
            file = self._parsed(code.co_filename)
            source = file.source(code.co_filename, _definition(file, code))
            known = self._codes[id(code)] = _Code(code, source, site_table(code) if source else {})
        return known

    def _parsed(self, name: str) -> _File:
        linecache.checkcache(name)
        lines = linecache.getlines(name)
        if name not in self._files or self._files[name].lines != lines:
            defs: dict[tuple[str, int], list[Definition]] = {}
            for node in ast.walk(_parse("".join(lines))):
                if isinstance(node, Definition):
                    defs.setdefault((_name(node), _first_line(node)), []).append(node)
            self._files[name] = _File(lines, defs)
        return self._files[name]


def _parse(text: str) -> ast.Module:
    """The syntax tree of a file; an empty one if it is not Python (Cython, a null byte)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its invalid escapes the file's own import has warned
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def unwrapped(fn: object) -> object:
    """The function in a partial, bound method or ``functools.wraps`` wrapper, however nested."""
    while True:
        inner = inspect.unwrap(fn) if callable(fn) else fn
        if isinstance(inner, functools.partial):
            inner = inner.func
        elif isinstance(inner, types.MethodType):
            inner = inner.__func__
        if inner is fn:
            return fn
        fn = inner
