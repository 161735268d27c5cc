"""One fused operator, at one place, as the plain operators it is made of."""

from __future__ import annotations

from textwrap import dedent

import pytest
import torch
from torch import Tensor

import fxsight
from fxsight.address import Address
from fxsight.passes import OpenFused
from fxsight.testing import check_pass, listing
from tests.passes.fused_cases import CASES, Case, assert_addresses_stay


class Opened:
    """A case, captured."""

    def __init__(self, case: Case) -> None:
        self.case, self.module = case, case.module
        self.model = fxsight.Model(self.module, cache=False)
        self.program = self.model._captures.find(case.inputs[0], {})[0]
        self.pass_ = OpenFused(Address.parse(f"/{case.label}"))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def opened(request: pytest.FixtureRequest) -> Opened:
    return Opened(request.param)


def test_result_is_the_operators(opened: Opened) -> None:
    case = opened.case
    check_pass(
        opened.pass_,
        opened.program,
        module=opened.module,
        inputs=case.inputs,
        equals=lambda module, *inputs: module(*inputs),
        tolerance=case.tolerance,
    )


def test_only_its_line_changes(opened: Opened) -> None:
    node = opened.case.label.removeprefix("aten_").removesuffix("_0")
    lines = listing(opened.program).splitlines()
    number = next(i for i, line in enumerate(lines) if line.startswith(f"{node} = "))
    lines[number : number + 1] = dedent(opened.case.opened).strip().splitlines()
    assert listing(opened.pass_(opened.program)).splitlines() == lines


def test_opening_again_changes_nothing(opened: Opened) -> None:
    program = opened.pass_(opened.program)
    assert opened.pass_(program) is program


def test_addresses_stay(opened: Opened) -> None:
    assert_addresses_stay(opened.program, opened.pass_(opened.program))


@pytest.mark.parametrize("size", [0, 1])
def test_value_inside_is_read(opened: Opened, size: int) -> None:
    case, inputs, seen = opened.case, opened.case.inputs[size], list[Tensor]()
    with opened.model.trace(*inputs) as tracer:
        inner = tracer.at(f"/{case.label}/{case.inner}").output.save()

    def see(value: Tensor) -> Tensor:
        seen.append(value)
        return value

    case.twin(see, *inputs, *case.weights)
    torch.testing.assert_close(inner, seen[0], rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize("size", [0, 1])
def test_value_inside_is_written(opened: Opened, size: int) -> None:
    case, inputs = opened.case, opened.case.inputs[size]
    with opened.model.trace(*inputs) as tracer:
        place = tracer.at(f"/{case.label}/{case.inner}")
        place.output = place.output * 2 + 0.25
        out = opened.model.output.save()
    expected = case.twin(lambda value: value * 2 + 0.25, *inputs, *case.weights)
    torch.testing.assert_close(out, expected, rtol=max(case.tolerance, 1e-6), atol=max(case.tolerance, 1e-6))
