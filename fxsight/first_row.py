"""``block.output[0]`` of a language model: once a member of a tuple, with transformers 5 the first row of the batch."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from fxsight.address import Address
from fxsight.errors import FirstRowWarning
from fxsight.lines import user_line
from fxsight.program import Program
from fxsight.rows import batch_size
from fxsight.spec import TensorSpec
from fxsight.value import Value


def warn_of_row(program: Program, module: nn.Module, told: dict[Any, Any], value: Value, key: int) -> None:
    """Warn of an integer index that takes one of several rows of what a module of ``transformers`` returns.

    told: what has been said, so that each line is told once.
    """
    address, rows = value.cell.what, (*value.cell.spec.shape, 0)[0]
    if not isinstance(address, Address) or address.steps or address.port != "output" or address.keys:
        return
    if rows < 2 or not _is_batch(program, address):
        return
    if not type(module.get_submodule(address.module)).__module__.startswith("transformers."):
        return
    file, _, number = user_line().rpartition(":")
    warnings.warn_explicit(
        f"{address}[{key}] is one of {rows} rows of the batch: what this module returns is one tensor, where "
        f"older versions of the model returned a tuple; write .output for all rows, or .output[{key}:{key + 1}] for "
        "this one",
        FirstRowWarning,
        file or "<body>",
        int(number or 0),
        registry=told,
    )


def _is_batch(program: Program, address: Address) -> bool:
    """Whether the first dimension of a module's output counts the rows of the batch."""
    call = program.book.find(address.place)
    leaf: Any = call.output.leaves[0] if call is not None else None
    node = program.nodes.get(getattr(leaf, "node", ""))
    spec = None if node is None else node.meta["spec"]
    return isinstance(spec, TensorSpec) and bool(spec.shape) and spec.shape[0] == batch_size(program)
