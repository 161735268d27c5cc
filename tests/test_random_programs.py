"""Random programs: reads, assignments, in-place edits and cross-layer patches, against plain hooks, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxsight.model import Model
from tests.programs import (
    INPLACE,
    OPS,
    AssignStep,
    Const,
    InplaceStep,
    OpStep,
    Program,
    ReadStep,
    SaveStep,
    Step,
    describe,
    run_with_hooks,
)
from tests.random_programs import places, random_program
from tests.zoo import tiny_transformer, token_ids

QUICK = 50
LONG = 1000


def run_with_fxsight(steps: Program, model: Model, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same program as a user would write it: the saved values in order, and the logits."""
    known: dict[str, Any] = {}
    saved: list[Any] = []
    with model.trace(ids, backend="eager"):
        for step in steps:
            run_step(step, model, known, saved)
        logits = model.output.save()
    return saved, logits


def run_step(step: Step, model: Model, known: dict[str, Any], saved: list[Any]) -> None:
    match step:
        case ReadStep(var, path, port):
            known[var] = getattr(_module(model, path), port)
        case OpStep(var, name, arg_vars, const):
            consts = () if const is None else (_operand(const, known),)
            known[var] = OPS[name].fn(*(known[a] for a in arg_vars), *consts)
        case AssignStep(path, port, var):
            setattr(_module(model, path), port, known[var])
        case InplaceStep(path, port, how, value):
            operands = () if value is None else (_operand(value, known),)
            INPLACE[how].fn(getattr(_module(model, path), port), *operands)
        case SaveStep(var):
            saved.append(known[var].save())


def _operand(value: Any, known: dict[str, Any]) -> Any:
    return known[value] if isinstance(value, str) else value.tensor() if isinstance(value, Const) else value


def _module(model: Model, path: str) -> Any:
    found: Any = model
    for part in path.split(".") if path else ():
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def check(first: int, count: int) -> None:
    """Compare ``count`` programs beginning at one seed."""
    net, ids = tiny_transformer().eval(), token_ids(2, 5)
    model = Model(net, cache=False)
    at = places(net, ids)
    for seed in range(first, first + count):
        steps = random_program(seed, at)
        expected, expected_logits = run_with_hooks(steps, net, ids)
        try:
            with torch.no_grad():
                found, logits = run_with_fxsight(steps, model, ids)
        except Exception as error:
            raise AssertionError(f"seed {seed} fails: {error!r}\n{describe(steps)}") from error
        same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert same and torch.equal(logits, expected_logits), f"seed {seed} differs\n{describe(steps)}"


@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")  # copies that nothing reads are edited, too
def test_random_programs_equal_hooks() -> None:
    check(0, QUICK)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")
@pytest.mark.parametrize("first", range(QUICK, LONG, 190))
def test_many_random_programs_equal_hooks(first: int) -> None:
    check(first, 190)
