"""Random scripts: traces one after the other, invokes with edits of their own, skips and numbers on demand.

A script is data. `run_with_hooks` says what it means with plain hooks on the joined batch; `describe` prints it as its
user would write it. Steps are those of the random programs, and two more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests import oracle, programs, random_programs
from tests.programs import INPLACE, OPS, AssignStep, Const, InplaceStep, OpStep, Place, ReadStep, SaveStep, Step


@dataclass(frozen=True)
class SkipStep:
    """model.<path>.skip(var)"""

    path: str
    var: str


@dataclass(frozen=True)
class NumberStep:
    """var = of * (2.0 if of.mean() > 0 else 0.5), with the number that the steps so far give."""

    var: str
    of: str


AnyStep = Step | SkipStep | NumberStep


@dataclass(frozen=True)
class Invoke:
    """One block: its prompts, and what it does with them."""

    batch: int
    seed: int
    steps: tuple[AnyStep, ...]

    def ids(self, length: int = 5) -> Tensor:
        """i64[batch, length], the same each time."""
        return torch.randint(0, 97, (self.batch, length), generator=torch.Generator().manual_seed(self.seed))


Trace = tuple[Invoke, ...]  # one is written without invokes
Script = tuple[Trace, ...]  # several are in a session


def describe(script: Script) -> str:
    """The script as its user would write it."""
    lines: list[str] = []
    for trace in script:
        lines.append("with model.trace() as tracer:")
        for invoke in trace:
            lines.append(f"    with tracer.invoke(ids{[invoke.batch, 5]}):")
            lines += [f"        {_line(step)}" for step in invoke.steps] or ["        pass"]
    return "\n".join(lines)


def _line(step: AnyStep) -> str:
    match step:
        case SkipStep(path, var):
            return f"model.{path}.skip({var})"
        case NumberStep(var, of):
            return f"{var} = {of} * (2.0 if {of}.mean() > 0 else 0.5)"
        case _:
            return programs.describe([step]).splitlines()[1].strip()


# ----------------------------------------------------------------------------------------------------- what it means


def run_with_hooks(script: Script, net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The saved values in order, and the logits of each trace, computed without gradients."""
    known: dict[str, Tensor] = {}
    saved: list[Tensor] = []
    logits: list[Tensor] = []
    for trace in script:
        values, out = _forward(_decided(trace, net, known), net, known)
        for step in (step for invoke in trace for step in invoke.steps):
            if isinstance(step, (ReadStep, OpStep, NumberStep)):
                known[step.var] = values.of(step.var)
            elif isinstance(step, SaveStep):
                saved.append(values.of(step.var))
        logits.append(out)
    return saved, logits


def _decided(trace: Trace, net: nn.Module, known: Mapping[str, Tensor]) -> Trace:
    """The trace with a factor for each number: what a forward with the steps before it says."""
    done: list[Invoke] = []
    for invoke in trace:
        steps: list[AnyStep] = []
        for step in invoke.steps:
            if isinstance(step, NumberStep):
                values, _ = _forward((*done, replace(invoke, steps=tuple(steps))), net, known)
                factor = 2.0 if values.of(step.of).mean() > 0 else 0.5
                steps.append(OpStep(step.var, "scale", (step.of,), factor))
            else:
                steps.append(step)
        done.append(replace(invoke, steps=tuple(steps)))
    return tuple(done)


def _forward(trace: Trace, net: nn.Module, known: Mapping[str, Tensor]) -> tuple[_Values, Tensor]:
    values = _Values([step for invoke in trace for step in invoke.steps], dict(known))
    visits: dict[tuple[str, oracle.Port], list[tuple[AnyStep, slice]]] = {}
    start = 0
    for invoke in trace:
        rows = slice(start, start + invoke.batch)
        start += invoke.batch
        for step in invoke.steps:
            if isinstance(step, SkipStep):
                step = AssignStep(step.path, "output", step.var)
            if isinstance(step, (ReadStep, AssignStep, InplaceStep)):
                visits.setdefault((step.path, step.port), []).append((step, rows))
    with ExitStack() as stack, torch.no_grad():
        for (path, port), here in visits.items():
            stack.enter_context(oracle.intercepted(net, path, port, partial(values.visit, here)))
        logits: Tensor = net(torch.cat([invoke.ids() for invoke in trace]))
    return values, logits


class _Values:
    """The variables of one trace while its forward runs."""

    def __init__(self, steps: Iterable[AnyStep], known: dict[str, Tensor]) -> None:
        self._ops = {step.var: step for step in steps if isinstance(step, OpStep)}
        self._known = known

    def visit(self, here: Sequence[tuple[AnyStep, slice]], live: Tensor) -> Tensor:
        """Do the steps of one location, each on its rows of the live tensor."""
        for step, rows in here:
            match step:
                case ReadStep():
                    self._known[step.var] = live[rows].clone()
                case AssignStep():
                    live = live.clone(memory_format=torch.contiguous_format)
                    live[rows] = self.of(step.var)
                case InplaceStep(value=None):
                    INPLACE[step.how].fn(live[rows])
                case InplaceStep():
                    INPLACE[step.how].fn(live[rows], self._operand(step.value))
        return live

    def of(self, var: str) -> Tensor:
        """A variable's value, computed from the reads so far."""
        if var not in self._known:
            step = self._ops[var]
            consts = () if step.const is None else (self._operand(step.const),)
            with torch.no_grad():
                self._known[var] = OPS[step.fn_name].fn(*map(self.of, step.arg_vars), *consts)
        return self._known[var]

    def _operand(self, value: programs.Value) -> Any:
        return self.of(value) if isinstance(value, str) else value.tensor() if isinstance(value, Const) else value


# --------------------------------------------------------------------------------------------------- making them up


@dataclass(frozen=True)
class _Var:
    """A variable that later blocks may use; since: index of the place from which on it is known."""

    var: random_programs._Var
    batch: int
    since: int


def random_script(seed: int, at: Sequence[Place]) -> Script:
    """One or two traces of one to three invokes; values flow between all of them where that is causal."""
    rng = random.Random(seed)
    made: list[_Var] = []
    script: list[Trace] = []
    for _ in range(rng.choice((1, 1, 2))):
        trace: list[Invoke] = []
        batches = [rng.choice((1, 2, 2)) for _ in range(rng.choice((1, 2, 2, 3)))]
        for batch in batches:
            steps, made = _block(rng, tuple(at), batch, made)
            trace.append(Invoke(batch, rng.randrange(1000), steps))
        script.append(tuple(trace))
        made = [replace(var, since=0) for var in made]
    return tuple(script)


def _block(
    rng: random.Random, at: tuple[Place, ...], batch: int, made: list[_Var]
) -> tuple[tuple[AnyStep, ...], list[_Var]]:
    """The steps of one block, and the variables after it."""
    skipped = _skippable(rng, at) if rng.random() < 0.35 else None
    there = [i for i, place in enumerate(at) if skipped is None or not place.path.startswith(f"{skipped}.")]
    draft = random_programs._Draft(rng, tuple(at[i] for i in there))
    taken = len(made)
    draft.vars = [random_programs._Var(f"_{n}", 0, 10**6, True) for n in range(taken)]  # names stay unique
    usable = [v for v in made if v.batch == batch and not v.var.is_row]
    draft.vars += [replace(v.var, since=sum(i < v.since for i in there)) for v in usable]
    first = len(draft.vars)
    steps: list[AnyStep] = draft.steps  # type: ignore[assignment]
    draft.read()
    if skipped is not None:
        index = next(n for n, i in enumerate(there) if (at[i].path, at[i].port) == (skipped, "output"))
        steps.append(SkipStep(skipped, draft._known_at(index).name))
    kinds: list[Callable[[], object]] = [draft.read, draft.compute, draft.assign, draft.edit, partial(_number, draft)]
    for make in rng.choices(kinds, weights=(3, 3, 2, 3, 1), k=rng.randint(2, 8)):
        make()
    new = draft.vars[first:]
    for var in rng.sample([v for v in new if not v.is_row], 1):
        steps.append(SaveStep(var.name))
    names = {v.name: f"v{taken + n}" for n, v in enumerate(new)}
    kept = [_Var(replace(v, name=names[v.name]), batch, there[min(v.since, len(there) - 1)]) for v in new]
    return tuple(_renamed(step, names) for step in steps), [*made, *kept]


def _skippable(rng: random.Random, at: Sequence[Place]) -> str:
    """A module with others inside, whose output is a place."""
    outputs = [p.path for p in at if p.port == "output" and p.path]
    return rng.choice([p for p in outputs if any(q.path.startswith(f"{p}.") for q in at)])


def _number(draft: random_programs._Draft) -> None:
    """A decision on a number."""
    of = draft.rng.choice([var for var in draft.vars if not var.is_row])
    var = draft._new(of.width, of.since)
    draft.steps.append(NumberStep(var.name, of.name))  # type: ignore[arg-type]


def _renamed(step: AnyStep, names: Mapping[str, str]) -> AnyStep:
    """The step with the names that its new variables have in the whole script."""
    new = names.get
    match step:
        case ReadStep() | SaveStep() | AssignStep() | SkipStep():
            return replace(step, var=new(step.var, step.var))
        case NumberStep():
            return NumberStep(new(step.var, step.var), new(step.of, step.of))
        case OpStep():
            return replace(step, var=new(step.var, step.var), arg_vars=tuple(new(a, a) for a in step.arg_vars))
        case InplaceStep(value=str()):
            return replace(step, value=new(str(step.value), str(step.value)))
        case _:
            return step
