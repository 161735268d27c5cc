"""Numbers that vary are inputs of what Inductor compiles, and the numbers are those of hooks all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import fxsight
from fxsight import _torch
from fxsight.artifacts import Artifacts
from fxsight.captures import Captures
from fxsight.varying import number_places, seen, with_tensors
from tests.test_compiled_sizes import Net, expected, found, op_by_op, rows
from tests.zoo import seeded

Change = Callable[[Any], Any]
CELLS = [(3, 2.0), (1, 0.5), (2, 3.5), (5, -1.5), (-1, 0.25), (0, -0.0)]


def model_of(net: Any, compiler: Any) -> tuple[Any, Artifacts]:
    model, artifacts = fxsight.Model(net, cache=False), Artifacts(compiler=compiler)
    model.__dict__["_captures"] = Captures(net, None, artifacts)
    return model, artifacts


def scale(position: int, strength: float) -> Change:
    def change(h: Any) -> None:
        h[:, position] *= strength

    return change


def fill(position: int, strength: float) -> Change:
    def change(h: Any) -> None:
        h[position] = strength

    return change


def read_and_write(position: int, strength: float) -> Change:
    def change(h: Any) -> None:
        h[..., position, None] = h[1:2, ..., position - 1, None] * strength + position

    return change


def beside_slices(position: int, strength: float) -> Change:
    def change(h: Any) -> None:
        h[1:, position, None] = torch.arange(6.0)[position] * strength

    return change


def from_on(position: int, strength: float) -> Change:
    def change(h: Any) -> None:
        h[:, position:] += strength

    return change


def in_a_list(position: int, strength: float) -> Change:
    def change(h: Any) -> None:
        h[:, [position, 2]] *= strength

    return change


def dimension(position: int, strength: float) -> Change:
    def change(h: Any) -> None:
        h.add_(h.sum(position % 2, keepdim=True) * strength)

    return change


INPUTS = [scale, fill, read_and_write, beside_slices]
WRITTEN = [from_on, in_a_list, dimension]


@pytest.mark.parametrize("make", [*INPUTS, *WRITTEN])
def test_op_by_op_in_the_place_of_inductor(make: Callable[[int, float], Change]) -> None:
    net = seeded(Net).eval().requires_grad_(False)
    model, artifacts = model_of(net, op_by_op)
    made = []
    for position, strength in CELLS:
        change = make(position, strength)
        out, program = found(model, rows(9), change)
        assert torch.equal(out, expected(net, rows(9), change))
        assert torch.equal(program(rows(7))[0], expected(net, rows(7), change))
        made.append(artifacts.made)
    if make in INPUTS:
        assert made == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "make",
    [scale, pytest.param(from_on, marks=pytest.mark.slow), *(pytest.param(x, marks=pytest.mark.slow) for x in INPUTS)],
)
def test_compiled_once_for_all_numbers(make: Callable[[int, float], Change]) -> None:
    net = seeded(Net).eval().requires_grad_(False)
    model, artifacts = model_of(net, _torch.compile_graph)
    for position, strength in CELLS:
        change = make(position, strength)
        torch.testing.assert_close(found(model, rows(9), change)[0], expected(net, rows(9), change))
    assert make is from_on or artifacts.made == 2


def test_dtypes_are_those_of_plain_numbers() -> None:
    """A float changes no half into a double, and an integer no integer into a float."""
    net = seeded(Net).eval().requires_grad_(False)
    for compiler in (op_by_op, _torch.compile_graph):
        model, _ = model_of(net, compiler)
        for number in (2, 3, 4):
            with torch.no_grad(), model.trace(rows(3), backend="inductor"):
                whole = (model.up.output.argmax(1) * number).save()
                single = (model.up.output.to(torch.bfloat16) * (number + 0.5)).save()
                mixed = (model.up.output.argmax(1) * (number + 0.5)).save()
            up = net.get_submodule("up")(rows(3))
            assert torch.equal(whole, up.argmax(1) * number) and whole.dtype == torch.int64
            assert mixed.dtype == torch.float32 and torch.equal(mixed, up.argmax(1) * (number + 0.5))
            torch.testing.assert_close(single, up.to(torch.bfloat16) * (number + 0.5))


def test_an_index_that_a_smaller_input_does_not_have() -> None:
    net = seeded(Net).eval().requires_grad_(False)
    model, _ = model_of(net, _torch.compile_graph)
    programs = [found(model, rows(9), fill(position, 1.0))[1] for position in (2, 4, 8)]
    with pytest.raises(IndexError, match=r"index 8 out of range for tensor of size \[3, 6\]"):
        programs[-1](rows(3))


def test_what_a_compiler_must_see() -> None:
    net = seeded(Net).eval().requires_grad_(False)
    model, _ = model_of(net, op_by_op)
    for make, is_seen in ((scale, False), (from_on, True), (in_a_list, True)):
        programs = [found(model, rows(9), make(*cell))[1].program for cell in CELLS[:2]]
        places = number_places(programs[1])
        assert number_places(programs[0]) == () and len(places) >= 2 and any(seen(programs[1])) == is_seen


def test_the_program_with_tensors() -> None:
    net = seeded(Net).eval().requires_grad_(False)
    model, _ = model_of(net, op_by_op)
    program = [found(model, rows(9), read_and_write(*cell))[1].program for cell in CELLS[:2]][1]
    numbers = {i: (1.5 if "mul" in str(list(place.users)) else 2) for i, place in _places(program)}
    made = with_tensors(program, numbers, frozenset())
    names = [getattr(n.target, "__name__", "") for n in made.graph.nodes]
    assert names.count("_local_scalar_dense.default") == len(numbers) and names.count("select.int") == 2
    made.graph.lint()
    known = with_tensors(program, numbers, frozenset(numbers))
    assert "_local_scalar_dense" not in str(known.graph)


def _places(program: Any) -> list[tuple[int, fx.Node]]:
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    return [(i, places[i]) for i in number_places(program)]
