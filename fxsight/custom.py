"""The backward of a ``torch.autograd.Function`` in the model, which no program has: it is refused, never guessed.

A program holds the operators of such a function's forward, and their gradients would be others than those that the
function computes. So where a gradient would flow through one of these operators, in a block or outside of it, an error
is raised; gradients that do not need it are as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import fx

from fxsight.book import Book, CustomFunction
from fxsight.errors import TraceError
from fxsight.node import origin_of
from fxsight.program import Program
from fxsight.tree import flatten


def custom_nodes(nodes: Iterable[fx.Node], book: Book) -> dict[fx.Node, CustomFunction]:
    """The operators that such functions have called, and by which of them; one that returns its input calls a view."""
    found: dict[fx.Node, CustomFunction] = {}
    for node in nodes if book.functions else ():
        origin = origin_of(node)
        if node.op == "call_function" and not origin.user:
            for one in book.functions:
                if one.start < origin.time < one.end:
                    found[node] = one
    return found


def refuse_backward(value: Any, function: CustomFunction, line: Callable[[], str] = str) -> None:
    """Gradients that would flow through some tensors, on from where they were made, raise TraceError from now on.

    line: the user's, where it is known.
    """

    def refuse(*_: Any) -> NoReturn:
        raise TraceError(": ".join(filter(None, [line(), said(function)])))

    for leaf in flatten(value)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_prehook(refuse)


def said(function: CustomFunction) -> str:
    """Why there is no gradient, and what to do."""
    return (
        f"a gradient would flow through {function.name}, a torch.autograd.Function that the model calls at "
        f"{function.line}: its backward is not part of the captured program, which has the operators of its forward "
        "alone; ask for gradients of what comes after it, write the function with plain operators "
        "(x + (y - x).detach() has the value of y and the gradient of x), or differentiate the module itself"
    )


def lost_results(program: Program) -> tuple[tuple[int, CustomFunction], ...]:
    """Results of a program that depend on what such a function has computed: their numbers, and one of them."""
    custom: dict[fx.Node, CustomFunction] = custom_nodes(program.graph.nodes, program.book)
    if not custom:
        return ()
    reached = dict(custom)
    for node in program.graph.nodes:
        above = next((reached[a] for a in node.all_input_nodes if a in reached), None)
        if above is not None and node.op != "output":
            reached.setdefault(node, above)
    return tuple((number, reached[node]) for number, node in enumerate(program.results) if node in reached)
