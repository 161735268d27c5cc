"""Whether what a body writes has the shape of its place at other sizes than those it was recorded at.

A body is checked where it is written. Its program may be called with other sizes, where a value that the body writes
may not have grown with its place: two rows of a larger batch, a mean over the rows of a batch of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxsight.errors import InputError
from fxsight.intervention import Intervention, Write
from fxsight.program import Program
from fxsight.resize import resize
from fxsight.rules import Table
from fxsight.spec import TensorSpec
from fxsight.value import fake_mode


def check_writes(
    asked: Intervention, program: Program, rules: Table, sizes: Mapping[str, int], numbers: Sequence[Any]
) -> None:
    """Whether each written value still has the shape of its place; nothing runs.

    program: that the body was recorded on.  rules: what its calls do to shapes.  sizes: of the inputs.
    numbers: for the last of its constants, where numbers of the body vary.

    Raises: InputError at the line of the write.
    """
    if not asked.writes:
        return
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(asked.graph, nodes)
    named = {old.name: new for old, new in nodes.items()}
    given: dict[str, Any] = {named[read.name].name: _spec(program, read.location.node, sizes) for read in asked.reads}
    varying = asked.constants[len(asked.constants) - len(numbers) :]
    given.update((named[name].name, number) for (name, _), number in zip(varying, numbers, strict=True))
    mode = fake_mode()

    def fake(spec: TensorSpec) -> torch.Tensor:
        with mode:
            return torch.empty_strided(spec.numbers, spec.steps, dtype=spec.dtype, device=spec.device)

    unsure = resize(graph, given, rules, fake, lambda: mode)
    for write in asked.writes:
        if named[write.value] not in unsure:
            _check(write, named[write.value].meta["spec"], _spec(program, write.location.node, sizes))


def _check(write: Write, given: Any, there: TensorSpec) -> None:
    if isinstance(given, TensorSpec) and given.shape != there.shape:
        raise InputError(
            f"{write.line}: {write.location.address} is {there} for these inputs, and the body writes {given} there: "
            "what it writes does not have their sizes; trace again"
        )


def _spec(program: Program, node: str, sizes: Mapping[str, int]) -> TensorSpec:
    found: TensorSpec = program.nodes[node].meta["spec"].at(sizes)
    return found
