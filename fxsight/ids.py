"""What a generation returns, as one more step of it: a program that is given the ids and returns them."""

from __future__ import annotations

import torch
from torch import fx

from fxsight.book import Book, Call, Ref, Structure
from fxsight.node import Binding, Origin, Size
from fxsight.program import Program
from fxsight.rehearsal import Known
from fxsight.spec import TensorSpec, symbol
from fxsight.tree import LEAF, Tree

_ARGUMENTS = Tree("tuple", "", (0, 1), (Tree("tuple", "", (0,), (LEAF,)), Tree("dict")))


def result_of(batch: int, length: int, device: str) -> Known:
    """The step that comes after all others: ids, i64[batch, length]; length as it is if nothing ends early."""
    sizes = (symbol("batch"), symbol("length"))
    spec = TensorSpec(torch.int64, sizes, (sizes[1], 1), device, "ids")
    graph = fx.Graph()
    ids = graph.placeholder("ids")
    ids.meta.update(spec=spec, binding=Binding("input", 0), origin=Origin())
    graph.output((ids,))
    leaf = Structure(LEAF, (Ref("ids"),))
    inputs = Structure(_ARGUMENTS, (Ref("ids"),))
    root = Call(0, None, "module", "root", 0, "", 0, "generate", "", None, inputs, leaf, 0, 1)
    program = Program(
        "generate", graph, _ARGUMENTS, (spec,), LEAF, (None,), (Size("batch"), Size("length")), (), Book((root,))
    )
    kinds = ((torch.Size((batch, length)), torch.int64, torch.device(device)),)
    return Known(program, {"batch": batch, "length": length}, _ARGUMENTS, kinds, {})
