"""Run a program: bind weights, inputs and constants, call it, hand out plain tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from fxsight.accumulate import apart, fill, without_leaves
from fxsight.artifacts import Artifacts
from fxsight.auto import Auto, Tier
from fxsight.custom import custom_nodes, lost_results, refuse_backward
from fxsight.errors import InputError, TraceError
from fxsight.fewer import Fewer
from fxsight.fits import Fits, Holds
from fxsight.functional import Functional
from fxsight.leave import Leaving
from fxsight.lower import Lowering, keeping
from fxsight.narrowed import Narrowed
from fxsight.node import Fixed
from fxsight.own_memory import no_arguments
from fxsight.program import Program
from fxsight.text import Text
from fxsight.tolerance import Difference


class Executable:
    """A finished program bound to a module: call it with inputs, get the saves in order.

    Prints as its program. ``tier`` says how it runs: "eager" is bitwise the module's own numbers, "inductor" within
    ``lower.TOLERANCE``. lock: held while the weights are looked up; another thread may be capturing the module.
    is_joint: whether gradients are computed in it: then nothing of its run is kept for others.
    keeps: whether the last results are the caches that the call is given, as it leaves them.
    narrowed: what runs instead where this program would give other bits.  fewer: what computes fewer rows and gives the
    same bits; runs where nothing requires gradients, which reach all rows.
    auto: what runs it where ``tier`` says how it begins.
    """

    def __init__(
        self,
        program: Program,
        module: nn.Module,
        constants: Sequence[torch.Tensor],
        tier: Tier,
        fixed: Mapping[str, int],
        artifacts: Artifacts | None = None,
        lock: AbstractContextManager[object] | None = None,
        is_joint: bool = False,
        keeps: bool = False,
        narrowed: Narrowed | None = None,
        fewer: Fewer | None = None,
        auto: Auto | None = None,
    ) -> None:
        self.program, self.module, self._narrowed, self._fewer = program, module, narrowed, fewer
        self.constants = list(constants)
        self.decided = False
        self._numbers: tuple[int | float, ...] = ()
        self._lock = nullcontext() if lock is None else lock
        self._fits = Fits(program, fixed)
        bindings = list(enumerate(program.bindings.values()))
        self._places: list[Any] = [program.literals.get(str(b.key)) for _, b in bindings]
        self._weights = Weights(module, [str(b.key) for _, b in bindings if b.kind == "weight"])
        self._weight_places = [i for i, b in bindings if b.kind == "weight"]
        self._inputs = [(i, int(b.key)) for i, b in bindings if b.kind == "input"]
        self._constants = [(i, int(b.key)) for i, b in bindings if b.kind == "constant"]
        self._plain, self._filled = without_leaves(program)
        self._is_joint = is_joint
        self._lowering = Lowering(self._plain, tier, fixed, artifacts or Artifacts(), auto)
        self._lost = () if is_joint else lost_results(self._plain)
        self._left = len(program.book.left) if keeps else 0
        self._leave = Leaving(program)

    def bound(self, constants: Sequence[torch.Tensor], decided: bool) -> Executable:
        """The same program with constants of its own; ``decided``: its body has looked at numbers of one run."""
        own = copy.copy(self)
        own.constants, own.decided = list(constants), decided
        return own

    def with_numbers(self, numbers: Sequence[int | float]) -> Executable:
        """The same program with numbers for the last of its constants."""
        own = copy.copy(self)
        own._numbers = tuple(numbers)
        own._fits = self._fits.with_numbers(own._numbers)
        return own

    def checking(self, holds: Holds) -> Executable:
        """This program; ``holds`` is asked for sizes that are new, and the numbers that vary.

        It raises InputError where the body does not hold for them.
        """
        self._fits.holds = holds
        return self

    def check(self, sizes: Mapping[str, int]) -> None:
        """Whether what the body writes has the shapes of its places at these sizes.

        Raises: InputError.
        """
        self._fits.check(sizes)

    @property
    def fixed(self) -> Mapping[str, int]:
        """Sizes that the program holds for alone."""
        return self._fits.fixed

    @property
    def tier(self) -> Tier:
        """How it runs: "eager" or "inductor"; with ``backend="auto"`` how it has run the last time."""
        return self._lowering.tier

    @property
    def difference(self) -> Difference | None:
        """How far compiled results were from the exact ones, where ``backend="auto"`` has computed both."""
        return self._lowering.difference

    def explain(self) -> Text:
        """How it runs, and with ``backend="auto"`` how often in each tier, what was compared, what is in the way."""
        return Text(self._lowering.explain())

    def compile_whole(self) -> None:
        """From the next run on, run the program compiled in one piece, and not region by region.

        Worth its long compilation for a small program that is called very often. All who share the program, that is,
        later traces with an equal body and backend, run it so, too. The numbers stay within ``lower.TOLERANCE``.

        Raises: TraceError when the program runs op by op (tier "eager").
        """
        self._lowering.compile_whole()

    @property
    def history(self) -> tuple[str, ...]:
        """The passes that made the program, oldest first."""
        return self.program.history

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run on new inputs; returns the saves in order.

        Raises: InputError for inputs that the program does not hold for.
        """
        self._check_undecided()
        return self.build(self.run(self._fits.leaves((args, kwargs)), self.constants, (args, kwargs)))

    def functional(self) -> Functional:
        """The same as a pure function ``f(inputs, constants, parameters)``, for ``torch.func``; op by op.

        Raises: TraceError for a body with a backward pass, and for a model that changes a buffer or input in place.
        InputError for a body that has looked at numbers.
        """
        self._check_undecided()
        if self._is_joint:
            raise TraceError(
                "a body with a backward pass is no pure function for torch.func: leave the pass out of the body, and "
                "differentiate the function, torch.func.grad(...)"
            )
        weights = dict(zip(self._weights.names, self._weights(), strict=True))
        return Functional(self._plain, self._fits.leaves, self.build, self.constants, self._numbers, weights)

    def _check_undecided(self) -> None:
        if self.decided:
            raise InputError("the body has looked at numbers, so its program holds for that one run; trace again")

    def build(self, results: Sequence[Any]) -> tuple[Any, ...]:
        """The saves, in order, of which these are the tensors."""
        free = iter(results)
        leaves = [x.value if isinstance(x, Fixed) else next(free) for x in self.program.output_leaves]
        return tuple(self.program.outputs.build(leaves))

    def run(
        self,
        leaves: Sequence[Any],
        constants: Sequence[torch.Tensor],
        call: Any = None,
        prepared: list[Any] | None = None,
    ) -> Sequence[Any]:
        """The results, for input leaves that are known to fit: tensors of their own, no two the same.

        call: the arguments that the leaves are of; the caches among them are then as the module would leave them.
        prepared: what ``prepared`` has returned, where the weights cannot have changed since.
        """
        whole = None if self._narrowed is None else self._narrowed.instead(leaves)
        if whole is not None:
            found: Sequence[Any] = whole.run(leaves, constants, call)
            return found
        arguments = self._arguments(leaves, constants, prepared)
        exact = None
        if self._lowering.auto is not None:
            exact = partial(self._exactly, leaves, constants, arguments)
        elif (fewer := self._instead(leaves, arguments)) is not None:
            same: Sequence[Any] = fewer.run(leaves, [*constants, *self._numbers], call)
            return same
        if self._is_joint:
            with apart():
                results = list(self._lowering(arguments))
            fill(self._filled, arguments, results)
        else:
            results = list(self._lowering(arguments, exact))
            for number, function in self._lost:
                refuse_backward(results[number], function)
        if not self._left:
            return no_arguments(results, arguments)
        results, left = results[: -self._left], results[-self._left :]
        if call is not None:
            self._leave(call, leaves, left)
        return no_arguments(results, [*arguments, *left])

    def _instead(self, leaves: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """What computes fewer rows on these inputs, to the same bits."""
        found = None if self._fewer is None else self._fewer.instead(leaves)
        if found is None or not torch.is_grad_enabled():
            return found
        return None if any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments) else found

    def _exactly(
        self, leaves: Sequence[Any], constants: Sequence[torch.Tensor], arguments: Sequence[Any]
    ) -> Sequence[Any] | None:
        """The same results op by op from fewer rows; None where nothing is known to do that."""
        fewer = self._instead(leaves, arguments)
        if fewer is None:
            return None
        found: Sequence[Any] = fewer._lowering(fewer._arguments(leaves, [*constants, *self._numbers]))
        return found

    def run_keeping(self, leaves: Sequence[Any], constants: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Every value that is computed, by name of its node; in the eager tier."""
        with apart() if self._is_joint else nullcontext():
            values = keeping(self._plain)(*self._arguments(leaves, constants))
        for node, function in custom_nodes(self._plain.graph.nodes, self._plain.book).items():
            refuse_backward(values[node.name], function)
        return values

    def prepared(self) -> list[Any]:
        """The arguments with the weights, as they are now, in their places."""
        arguments = self._places.copy()
        with self._lock:
            weights = self._weights()
        for place, weight in zip(self._weight_places, weights, strict=True):
            arguments[place] = weight
        return arguments

    def _arguments(
        self, leaves: Sequence[Any], constants: Sequence[torch.Tensor], prepared: list[Any] | None = None
    ) -> list[Any]:
        arguments = self.prepared() if prepared is None else prepared.copy()
        for place, key in self._inputs:
            arguments[place] = leaves[key]
        given = [*constants, *self._numbers] if self._numbers else constants
        for place, key in self._constants:
            arguments[place] = given[key]
        return arguments

    def __str__(self) -> str:
        return self.program.text

    __repr__ = __str__


class Weights:
    """The parameters, buffers and tensor attributes of a module by name, looked up anew each time.

    So what was moved, replaced, or swapped with the module that holds it is seen.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module, self.names = module, tuple(names)
        split = [name.rpartition(".") for name in names]
        owners = {path: number for number, path in enumerate(dict.fromkeys(path for path, _, _ in split))}
        self._owners = [path.split(".") if path else [] for path in owners]
        self._leaves = [(owners[path], leaf) for path, _, leaf in split]

    def __call__(self) -> list[torch.Tensor]:
        """The tensors, in the order of the names.

        Raises: InputError for one that the module has no more.
        """
        owners = [self._owner(path) for path in self._owners]
        tables = [owner._parameters for owner in owners]
        found = [tables[number].get(leaf) for number, leaf in self._leaves]
        rows = zip(found, self._leaves, strict=True)
        return [self._other(owners[n], leaf, n) if tensor is None else tensor for tensor, (n, leaf) in rows]

    def _owner(self, path: Sequence[str]) -> Any:
        found: Any = self._module
        for part in path:
            below = found._modules.get(part)
            if below is None:
                raise InputError(f"the program needs the module {'.'.join(path)!r}, which the model has no more")
            found = below
        return found

    def _other(self, owner: Any, leaf: str, number: int) -> Any:
        """A buffer, or an attribute: plain, or computed as a parametrised weight is."""
        found = owner._buffers.get(leaf)
        found = getattr(owner, leaf, None) if found is None else found
        if found is None:
            name = ".".join([*self._owners[number], leaf])
            raise InputError(f"the program needs {name!r}, which the model has no more")
        return found
