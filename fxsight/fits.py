"""Which calls a finished program holds for: those of its structure, with its plain values, at sizes that fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fxsight.errors import InputError
from fxsight.node import Fixed
from fxsight.program import Program
from fxsight.sizes import AGAIN, bind_sizes, given_text
from fxsight.tree import Tree, flatten
from fxsight.watch import kinds

Holds = Callable[[Mapping[str, int], Sequence[Any]], None]
_REMEMBERED = 4096  # kinds of inputs


class Fits:
    """The calls of one program.

    fixed: sizes that it holds for alone.  holds: asked for sizes that are new, and the numbers that vary; it raises
    InputError where the body does not hold for them.
    """

    def __init__(self, program: Program, fixed: Mapping[str, int]) -> None:
        self.program, self.fixed = program, dict(fixed)
        self.holds: Holds | None = None
        self._numbers: tuple[int | float, ...] = ()
        self._known: set[Any] = set()  # kinds of inputs that have been checked

    def with_numbers(self, numbers: tuple[int | float, ...]) -> Fits:
        """The same for other numbers that vary."""
        own = copy.copy(self)
        own._numbers, own._known = numbers, set()
        return own

    def check(self, sizes: Mapping[str, int]) -> None:
        """Whether what the body writes has the shapes of its places at these sizes.

        Raises: InputError.
        """
        if self.holds is not None:
            self.holds(sizes, self._numbers)

    def leaves(self, call: Any) -> list[Any]:
        """The leaves of a call.

        Raises: InputError for one that the program does not hold for.
        """
        leaves, tree = flatten(call)
        if tree != self.program.inputs:
            raise InputError(
                f"the program takes {self._takes()}, and is given {_call_text(tree, map(given_text, leaves))}; "
                "call it as the model was called in its trace"
            )
        same = kinds(leaves)
        if same is None or same not in self._known:
            sizes = bind_sizes(self.program, leaves)
            self._check_fixed(leaves, sizes)
            self.check(sizes)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known.add(same)
        return leaves

    def _takes(self) -> str:
        given = (repr(x.value) if isinstance(x, Fixed) else str(x) for x in self.program.input_leaves)
        return _call_text(self.program.inputs, given)

    def _check_fixed(self, leaves: Sequence[Any], sizes: Mapping[str, int]) -> None:
        for leaf, given in zip(self.program.input_leaves, leaves, strict=True):
            if isinstance(leaf, Fixed) and leaf.value != given:
                raise InputError(
                    f"an input that is not a tensor is part of the program: it was {leaf.value!r}, not {given!r}; "
                    f"{AGAIN}"
                )
        for name, value in self.fixed.items():
            if sizes.get(name, value) != value:
                raise InputError(
                    "the body looked at sizes, or uses a tensor of that size, so its program holds for "
                    f"{name} = {value}, not {sizes[name]}; trace again"
                )


def _call_text(inputs: Tree, leaves: Iterable[str]) -> str:
    """A call in words: ``(f32[batch, 4], mask=None)``."""
    given, (args, kwargs) = iter(leaves), inputs.children
    parts = [child.text([next(given) for _ in range(child.size)]) for child in (*args.children, *kwargs.children)]
    names = [*([""] * len(args.children)), *(f"{key}=" for key in kwargs.keys)]
    return f"({', '.join(name + part for name, part in zip(names, parts, strict=True))})"
