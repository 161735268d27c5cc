"""Random programs over a model's locations, causal by construction."""

import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tests.oracle import Port, intercepted
from tests.programs import (
    INPLACE,
    OPS,
    AssignStep,
    Const,
    InplaceStep,
    Number,
    OpStep,
    Place,
    Program,
    ReadStep,
    SaveStep,
    Step,
    Value,
)


def places(net: nn.Module, ids: Tensor, paths: Sequence[str] | None = None) -> tuple[Place, ...]:
    """The locations of a model that hold f32[batch, length, width], in the order the forward reaches them.

    paths: modules to consider; every module, the model itself included, if None.
    """
    seen: list[Place] = []

    def visit(path: str, port: Port, live: Tensor) -> Tensor:
        if live.is_floating_point() and live.dim() == 3:
            seen.append(Place(path, port, live.shape[-1]))
        return live

    ports: tuple[Port, Port] = ("input", "output")
    names = [name for name, _ in net.named_modules()] if paths is None else paths
    with ExitStack() as stack, torch.no_grad():
        for path, port in itertools.product(names, ports):
            stack.enter_context(intercepted(net, path, port, partial(visit, path, port)))
        net(ids)
    return tuple(seen)


def random_program(seed: int, at: Sequence[Place], size: int = 12) -> Program:
    """A program that is causal by construction: a write uses only what is read at its location or before it.

    seed: the same seed and places give the same program.  at: in execution order, as `places` gives them.
    size: about how many statements before the saves; at least one of them writes. Statements about different
    locations stand in any order.
    """
    draft = _Draft(random.Random(seed), tuple(at))
    kinds: list[Callable[[], object]] = [draft.read, draft.compute, draft.assign, draft.edit]
    draft.read()
    for make in draft.rng.choices(kinds, weights=(3, 3, 2, 3), k=size - 2):
        make()
    draft.rng.choice([draft.assign, draft.edit])()
    draft.save()
    return tuple(draft.steps)


@dataclass(frozen=True)
class _Var:
    """A variable of a draft; since: index of the place from which on it is known."""

    name: str
    width: int
    since: int
    is_row: bool = False


@dataclass
class _Draft:
    """A random program being written. Every method appends statements."""

    rng: random.Random
    at: tuple[Place, ...]
    steps: list[Step] = field(default_factory=list)
    vars: list[_Var] = field(default_factory=list)

    def read(self, index: int | None = None) -> _Var:
        """Read at a place, any if None."""
        index = self.rng.randrange(len(self.at)) if index is None else index
        place = self.at[index]
        var = self._new(place.width, index)
        self.steps.append(ReadStep(var.name, place.path, place.port))
        return var

    def compute(self) -> None:
        """A new value from one or two of the earlier ones."""
        known = [var for var in self.vars if not var.is_row]
        first = self.rng.choice(known)
        self._op(self.rng.choice([name for name in OPS if OPS[name].arity]), first, known)

    def assign(self) -> None:
        """Replace the value at some place, mostly by something made for it."""
        index = self.rng.randrange(len(self.at))
        var = self._row(index) if self.rng.random() < 0.1 else self._known_at(index)
        place = self.at[index]
        self.steps.append(AssignStep(place.path, place.port, var.name))

    def edit(self) -> None:
        """Edit the value at some place in place."""
        index = self.rng.randrange(len(self.at))
        how = self.rng.choice(list(INPLACE))
        value = self._value(self.rng.choice(INPLACE[how].values), index)
        place = self.at[index]
        self.steps.append(InplaceStep(place.path, place.port, how, value))

    def save(self) -> None:
        """Save some of the variables, in a random order."""
        names = [var.name for var in self.vars if not var.is_row]
        chosen = self.rng.sample(names, self.rng.randint(1, len(names)))
        self.steps.extend(SaveStep(name) for name in chosen)

    def _known_at(self, index: int) -> _Var:
        """A variable of a place's width, known when the forward gets there: an old one, or one made now."""
        fits = [v for v in self.vars if not v.is_row and v.width == self.at[index].width and v.since <= index]
        if fits and self.rng.random() < 0.6:
            return self.rng.choice(fits)
        earlier = [i for i in range(index + 1) if self.at[i].width == self.at[index].width]
        source = self.read(self.rng.choice(earlier))
        return self._op(self.rng.choice([name for name in OPS if OPS[name].arity]), source, [*fits, source])

    def _op(self, name: str, first: _Var, known: Sequence[_Var]) -> _Var:
        """Apply an operation to a variable and, if it takes two, to another of the same width."""
        args = [first]
        if OPS[name].arity == 2:
            others = [var for var in known if var.width == first.width and var != first]
            args.append(self.rng.choice(others or args))
        var = self._new(first.width, max(arg.since for arg in args))
        const = self._const(OPS[name].const, first.width)
        self.steps.append(OpStep(var.name, name, tuple(arg.name for arg in args), const))
        return var

    def _row(self, index: int) -> _Var:
        """A tensor of the user's that is broadcast when it is assigned."""
        var = self._new(self.at[index].width, 0, is_row=True)
        self.steps.append(OpStep(var.name, "constant", (), self._const("row", var.width)))
        return var

    def _new(self, width: int, since: int, is_row: bool = False) -> _Var:
        var = _Var(f"v{len(self.vars)}", width, since, is_row)
        self.vars.append(var)
        return var

    def _value(self, kind: str, index: int) -> Value:
        return self._known_at(index).name if kind == "var" else self._const(kind, self.at[index].width)

    def _const(self, kind: str, width: int) -> Const | Number | None:
        match kind:
            case "none":
                return None
            case "number":
                return round(self.rng.uniform(-1.5, 1.5), 2)
            case _:
                return Const(self.rng.randrange(1000), (width, width) if kind == "matrix" else (width,))
