"""Names for the places of one function, from its syntax tree: ``self_c_attn_1``, ``operator_add_0``.

    definition  →  ``Site``: name, kind, span, line, text

The names of calls are nnsight's: the callee's dotted text joined with ``_``, then how many calls of that text
came before, inner calls first, counted over the whole function, branches that never run included. Operators,
subscripts and attributes get names of our own beside them. No torch here.
"""

from __future__ import annotations

import ast
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from fxsight.instructions import Kind, Span

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

_TEXT_WIDTH: Final = 60
_OPERATORS: Final[Mapping[str, str]] = types.MappingProxyType(  # class in ``ast`` → function in ``operator``
    {"Add": "add", "Sub": "sub", "Mult": "mul", "Div": "truediv", "FloorDiv": "floordiv", "Mod": "mod"}
    | {"Pow": "pow", "MatMult": "matmul", "LShift": "lshift", "RShift": "rshift"}
    | {"BitAnd": "and", "BitOr": "or", "BitXor": "xor", "USub": "neg", "UAdd": "pos", "Invert": "invert"}
    | {"Eq": "eq", "NotEq": "ne", "Lt": "lt", "LtE": "le", "Gt": "gt", "GtE": "ge"}
)


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


def sites_of(lines: Sequence[str], node: Definition) -> tuple[Site, ...]:
    """The sites of one definition, inner before outer; ``lines`` are those of the whole file."""
    body: Sequence[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else node.body
    found = [one for child, parent in _post_order(body, node) for one in _found(child, parent)]
    sites: list[Site] = []
    for name, (kind, _, at) in zip(_numbered(found), found, strict=True):
        span = _span(at, at)
        sites.append(Site(name, kind, span, _text(lines, span), span.line - node.lineno - 1))
    return tuple(sites)


def body_span(node: Definition) -> Span:
    """What a definition's own code comes from: not its defaults and decorators."""
    return _span(node.body, node.body) if isinstance(node, ast.Lambda) else _span(node.body[0], node.body[-1])


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
