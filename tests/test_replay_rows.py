"""An edit that is said again while an invoke is open is for the rows of that invoke; against hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_refit import rows
from tests.test_session_sharing import deep
from tests.test_sweep import bitwise

Body = Callable[[Any], None]


def doubled(model: Any) -> None:
    model.layers[1].output[:] *= 2


def column(model: Any) -> None:
    model.layers[1].output[:, 2] = 0


def first_row(model: Any) -> None:
    model.layers[1].output[0] = 0


def assigned(model: Any) -> None:
    model.layers[1].output = model.layers[1].output * 2


def changed_and_assigned(model: Any) -> None:
    model.layers[1].output[:, 1] += 1
    model.layers[1].output = model.layers[1].output * 2


def added(model: Any) -> None:
    model.layers[2].output[:] += model.layers[0].output


def skipped(model: Any) -> None:
    model.layers[1].skip(model.layers[1].input)


BODIES: list[Body] = [doubled, column, first_row, assigned, changed_and_assigned, added, skipped]
GIVEN = (rows(2), rows(3, 1), rows(2, 2))


def right(body: Body, changed: int) -> list[Tensor]:
    """The same forward with hooks, in which the body is written out on the rows of one invoke."""
    own = slice(2, 5) if changed == 1 else slice(0, 2)
    net, kept = deep()[0], list[Tensor]()

    def second(_m: Any, args: Any, out: Tensor) -> Tensor:
        part = out[own]
        if body is doubled or body is assigned:
            part *= 2
        elif body is column:
            part[:, 2] = 0
        elif body is first_row:
            part[0] = 0
        elif body is changed_and_assigned:
            part[:, 1] += 1
            part *= 2
        elif body is skipped:
            part.copy_(args[0][own])
        return out

    def third(_m: Any, _a: Any, out: Tensor) -> Tensor:
        if body is added:
            out[own] += kept[0][own]
        return out

    handles = [
        net.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out.clone())),
        net.layers[1].register_forward_hook(second),
        net.layers[2].register_forward_hook(third),
    ]
    try:
        return list(net(torch.cat(GIVEN)).split([2, 3, 2]))
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("changed", [0, 1])
def test_a_replayed_edit_is_for_the_rows_of_its_invoke(body: Body, changed: int) -> None:
    model = deep()[1]
    with model.edit(rows(2)) as edited:
        body(edited)
    found = []
    with model.trace() as tracer:
        for number, given in enumerate(GIVEN):
            with tracer.invoke(given):
                if number == changed:
                    tracer.replay(edited.edits[0])
                found.append(model.output.save())
    for out, expected in zip(found, right(body, changed), strict=True):
        bitwise(out, expected)


@pytest.mark.parametrize("body", BODIES[:2] + BODIES[5:])
def test_an_edited_model_is_edited_for_all_rows(body: Body) -> None:
    """What the invokes say comes after the edit, each for its rows."""
    model = deep()[1]
    with model.edit(rows(2)) as edited:
        body(edited)
    with edited.trace() as tracer:
        for number, given in enumerate(GIVEN[:2]):
            with tracer.invoke(given):
                edited.layers[3].output[:] *= number + 2
        out = edited.output.save()
    with model.trace(torch.cat(GIVEN[:2])):
        body(model)
        model.layers[3].output[:2] *= 2
        model.layers[3].output[2:] *= 3
        expected = model.output.save()
    bitwise(out, expected)
