"""A program as Python text: the same on every run, complete, and readable back (``parse``).

    # program GPT2LMHeadModel
    # sizes: batch >= 0, length >= 2
    # made by: capture, DropUnused()
    def program(
        wte: "weight transformer.wte.weight",    # f32[96, 64]
        input_ids: "input 0",                    # i64[batch, length]
    ):
        embedding = aten.embedding.default(wte, input_ids)    # f32[batch, length, 64]  transformer.wte/F_embedding_0
        return (embedding,)

After the type of a value comes its address, then, in braces, what else is known of it where it is not the default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxsight.node import (
    Fixed,
    InputLeaf,
    Origin,
    OutputLeaf,
    Size,
    binding_of,
    origin_of,
    output_node,
    spec_of_node,
)
from fxsight.spec import Spec, TensorSpec
from fxsight.targets import argument_text, target_name
from fxsight.tree import Tree


class Text(str):
    """A string that a REPL and a notebook show as it is printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Header:
    """What the text says of a program besides its nodes; fields as in ``Program``."""

    name: str
    inputs: Tree
    input_leaves: tuple[InputLeaf, ...]
    outputs: Tree
    output_leaves: tuple[OutputLeaf, ...]
    sizes: tuple[Size, ...]
    guards: tuple[Any, ...]
    history: tuple[str, ...]


def program_text(header: Header, graph: fx.Graph, address: Callable[[int], str]) -> str:
    """The whole text; ``address`` names a call of the address book."""
    lines = [*_header_lines(header), "def program("]
    rows = [(f"    {n.name}: {str(binding_of(n))!r},", _note(n, address)) for n in graph.nodes if n.op == "placeholder"]
    lines += [*_aligned(rows), "):"]
    lines += _aligned([(node_line(n), _note(n, address)) for n in graph.nodes if n.op == "call_function"])
    returned = output_node(graph).args[0]
    return "\n".join([*lines, f"    return {argument_text(returned)}", ""])


def _header_lines(header: Header) -> Iterator[str]:
    yield f"# program {header.name}"
    if header.sizes:
        yield f"# sizes: {', '.join(map(str, header.sizes))}"
    if header.guards:
        yield f"# where: {'; '.join(sorted(map(str, header.guards)))}"
    yield f"# made by: {', '.join(header.history)}"
    yield f"# inputs: {_structure(header.inputs, [_input_text(leaf) for leaf in header.input_leaves])}"
    yield f"# outputs: {_structure(header.outputs, [_output_text(leaf) for leaf in header.output_leaves])}"


def _structure(tree: Tree, leaves: list[Any]) -> str:
    return json.dumps([tree.to_json(), leaves])


def _input_text(leaf: InputLeaf) -> Any:
    if isinstance(leaf, Fixed):
        return {"fixed": leaf.value}
    return {"type": str(leaf), **_spec_extras(leaf, "")}


def _output_text(leaf: OutputLeaf) -> Any:
    return None if leaf is None else {"fixed": leaf.value}


def node_line(node: fx.Node) -> str:
    """``name = target(arguments)``, indented."""
    arguments = [argument_text(a) for a in node.args]
    arguments += [f"{key}={argument_text(value)}" for key, value in node.kwargs.items()]
    return f"    {node.name} = {target_name(node.target)}({', '.join(arguments)})"


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = min(max((len(code) for code, _ in rows), default=0), 88)
    return [f"{code:<{width}}    # {note}" if note else code for code, note in rows]


def _note(node: fx.Node, address: Callable[[int], str]) -> str:
    origin = origin_of(node)
    extras = {**_spec_extras(spec_of_node(node), node.name), **_origin_extras(origin)}
    braces = "{" + ", ".join(f"{key}={value!r}" for key, value in extras.items()) + "}" if extras else ""
    return "  ".join(part for part in (spec_text(spec_of_node(node)), address(origin.call), braces) if part)


def spec_text(spec: Spec) -> str:
    """``f32[batch, 768]``; tuples in parentheses; ``size 2*length``; ``none`` for no value."""
    if isinstance(spec, tuple):
        return f"({', '.join(map(spec_text, spec))}{',' if len(spec) == 1 else ''})"
    return "none" if spec is None else str(spec)


def _spec_extras(spec: Spec, name: str) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if isinstance(spec, TensorSpec):
        if not spec.contiguous:
            extras["stride"] = ", ".join(map(str, spec.stride))
        if spec.device != "cpu":
            extras["device"] = spec.device
        if spec.storage != name:
            extras["shares"] = spec.storage
    elif isinstance(spec, tuple):
        parts = [_spec_extras(s, f"{name}[{i}]") for i, s in enumerate(spec)]
        if any(parts):
            extras["parts"] = parts
    return extras


def _origin_extras(origin: Origin) -> dict[str, Any]:
    return {key: value for key, value in vars(origin).items() if value != getattr(_DEFAULT, key)}


_DEFAULT = Origin()
