"""Run a program: bind weights, inputs and constants, call it, hand out plain tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fxsight.errors import InputError
from fxsight.lower import Lowered, Tier, eager, inductor, keeping
from fxsight.node import Fixed
from fxsight.program import Program
from fxsight.sizes import bind_sizes
from fxsight.tree import flatten

Fetch = Callable[[], torch.Tensor]


class Executable:
    """A finished program bound to a module: call it with inputs, get the saves in order.

    Prints as its program. ``tier`` says how it runs: "eager" is bitwise the module's own numbers, "inductor" within
    ``lower.TOLERANCE``. lock: held while the weights are looked up; another thread may be capturing the module.
    """

    def __init__(
        self,
        program: Program,
        module: nn.Module,
        constants: Sequence[torch.Tensor],
        tier: Tier,
        fixed: Mapping[str, int],
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self.program, self.module, self.tier = program, module, tier
        self.constants = list(constants)
        self.decided = False
        self._lock = nullcontext() if lock is None else lock
        self.fixed = dict(fixed)
        self._fetch = [
            self._fetcher(b.kind, b.key) for b in program.bindings.values() if b.kind in ("weight", "literal")
        ]
        self._order = [(b.kind, b.key) for b in program.bindings.values()]
        self._lowered: Lowered | None = eager(program) if tier == "eager" else None

    def bound(self, constants: Sequence[torch.Tensor], decided: bool) -> Executable:
        """The same program with constants of its own; ``decided``: its body has looked at numbers of one run."""
        own = copy.copy(self)
        own.constants, own.decided = list(constants), decided
        return own

    @property
    def history(self) -> tuple[str, ...]:
        """The passes that made the program, oldest first."""
        return self.program.history

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run on new inputs; returns the saves in order.

        Raises: InputError for inputs that the program does not hold for.
        """
        if self.decided:
            raise InputError("the body has looked at numbers, so its program holds for that one run; trace again")
        leaves, tree = flatten((args, kwargs))
        if tree != self.program.inputs:
            raise InputError(
                f"these inputs have another structure than those the program was made for: "
                f"{self.program.inputs.to_json()}"
            )
        sizes = bind_sizes(self.program, leaves)
        self._check_fixed(leaves, sizes)
        values = list(self.run(leaves, self.constants))
        free = iter(values)
        return tuple(
            self.program.outputs.build(
                [x.value if isinstance(x, Fixed) else next(free) for x in self.program.output_leaves]
            )
        )

    def _check_fixed(self, leaves: Sequence[Any], sizes: Mapping[str, int]) -> None:
        for leaf, given in zip(self.program.input_leaves, leaves, strict=True):
            if isinstance(leaf, Fixed) and leaf.value != given:
                raise InputError(
                    f"an input that is not a tensor is part of the program: it was {leaf.value!r}, not {given!r}"
                )
        for name, value in self.fixed.items():
            if sizes.get(name, value) != value:
                raise InputError(
                    f"the body looked at sizes, so its program holds for {name} = {value}, "
                    f"not {sizes[name]}; trace again"
                )

    def run(self, leaves: Sequence[Any], constants: Sequence[torch.Tensor]) -> Sequence[Any]:
        """The results, for input leaves that are known to fit: tensors of their own, no two the same."""
        arguments = self._arguments(leaves, constants)
        if self._lowered is None:
            self._lowered = inductor(self.program, arguments, self.fixed)
        return _own(self._lowered(*arguments), arguments)

    def run_keeping(self, leaves: Sequence[Any], constants: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Every value that is computed, by name of its node; in the eager tier."""
        return keeping(self.program)(*self._arguments(leaves, constants))

    def _arguments(self, leaves: Sequence[Any], constants: Sequence[torch.Tensor]) -> list[Any]:
        with self._lock:
            fetched = iter([fetch() for fetch in self._fetch])
        return [
            leaves[key] if kind == "input" else constants[key] if kind == "constant" else next(fetched)  # type: ignore[index]
            for kind, key in self._order
        ]

    def _fetcher(self, kind: str, key: str | int) -> Fetch:
        if kind == "literal":
            literal = self.program.literals[str(key)]
            return lambda: literal
        return weight_fetcher(self.module, str(key))

    def __str__(self) -> str:
        return self.program.text

    __repr__ = __str__


def _own(results: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Operators may return their argument itself (``dropout`` in eval): such a result is a copy."""
    taken = set(map(id, arguments))
    own: list[Any] = []
    for result in results:
        own.append(result.clone() if id(result) in taken and isinstance(result, torch.Tensor) else result)
        taken.add(id(result))
    return own


def weight_fetcher(module: nn.Module, name: str) -> Fetch:
    """Looks a parameter, buffer or tensor attribute up in the live module, at each call."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    for table in (owner._parameters, owner._buffers):
        if leaf in table:
            return lambda table=table: table[leaf]  # type: ignore[misc]
    return lambda: getattr(owner, leaf)
