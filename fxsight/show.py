"""Operations as text: types of structured values, a source with notes beside it, one operation, a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fxsight.book import Call, Const, Leaf, Opaque, Ref, SizeRef, Structure, Weight
from fxsight.node import Binding
from fxsight.program import Program
from fxsight.source import Site, Source
from fxsight.spec import Spec, TensorSpec
from fxsight.tree import Tree

NOT_EXECUTED = "not executed"
_SHOWN = 8  # members of a container that are shown before the rest is counted


class Text(str):
    """A string that a REPL and a notebook show as it is printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def value_text(structure: Structure, program: Program) -> str:
    """The type of a structured value: ``f32[batch, length, 64]``, ``(f32[batch, 2, length, 16], None)``."""
    return _structured(structure.tree, iter([_leaf_text(leaf, program) for leaf in structure.leaves]))


def note_text(calls: Sequence[Call], program: Program) -> str:
    """What stands behind the line of an operation: the type of its first output, and how often it runs."""
    output = calls[0].output
    plain = output.leaves and all(isinstance(leaf, (Const, SizeRef)) for leaf in output.leaves)
    times = f", runs {len(calls)} times" if len(calls) > 1 else ""
    return f"{'= ' * bool(plain)}{value_text(output, program)}{times}"


def tensor_spec_of(structure: Structure, program: Program) -> TensorSpec | None:
    """The spec of a value that is one tensor; None for any other."""
    if structure.tree.kind != "leaf":
        return None
    spec = _spec(structure.leaves[0], program)
    return spec if isinstance(spec, TensorSpec) else None


def _spec(leaf: Leaf, program: Program) -> Spec:
    match leaf:
        case Ref(name) if name in program.nodes:
            found: Spec = program.nodes[name].meta.get("spec")
            return found
        case Weight(name):
            here = Binding("weight", name)
            node = next((node for node, binding in program.bindings.items() if binding == here), "")
            return program.nodes[node].meta.get("spec") if node else None
        case _:
            return None


def _leaf_text(leaf: Leaf, program: Program) -> str:
    match leaf:
        case Const(value):
            return repr(value)
        case SizeRef(expr):
            return expr
        case Opaque(name):
            return name
        case _:
            spec = _spec(leaf, program)
            return "tensor" if spec is None else _spec_text(spec)


def _spec_text(spec: Spec) -> str:
    return f"({', '.join(map(_spec_text, spec))})" if isinstance(spec, tuple) else str(spec)


def _structured(tree: Tree, leaves: Iterator[str]) -> str:
    if tree.kind == "leaf":
        return next(leaves)
    parts = [_structured(child, leaves) for child in tree.children]
    if tree.kind in ("dict", "namedtuple", "fields", "cache"):
        form = "{!r}: {}" if tree.kind == "dict" else "{}={}"
        parts = [form.format(key, part) for key, part in zip(tree.keys, parts, strict=True)]
    if len(parts) > _SHOWN:
        parts = [*parts[: _SHOWN // 2], f"... {len(parts) - _SHOWN // 2} more"]
    inner = ", ".join(parts)
    match tree.kind:
        case "tuple":
            return f"({inner},)" if len(parts) == 1 else f"({inner})"
        case "list":
            return f"[{inner}]"
        case "dict":
            return "{" + inner + "}"
        case _:
            return f"{tree.name.rpartition(':')[2].rpartition('.')[2]}({inner})"


def source_text(
    header: str, source: Source, notes: Mapping[str, str], operators: bool, rest: Sequence[str]
) -> Text:
    """A body with its operations beside their lines.

    notes: by operation name.  operators: with those operators, subscripts and attributes that have a note.
    rest: lines for operations that have no place in the source.
    """
    sites = tuple(s for s in source.sites if s.kind == "call" or (operators and s.name in notes))
    shown = replace(source, sites=sites).render(notes, operators=operators)
    return Text("\n".join([header, "", shown, *rest]))


def site_note(site: Site, calls: Sequence[Call], ran: Sequence[str], program: Program) -> str:
    """The note of one place of the source; empty where nothing is known."""
    if calls:
        return note_text(calls, program)
    return NOT_EXECUTED if site.kind == "call" and site.name not in ran else ""


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Text:
    """Rows in columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    )
    return Text("\n".join(line.rstrip() for line in lines))


def operation_text(head: str, facts: Mapping[str, str], window: str) -> Text:
    """One operation: what it is, its facts in a column, and the lines around it."""
    width = max(map(len, facts), default=0)
    column = [f"  {name:<{width}}  {fact}" for name, fact in facts.items() if fact]
    return Text("\n".join([head, *column, *(["", window] if window else [])]))
