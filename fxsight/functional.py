"""A finished program as a pure function of its inputs, constants and parameters, for ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxsight.custom import lost_results, said
from fxsight.effects import mutated_storages, storages
from fxsight.errors import InputError, TraceError, nearest
from fxsight.gradient import custom_function
from fxsight.lower import eager
from fxsight.node import binding_of
from fxsight.program import Program


class Functional:
    """``f(inputs, constants, parameters)`` returns the saves in order; nothing else goes in or out.

    inputs: a tuple of the positional arguments of the model; keyword arguments are given as such, after the others.
    constants: the tensors that the body used, in its order.  parameters: tensors by their names in the module; those
    that are not given are the module's. The attributes ``constants`` and ``parameters`` are those of the trace.

    Raises, when called: InputError for what the program does not hold for.
    """

    def __init__(
        self,
        program: Program,
        leaves: Callable[[Any], Sequence[Any]],
        build: Callable[[Sequence[Any]], tuple[Any, ...]],
        constants: Sequence[torch.Tensor],
        numbers: Sequence[int | float],
        parameters: Mapping[str, torch.Tensor],
    ) -> None:
        _check_pure(program)
        self.constants, self.parameters = tuple(constants), dict(parameters)
        self._program, self._leaves, self._build, self._numbers = program, leaves, build, tuple(numbers)
        self._run = eager(program)

    def __call__(
        self,
        inputs: Sequence[Any],
        constants: Sequence[torch.Tensor] = (),
        parameters: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """The saves, in order, of these tensors."""
        leaves = self._leaves((tuple(inputs), kwargs))
        weights = self._weights({} if parameters is None else parameters)
        given = (*self._checked(constants), *self._numbers)
        found: Mapping[str, Any] = {
            "input": leaves,
            "constant": given,
            "weight": weights,
            "literal": self._program.literals,
        }
        bindings: Any = self._program.bindings.values()
        return self._build(list(self._run(*(found[b.kind][b.key] for b in bindings))))

    def _weights(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in parameters.items():
            if name not in self.parameters:
                raise InputError(
                    f"the program uses no parameter {name!r}; {nearest(name, self.parameters)}".rstrip("; ")
                )
            _check(f"the parameter {name!r}", tensor, self.parameters[name])
        return {**self.parameters, **parameters}

    def _checked(self, constants: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if len(constants) != len(self.constants):
            raise InputError(
                f"the program takes {len(self.constants)} constants, the tensors that its body used, and is given "
                f"{len(constants)}; those of the trace are `.constants`"
            )
        for number, (tensor, was) in enumerate(zip(constants, self.constants, strict=True)):
            _check(f"constant {number}", tensor, was)
        return constants


def _check(what: str, tensor: torch.Tensor, was: torch.Tensor) -> None:
    if tensor.shape != was.shape or tensor.dtype != was.dtype:
        raise InputError(f"{what} was {_text(was)} in the trace, and is given as {_text(tensor)}")


def _text(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _check_pure(program: Program) -> None:
    """Raises: TraceError for a program that changes what it is given, or whose derivatives would be others."""
    lost = lost_results(program)
    if lost:
        raise TraceError(said(lost[0][1]))
    if any(node.target is custom_function for node in program.graph.nodes):
        raise TraceError(
            "no pure function: the body calls a torch.autograd.Function, whose backward is known in its block alone; "
            "write the function with plain operators (x + (y - x).detach() has the value of y and the gradient of x)"
        )
    changed = mutated_storages(program.graph.nodes)
    for node in program.graph.nodes:
        if node.op == "placeholder" and storages(node) & changed:
            raise TraceError(
                f"no pure function: the model changes {binding_of(node).key!r} in place; put the model in eval mode, "
                "or trace a submodule that does not"
            )
