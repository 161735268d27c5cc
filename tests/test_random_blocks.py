"""Random scripts of traces, invokes, skips and numbers, against plain hooks, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fxsight
from fxsight.model import Model
from tests.programs import SaveStep
from tests.random_blocks import AnyStep, Invoke, NumberStep, Script, SkipStep, describe, random_script, run_with_hooks
from tests.random_programs import places
from tests.test_random_programs import _module, run_step
from tests.zoo import tiny_transformer, token_ids

QUICK = 50
LONG = 5000
SHARD = 250


def run_with_fxsight(script: Script, model: Model) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same script as a user would write it: the saved values in order, and the logits of each trace."""
    known: dict[str, Any] = {}
    saved: list[Any] = []
    logits: list[Any] = []
    with model.session() if len(script) > 1 else nullcontext():
        for trace in script:
            if len(trace) == 1:
                with model.trace(trace[0].ids()):
                    run_step_all(trace[0], model, known, saved)
                    logits.append(model.output.save())
                continue
            with model.trace() as tracer:
                for invoke in trace:
                    with tracer.invoke(invoke.ids()):
                        run_step_all(invoke, model, known, saved)
                logits.append(model.output.save())
    return saved, logits


def run_step_all(invoke: Invoke, model: Model, known: dict[str, Any], saved: list[Any]) -> None:
    for step in invoke.steps:
        run_step_one(step, model, known, saved)


def run_step_one(step: AnyStep, model: Model, known: dict[str, Any], saved: list[Any]) -> None:
    match step:
        case SkipStep(path, var):
            _module(model, path).skip(known[var])
        case NumberStep(var, of):
            known[var] = known[of] * (2.0 if known[of].mean() > 0 else 0.5)
        case SaveStep(var):
            saved.append(fxsight.save(known[var]))
        case _:
            run_step(step, model, known, saved)


def check(first: int, count: int) -> None:
    """Compare ``count`` scripts beginning at one seed."""
    net = tiny_transformer().eval()
    model = Model(net, cache=False)
    at = places(net, token_ids(2, 5))
    for seed in range(first, first + count):
        script = random_script(seed, at)
        expected, expected_logits = run_with_hooks(script, net)
        try:
            with torch.no_grad():
                found, logits = run_with_fxsight(script, model)
        except Exception as error:
            raise AssertionError(f"seed {seed} fails: {error!r}\n{describe(script)}") from error
        same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        same = same and all(torch.equal(a, b) for a, b in zip(expected_logits, logits, strict=True))
        assert same, f"seed {seed} differs\n{describe(script)}"


@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")  # copies that nothing reads are edited, too
def test_random_scripts_equal_hooks() -> None:
    check(0, QUICK)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxsight.errors.LostEditWarning")
@pytest.mark.parametrize("first", range(QUICK, LONG, SHARD))
def test_many_random_scripts_equal_hooks(first: int) -> None:
    check(first, min(SHARD, LONG - first))
