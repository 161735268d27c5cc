"""A program as one straight-line Python function: fast to make, and fast to run.

    def program(v0, v1):
        v2 = f0(v0, (-1, 64))      # f0 = Tensor.view, for aten.view.default
        v3 = f1(v2, v1)
        del v2
        return [v3]

The same kernels in the same order, on the same memory, so the same bits: operators are called through torch's own
bindings (``direct``), one that returns its argument itself is not called, and each value goes after its last use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxsight.direct import direct
from fxsight.written import written

_LITERALS = (bool, int, str, type(None))


def straight(graph: fx.Graph, name: str = "program") -> Callable[..., list[Any]]:
    """The function of the graph's placeholders that returns its results in order.

    graph: placeholders, calls of functions and one output.
    """
    writer = _Writer(graph)
    lines = [f"def program({', '.join(writer.parameters)}):", *writer.lines()]
    made: Callable[..., list[Any]] = written(lines, name, writer.globals)
    return made


class _Writer:
    """Writes the lines; what is not a literal is a global of the function."""

    def __init__(self, graph: fx.Graph) -> None:
        self.globals: dict[str, Any] = {}
        self.parameters: list[str] = []
        self._names: dict[fx.Node, str] = {}
        self._known: dict[int, str] = {}
        self._nodes = list(graph.nodes)
        for number, node in enumerate(self._nodes):
            self._names[node] = self._names[node.args[0]] if returns_argument(node) else f"v{number}"
            if node.op == "placeholder":
                self.parameters.append(f"v{number}")

    def lines(self) -> Iterator[str]:
        """The body."""
        last = {self._names[x]: node for node in self._nodes for x in (node, *node.all_input_nodes)}
        ends: dict[fx.Node, list[str]] = {}
        for name, node in last.items():
            ends.setdefault(node, []).append(name)
        for node in self._nodes:
            if node.op == "output":
                yield f"    return {self._sequence(list(node.args[0]), '[]')}"
                return
            if node.op == "call_function" and not returns_argument(node):
                yield f"    {self._names[node]} = {self._call(node)}"
            if node in ends:
                yield f"    del {', '.join(ends[node])}"

    def _call(self, node: fx.Node) -> str:
        found = direct(node.target, len(node.args))
        items = "()" if found is not None else "[]"
        arguments = [self._term(x, items) for x in node.args]
        arguments += [f"{key}={self._term(x, items)}" for key, x in node.kwargs.items()]
        return f"{self._global('f', found or node.target)}({', '.join(arguments)})"

    def _term(self, value: Any, items: str) -> str:
        """An argument.  items: the brackets of a list; a tuple is quicker where the function takes either."""
        if isinstance(value, fx.Node):
            return self._names[value]
        if type(value) in _LITERALS or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, list):
            return self._sequence(value, items)
        if type(value) is tuple:
            return self._sequence(value, "()")
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key!r}: {self._term(x, items)}' for key, x in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({', '.join(self._term(x, items) for x in (value.start, value.stop, value.step))})"
        return self._global("c", value)

    def _sequence(self, values: Any, brackets: str) -> str:
        terms = [self._term(x, brackets) for x in values]
        end = "," if len(terms) == 1 and brackets == "()" else ""
        return f"{brackets[0]}{', '.join(terms)}{end}{brackets[1]}"

    def _global(self, kind: str, value: Any) -> str:
        name = self._known.get(id(value))
        if name is None:
            name = self._known[id(value)] = f"{kind}{len(self._known)}"
            self.globals[name] = value
        return name


def returns_argument(node: fx.Node) -> bool:
    """Whether an operator gives its first argument back, the very same tensor: dropout in eval mode."""
    return node.target is torch.ops.aten.dropout.default and node.args[2:] == (False,)
