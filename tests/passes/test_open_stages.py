"""The operators of a stage, where it is read in part."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import fxsight
from fxsight.asked import asked_in_all
from fxsight.intervention import Intervention
from fxsight.passes import DropUnused, EraseBoundaries, OpenStages, SkipOverwritten, Weave
from fxsight.program import Program
from fxsight.rewrite import Together
from fxsight.stage import Stage, operators
from fxsight.staged import Stages, Staging
from fxsight.testing import check_pass, listing, random_program
from tests import small

BEFORE = (SkipOverwritten(), DropUnused(), EraseBoundaries())


@cache
def model() -> Any:
    return fxsight.Model(small.gpt2(n_layer=4), cache=False)


def recorded(read: str, place: str = "attn.c_proj.input") -> tuple[Program, Intervention]:
    """The captured program, and an edit in the second block."""
    block, (port, *parts) = model().transformer.h[1], place.split(".")[::-1]
    with model().trace(torch.arange(10).view(2, 5)) as tracer:
        for part in reversed(parts):
            block = getattr(block, part)
        value = getattr(block, port)
        setattr(block, port, value * 2)
        logits = model().lm_head.output
        (logits[:, -1] if read == "last" else logits).save()
        found = tracer.captured, asked_in_all(tracer.recorder, [])
    return found


def stages(program: Program) -> list[str]:
    return [node.target.title for node in program.graph.nodes if isinstance(node.target, Stage)]


def staged(captured: Program, asked: Intervention) -> Program:
    return Staging(captured, [asked], Stages(model()._captures.module)).of(asked)


@pytest.mark.parametrize("read", ["all", "last"])
def test_what_is_read_in_part_is_opened(read: str) -> None:
    captured, asked = recorded(read)
    program = Together((Weave(asked), *BEFORE, OpenStages()))(staged(captured, asked))
    assert stages(program) == ["", *(f"transformer.h.{i}" for i in (0, 1, 1, 2, 3)), *([""] if read == "all" else [])]
    assert ("linear" in program.nodes) == (read == "last")


@pytest.mark.parametrize("place", ["attn.c_proj.input", "input", "output", "ln_2.output", "mlp.output"])
def test_all_opened_is_the_program_without_stages(place: str) -> None:
    captured, asked = recorded("last", place)
    whole = Together((Weave(asked), *BEFORE))(captured)
    opened = Together((Weave(asked), *BEFORE, OpenStages(everywhere=True)))(staged(captured, asked))
    assert stages(opened) == []
    assert listing(opened) == listing(whole)
    assert sorted(operators(Together((Weave(asked), *BEFORE))(staged(captured, asked)).graph)) != []


def test_a_program_without_stages_stays() -> None:
    program = random_program(3)
    assert check_pass(OpenStages(), program) is program
    assert check_pass(OpenStages(everywhere=True), program) is program
