"""What a run of a program with backward passes leaves behind: the ``.grad`` of tensors that require gradients."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

from fxsight.editor import Editor
from fxsight.gradient import accumulate
from fxsight.program import Program

Filled = tuple[tuple[int, ...], ...]  # for each backward pass the numbers of the placeholders that get a gradient


def without_leaves(program: Program) -> tuple[Program, Filled]:
    """The program that returns gradients of leaves instead of giving them away, and whose they are."""
    calls = [n for n in program.results if n.target is accumulate]
    if not calls:
        return program, ()
    places = {n.name: i for i, n in enumerate(n for n in program.graph.nodes if n.op == "placeholder")}
    editor = Editor(program, program.history[-1])
    editor.keeps_order = True
    mine = [editor.nodes[n.name] for n in calls]
    gradients: list[fx.Node] = [g for n in mine for g in n.args[1]]  # type: ignore[union-attr, misc]
    editor.returns([*(n for n in editor.results if n.target is not accumulate), *gradients])
    for node in mine:
        editor.erase(node)
    return editor.finish(), tuple(tuple(places[leaf.name] for leaf in n.args[0]) for n in calls)  # type: ignore[union-attr]


def fill(filled: Filled, arguments: Sequence[Any], results: list[Any]) -> None:
    """Take the gradients off the end of the results, and add them to those of the leaves."""
    count = sum(map(len, filled))
    gradients = iter(results[len(results) - count :])
    del results[len(results) - count :]
    for places in filled:
        accumulate([arguments[i] for i in places], [next(gradients) for _ in places])


@contextmanager
def apart() -> Generator[None]:
    """A program with gradients in it runs as it is: nothing is differentiated again, nothing is cast."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
