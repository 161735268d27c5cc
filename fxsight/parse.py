"""The inverse of ``text``: Python text → an equal program.

Nothing is executed: the text is parsed as Python, names are looked up among torch's functions (``targets``), literals
are read as literals, and anything else is an error with its line. The address book is not part of the text; it is
stored beside it (``store``).
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxsight.book import Book
from fxsight.errors import TextError
from fxsight.node import Binding, Fixed, InputLeaf, OutputLeaf, Size
from fxsight.notes import read_expression, read_literal, read_note, read_tensor
from fxsight.program import Program
from fxsight.spec import SizeSpec, Spec
from fxsight.targets import check_call, find_target
from fxsight.tree import Tree


def parse_program(text: str, book: Book | None = None, literals: Mapping[str, torch.Tensor] | None = None) -> Program:
    """The program whose text this is.

    Raises: TextError, naming the line, for anything that is not such a text.
    """
    try:
        return _parse_program(text, book, literals)
    except _DAMAGE as error:
        raise TextError(f"not a program: {type(error).__name__}: {error}") from None


_DAMAGE = (SyntaxError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RecursionError)


def _parse_program(text: str, book: Book | None, literals: Mapping[str, torch.Tensor] | None) -> Program:
    function, notes = _parse(text)
    fields = dict(re.findall(r"^# (sizes|where|made by|inputs|outputs): (.*)$", text, re.MULTILINE))
    name = re.search(r"^# program (.*)$", text, re.MULTILINE)
    if name is None or "inputs" not in fields or "outputs" not in fields:
        raise TextError("line 1: a program begins with '# program NAME' and has '# inputs:' and '# outputs:' lines")
    inputs, input_leaves = _structure(fields["inputs"])
    outputs, output_leaves = _structure(fields["outputs"])
    return Program(
        name[1],
        _Reader(notes).graph(function),
        inputs,
        tuple(map(_input_leaf, input_leaves)),
        outputs,
        tuple(map(_output_leaf, output_leaves)),
        tuple(map(_size, fields.get("sizes", "").split(", "))) if fields.get("sizes") else (),
        tuple(read_expression(g) for g in fields.get("where", "").split("; ") if g),
        book or Book(),
        dict(literals or {}),
        tuple(_history(fields.get("made by", "capture"))),
    )


def parse_arguments(call: str, nodes: Mapping[str, fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``function(arguments)`` as a program writes it, with these nodes.

    Raises: TextError.
    """
    try:
        parsed = ast.parse(call, mode="eval").body
    except SyntaxError as error:
        raise TextError(f"not a call: {call!r}: {error.msg}") from None
    if not isinstance(parsed, ast.Call):
        raise TextError(f"not a call: {call!r}")
    return _Reader({}, nodes).arguments(parsed)


@dataclass(frozen=True)
class Line:
    """``name = function(arguments)    # type`` by its parts.

    target: the function; None for ``read``, ``constant`` and ``weight``, which are an edit's.
    """

    name: str
    function: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: Spec


def parse_line(text: str, nodes: Mapping[str, fx.Node]) -> Line:
    """One line of a body, in which these nodes have been made.

    Raises: TextError.
    """
    try:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        note = next((t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT), "")
        match ast.parse(text).body:
            case [ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call)]:
                function = ast.unparse(call.func)
            case _:
                raise TextError("not 'name = function(...)'")
        args, kwargs = _Reader({}, nodes).arguments(call)
        target = None if function in ("read", "constant", "weight") else find_target(function)
        if target is not None:
            check_call(target, args)
        return Line(name, function, target, args, kwargs, read_note(note, name, 1).get("spec"))
    except (*_DAMAGE, ValueError, MemoryError, tokenize.TokenError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError(f"{type(error).__name__}: {error}") from None


def _parse(text: str) -> tuple[ast.FunctionDef, dict[int, str]]:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise TextError(f"line {error.lineno}: {error.msg}") from None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        raise TextError("line 1: a program is one function definition")
    return tree.body[0], dict(_notes(text))


_STRING_OR_COMMENT = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|#.*""")


def _notes(text: str) -> Iterator[tuple[int, str]]:
    """The comment of each line that has one."""
    for number, line in enumerate(text.split("\n"), 1):
        found = _STRING_OR_COMMENT.findall(line) if "#" in line else []
        if found and found[-1].startswith("#"):
            yield number, found[-1][1:].strip()


def _structure(text: str) -> tuple[Tree, list[Any]]:
    try:
        tree, leaves = json.loads(text)
        return Tree.from_json(tree), leaves
    except (ValueError, TypeError, KeyError) as error:
        raise TextError(f"not a structure: {text[:60]!r}: {error}") from None


def _input_leaf(data: Any) -> InputLeaf:
    if "fixed" in data:
        return Fixed(data["fixed"])
    if data["type"].startswith("size "):
        return SizeSpec(read_expression(data["type"].removeprefix("size ")))
    return read_tensor(data["type"], data, "")


def _output_leaf(data: Any) -> OutputLeaf:
    return None if data is None else Fixed(data["fixed"])


def _size(text: str) -> Size:
    match = re.fullmatch(r"(?:(\d+) <= )?(\w+)(?: (>=|<=) (\d+))?", text)
    if match is None:
        raise TextError(f"not a size: {text!r}; write 'batch >= 1' or '2 <= length <= 64'")
    low, name, sign, bound = match.groups()
    return Size(name, int(bound), None) if sign == ">=" else Size(name, int(low or 0), int(bound))


def _history(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts = re.findall(r"(?:[^,(\[]|\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])+", text)
    return [part.strip() for part in parts]


class _Reader:
    """Reads the lines of one function into a graph."""

    def __init__(self, notes: Mapping[int, str], made: Mapping[str, fx.Node] = {}) -> None:
        self.notes = notes
        self.made = dict(made)

    def graph(self, function: ast.FunctionDef) -> fx.Graph:
        graph = fx.Graph()
        for argument in function.args.args:
            node = self._add(graph.placeholder(argument.arg), argument.arg, argument.lineno)
            node.meta["binding"] = _binding(argument)
        for statement in function.body:
            try:
                self._statement(graph, statement)
            except TextError as error:
                at = "" if str(error).startswith("line ") else f"line {statement.lineno}: "
                raise TextError(f"{at}{error}") from None
        return graph

    def _statement(self, graph: fx.Graph, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call):
                target, (args, kwargs) = find_target(_dotted(call.func)), self.arguments(call)
                check_call(target, args)
                node = graph.create_node("call_function", target, args, kwargs, name)
                self._add(node, name, statement.lineno)
            case ast.Return(value=ast.expr() as value):
                graph.output(self._value(value))
            case _:
                raise TextError(f"line {statement.lineno}: not 'name = function(...)': {ast.unparse(statement)!r}")

    def arguments(self, call: ast.Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call."""
        kwargs = {k.arg: self._value(k.value) for k in call.keywords if k.arg is not None}
        if len(kwargs) < len(call.keywords):
            raise TextError(f"line {call.lineno}: no ** in a program")
        return tuple(map(self._value, call.args)), kwargs

    def _add(self, node: fx.Node, name: str, line: int) -> fx.Node:
        if node.name != name or name in self.made:
            raise TextError(f"line {line}: the name {name!r} is taken or reserved")
        self.made[name] = node
        node.meta.update(read_note(self.notes.get(line, ""), name, line))
        return node

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name):
                if name not in self.made:
                    raise TextError(f"line {node.lineno}: {name!r} is used before it is made")
                return self.made[name]
            case ast.Tuple(elts=elements):
                return tuple(map(self._value, elements))
            case ast.List(elts=elements):
                return list(map(self._value, elements))
            case ast.Dict(keys=keys, values=values):
                return {ast.literal_eval(k): self._value(v) for k, v in zip(keys, values, strict=True) if k is not None}
            case ast.Call(func=ast.Name(id="slice"), args=parts):
                return slice(*map(self._value, parts))
            case _:
                return read_literal(node)


def _dotted(function: ast.expr) -> str:
    """The name of a function as it is written."""
    steps: list[str] = []
    inner = function
    while isinstance(inner, ast.Attribute):
        steps.append(inner.attr)
        inner = inner.value
    return ".".join([inner.id, *reversed(steps)]) if isinstance(inner, ast.Name) else ast.unparse(function)


def _binding(argument: ast.arg) -> Binding:
    text = argument.annotation.value if isinstance(argument.annotation, ast.Constant) else ""
    kind, _, key = str(text).partition(" ")
    if kind in ("weight", "literal"):
        return Binding(kind, key)  # type: ignore[arg-type]
    if kind in ("input", "constant") and key.isdecimal():
        return Binding(kind, int(key))  # type: ignore[arg-type]
    raise TextError(f"line {argument.lineno}: not a binding: {text!r}; write 'weight NAME' or 'input NUMBER'")
