"""What is known of the bodies of one program: a tree, each step of it a statement and what it gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch

from fxsight.address import Address
from fxsight.cell import Cell, Ended
from fxsight.mould import Mould
from fxsight.run import Executable
from fxsight.spec import TensorSpec
from fxsight.tree import flatten
from fxsight.value import Members, Value, shaped

WAYS = 256  # kept after one statement; a body whose numbers vary more is recorded each time


class Unknown(Exception):
    """A statement that cannot be remembered; never seen outside."""


class Number(int):
    """The number of a value among those of a step."""


@dataclass(frozen=True)
class Finish:
    """The end of a way: the program, which tensors are its constants, which value gets which result.

    learning: of a program with backward passes, what required gradients when it was made.
    """

    executable: Executable
    constants: tuple[int, ...]
    results: tuple[tuple[int, int], ...]
    learning: Any = None


@dataclass(eq=False)
class Step:
    """One statement, and the ways on from it.

    kind: "none", "plain", "same", "one", "many" or "fields"; data: what the statement gave, for that kind.
    whats, specs, shapes: per value made, its name in messages, its spec, and what it is made from.
    before: the statement before it.  first: the number of the first value it makes.
    """

    kind: str = "none"
    data: Any = None
    line: str = ""
    whats: tuple[str, ...] = ()
    specs: tuple[TensorSpec, ...] = ()
    shapes: tuple[tuple[Any, ...], ...] = ()
    before: Step | None = None
    first: int = 0
    ways: dict[Any, Step] = field(default_factory=dict[Any, "Step"])
    finish: Finish | None = None

    def go_on(self, key: Any, step: Step, first: int) -> None:
        """A way on, by a statement that was not known here; ``first``: the number of the first value it makes."""
        if len(self.ways) >= WAYS:
            self.ways.clear()
        step.before, step.first = self, first
        self.ways[key] = step

    def cell_of(self, index: int) -> Cell:
        """The cell of a value of an ended body that came here: its name and its spec."""
        step: Step | None = self
        while step is not None and not step.first <= index < step.first + len(step.specs):
            step = step.before
        assert step is not None, "every value was made by a statement"
        number = index - step.first
        return Cell(cast(Any, Ended()), step.specs[number], cast(Any, None), step.whats[number], step.line)


def described(result: Any, line: str, read_at: Address | None) -> tuple[Step, list[Value]]:
    """The step that a statement makes, from what it gave, and the values that it has made.

    read_at: the port of a statement that is a read.

    Raises: Unknown for what cannot be made again.
    """
    leaves, tree = flatten(result)
    is_read = tree.kind == "fields" and read_at is not None
    if type(result) not in (Value, tuple, list, Members) and tree.kind not in ("leaf", "structseq") and not is_read:
        raise Unknown
    numbers: list[Any] = []
    values: list[Value] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and (type(leaf) is not Value or leaf.walk is not None):
            raise Unknown  # a tensor of the user's, or a value that has been there before
        numbers.append(Number(len(values)) if type(leaf) is Value else leaf)
        values += [leaf] if type(leaf) is Value else []
    if not values and type(result) is list:
        raise Unknown
    if not values:
        return Step("plain", result, line), []
    is_members = type(result) is Members
    if is_members and any(child.kind != "leaf" for child in tree.children):
        raise Unknown
    whats, specs = tuple(str(v.cell.what) for v in values), tuple(v.cell.spec for v in values)
    kind = "one" if tree.kind == "leaf" else "many"
    data: Any = None if kind == "one" else (tree, tuple(numbers), is_members)
    if is_read:
        kind, data = "fields", (Mould(tree), tuple(numbers), read_at)
    return Step(kind, data, line, whats, specs, tuple(map(shaped, specs))), values
