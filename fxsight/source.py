"""Names for what a function does at each place of its source: ``self_c_attn_1``, ``operator_add_0``.

    code object, instruction  →  span of the text, kind  →  ``Site``: name, line, text

The names of calls are nnsight's: the callee's dotted text joined with ``_``, then how many calls of that text
came before, inner calls first, counted over the whole function, branches that never run included. Operators,
subscripts and attributes get names of our own beside them. No torch here.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from fxsight.errors import UnknownAddress, nearest

Kind = Literal["call", "operator", "subscript", "store", "attribute"]
_Def = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

_TEXT_WIDTH: Final = 60
_COMPREHENSIONS: Final = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
_OPERATORS: Final[Mapping[str, str]] = types.MappingProxyType(  # class in ``ast`` → function in ``operator``
    {"Add": "add", "Sub": "sub", "Mult": "mul", "Div": "truediv", "FloorDiv": "floordiv", "Mod": "mod"}
    | {"Pow": "pow", "MatMult": "matmul", "LShift": "lshift", "RShift": "rshift"}
    | {"BitAnd": "and", "BitOr": "or", "BitXor": "xor", "USub": "neg", "UAdd": "pos", "Invert": "invert"}
    | {"Eq": "eq", "NotEq": "ne", "Lt": "lt", "LtE": "le", "Gt": "gt", "GtE": "ge"}
)


@dataclass(frozen=True)
class Span:
    """A piece of a file as in ``co_positions()``: lines from 1, columns from 0 in bytes, end excluded."""

    line: int
    end_line: int
    col: int
    end_col: int

    @property
    def start(self) -> tuple[int, int]:
        return self.line, self.col

    @property
    def end(self) -> tuple[int, int]:
        return self.end_line, self.end_col

    def contains(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end


@dataclass(frozen=True)
class Site:
    """One place of a function that does something: ``self_c_attn_1`` is ``self.c_attn(hidden_states)``.

    row: line as printed, 0 is the line after ``def`` (-1: the ``def`` line itself).  text: its source on one
    line, cut to 60 characters; for a store the target, ``x[0]``.
    """

    name: str
    kind: Kind
    span: Span
    text: str
    row: int


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


class _Found(NamedTuple):
    """A site that has no number yet."""

    kind: Kind
    base: str
    node: ast.expr | ast.stmt


def _children(node: ast.AST) -> list[ast.AST]:
    """What a node is made of, in the order of the tree, without annotations: they compute nothing."""
    match node:
        case ast.AnnAssign(annotation=hint) | ast.arg(annotation=hint) | ast.FunctionDef(returns=hint):
            return [child for child in ast.iter_child_nodes(node) if child is not hint]
        case _:
            return list(ast.iter_child_nodes(node))


def _post_order(roots: Sequence[ast.AST], parent: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Every node below and its parent, children first. A loop, since trees of generated code are deep."""
    todo = [(root, parent, False) for root in reversed(roots)]
    while todo:
        node, above, ready = todo.pop()
        if ready:
            yield node, above
        else:
            todo.append((node, above, True))
            todo += [(child, node, False) for child in reversed(_children(node))]


def _found(node: ast.AST, parent: ast.AST) -> list[_Found]:
    """The sites a node is, without those in it; ``x[0] += y`` is two, and ``x[0]`` in it a load."""
    match node:
        case ast.Call():
            return [_Found("call", _callee(node.func), node)]
        case ast.BinOp() | ast.UnaryOp() if _operator(node.op) and not _is_literal(node):
            return [_Found("operator", f"operator_{_operator(node.op)}", node)]
        case ast.Compare(ops=[op]) if _operator(op):
            return [_Found("operator", f"operator_{_operator(op)}", node)]
        case ast.AugAssign(target=target, op=op):
            store = [_Found("store", "operator_setitem", target)] * isinstance(target, ast.Subscript)
            return [_Found("operator", f"operator_i{_operator(op)}", node), *store]
        case ast.Subscript() if _is_load(node, parent):
            return [_Found("subscript", "operator_getitem", node)]
        case ast.Subscript(ctx=ast.Store()):
            return [_Found("store", "operator_setitem", node)]
        case ast.Attribute() if _is_load(node, parent):
            return [_Found("attribute", f"attribute_{node.attr}", node)]
        case _:
            return []


def _callee(func: ast.expr) -> str:
    """``self.c_attn`` → ``self_c_attn``; ``f(x).split`` → ``split``; ``f(x)`` → ``unknown``."""
    parts: list[str] = []
    while isinstance(func, ast.Attribute):
        parts.append(func.attr)
        func = func.value
    if isinstance(func, ast.Name):
        parts.append(func.id)
    return "_".join(reversed(parts)) or "unknown"


def _is_literal(node: ast.expr) -> bool:
    """Whether this is a number as people write it, ``-1`` or ``2**0.5``: the compiler computes it."""
    match node:
        case ast.UnaryOp(operand=operand):
            return _is_literal(operand)
        case ast.BinOp(left=left, right=right):
            return _is_literal(left) and _is_literal(right)
        case _:
            return isinstance(node, ast.Constant)


def _is_load(node: ast.Subscript | ast.Attribute, parent: ast.AST) -> bool:
    """Whether this reads a value: the target of ``+=`` does, too; the name of a called method is no value."""
    match parent:
        case ast.AugAssign(target=target) if target is node:
            return True
        case ast.Call(func=func) if func is node and isinstance(node, ast.Attribute):
            return False
        case _:
            return isinstance(node.ctx, ast.Load)


def _operator(op: ast.AST) -> str:
    """``add`` for ``+``; empty for ``not``, ``is`` and ``in``, which no class computes values with."""
    return _OPERATORS.get(type(op).__name__, "")


def _numbered(found: Sequence[_Found]) -> list[str]:
    """A name for each: calls take the first numbers, so that ours never shift theirs."""
    counts: Counter[str] = Counter()
    names = [""] * len(found)
    for i in sorted(range(len(found)), key=lambda i: found[i].kind != "call"):
        base = found[i].base
        names[i] = f"{base}_{counts[base]}"
        counts[base] += 1
    return names


def _span(first: ast.expr | ast.stmt, last: ast.expr | ast.stmt) -> Span:
    """From the start of one node to the end of another; parsed nodes always have an end."""
    return Span(first.lineno, last.end_lineno or 0, first.col_offset, last.end_col_offset or 0)


def _text(lines: Sequence[str], span: Span) -> str:
    """The text of a span, on one line and not too long."""
    rows = [line.encode() for line in lines[span.line - 1 : span.end_line]]
    rows[-1] = rows[-1][: span.end_col]
    rows[0] = rows[0][span.col :]
    text = " ".join(b"".join(rows).decode(errors="replace").split())
    return text if len(text) <= _TEXT_WIDTH else f"{text[: _TEXT_WIDTH - 3]}..."


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _dedented(lines: Sequence[str]) -> tuple[str, ...]:
    """Lines without the indentation of the first; lines further left (of a string) stay where they are."""
    indent = _indent(lines[0])
    return tuple((line.removeprefix(indent) if line.strip() else "").rstrip() for line in lines)


def _source(file: str, lines: Sequence[str], node: _Def) -> Source:
    """The source of one definition; ``lines`` are those of the whole file."""
    body: Sequence[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else node.body
    found = [one for child, parent in _post_order(body, node) for one in _found(child, parent)]
    sites: list[Site] = []
    for name, (kind, _, at) in zip(_numbered(found), found, strict=True):
        span = _span(at, at)
        sites.append(Site(name, kind, span, _text(lines, span), span.line - node.lineno - 1))
    own = _dedented(lines[node.lineno - 1 : node.end_lineno])
    return Source(file, _name(node), node.lineno, own, tuple(sites))


def _name(node: _Def) -> str:
    return "<lambda>" if isinstance(node, ast.Lambda) else node.name


def _first_line(node: _Def) -> int:
    """The line ``co_firstlineno`` has: that of the first decorator."""
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return decorators[0].lineno if decorators else node.lineno


def _body(node: _Def) -> Span:
    """What the definition's own code comes from: not its defaults and decorators."""
    return _span(node.body, node.body) if isinstance(node, ast.Lambda) else _span(node.body[0], node.body[-1])


def _located(position: tuple[int | None, ...]) -> Span | None:
    """The span of an instruction; None where the compiler gave none, or an empty one."""
    match position:
        case int(line), int(end_line), int(col), int(end_col) if (line, col) < (end_line, end_col):
            return Span(line, end_line, col, end_col)
        case _:
            return None


def _definition(file: _File, code: types.CodeType) -> _Def | None:
    """The def or lambda a code object was compiled from; for a comprehension, the one around it.

    Several lambdas may begin on one line: the innermost whose body has all of the code's spans.
    """
    here = file.defs.get((code.co_name, code.co_firstlineno), [])
    if code.co_name in _COMPREHENSIONS:
        here = [node for nodes in file.defs.values() for node in nodes]
    if code.co_name in _COMPREHENSIONS or len(here) > 1:
        spans = [span for position in set(code.co_positions()) if (span := _located(position))]
        here = [node for node in here if spans and all(_body(node).contains(span) for span in spans)]
    return max(here, key=lambda node: _body(node).start, default=None)


def site_table(code: types.CodeType) -> dict[int, tuple[Span, Kind]]:
    """Offset in the bytecode → span and kind, for the instructions that can be sites, inline caches included.

    While Python 3.11 runs a callee, the caller's ``f_lasti`` may be at a cache behind the instruction.
    """
    positions, instructions = list(code.co_positions()), list(dis.get_instructions(code))
    ends = [*(after.offset for _, after in pairwise(instructions)), len(code.co_code)]
    table: dict[int, tuple[Span, Kind]] = {}
    before: tuple[object, ...] = ()
    for instruction, end in zip(instructions, ends, strict=True):
        position, kind = positions[instruction.offset // 2], _kind(instruction)
        # ``with f():`` calls __enter__ and __exit__; from 3.12 on, these calls may have the span of ``f()``.
        by_with = before in (("LOAD_CONST", position), ("LOAD_SPECIAL", position))
        span = _located(position) if kind and not (by_with and instruction.opname == "CALL") else None
        if span and kind:
            table.update(dict.fromkeys(range(instruction.offset, end, 2), (span, kind)))
        if instruction.opname != "PRECALL":
            before = (instruction.opname, position)
    return table


def _kind(instruction: dis.Instruction) -> Kind | None:
    """What an instruction does. Python 3.12 made ``+x`` an intrinsic, 3.14 ``x[0]`` a binary operator."""
    match instruction.opname, instruction.argrepr:
        case ("PRECALL" | "CALL" | "CALL_KW" | "CALL_FUNCTION_EX", _):
            return "call"
        case ("BINARY_SUBSCR" | "BINARY_SLICE", _) | ("BINARY_OP", "[]"):
            return "subscript"
        case ("BINARY_OP" | "COMPARE_OP" | "UNARY_NEGATIVE" | "UNARY_INVERT" | "UNARY_POSITIVE", _):
            return "operator"
        case ("CALL_INTRINSIC_1", "INTRINSIC_UNARY_POSITIVE"):
            return "operator"
        case ("STORE_SUBSCR" | "STORE_SLICE", _):
            return "store"
        case ("LOAD_ATTR" | "LOAD_METHOD" | "LOAD_SUPER_ATTR", _):
            return "attribute"
        case _:
            return None


def site_of_frame(code: types.CodeType, lasti: int) -> tuple[Span, Kind] | None:
    """Where in the file a frame is and what it does there, from its ``f_code`` and ``f_lasti``.

    None when it does nothing that is a site, or when Python runs without columns (``-X no_debug_ranges``).
    Disassembles all of ``code``: for many questions, ``SourceReader.locate``.
    """
    return site_table(code).get(lasti)


@dataclass(frozen=True)
class _File:
    """A parsed file: every def and lambda of it, and the sources asked for so far."""

    lines: list[str]
    defs: dict[tuple[str, int], list[_Def]]  # by name and first line, as code objects have them
    sources: dict[_Def, Source] = field(default_factory=dict[_Def, Source])

    def source(self, name: str, node: _Def | None) -> Source | None:
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
        plain = _unwrapped(fn)
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
            defs: dict[tuple[str, int], list[_Def]] = {}
            for node in ast.walk(_parse("".join(lines))):
                if isinstance(node, _Def):
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


def _unwrapped(fn: object) -> object:
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
