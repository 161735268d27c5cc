"""What is compiled holds for the sizes it is run on, also where an edit takes rows that some sizes do not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxsight
from fxsight.artifacts import Artifacts
from fxsight.captures import Captures
from fxsight.compiled import inductor
from fxsight.spec import symbol
from fxsight.testing import program_of
from tests.zoo import seeded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


def expected(net: nn.Module, x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        change(output)

    with torch.no_grad(), net.up.register_forward_hook(hook):  # type: ignore[union-attr]
        result: Tensor = net(x)
    return result


def rows(count: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(count))


def found(model: Any, x: Tensor, change: Callable[[Any], Any]) -> tuple[Tensor, Any]:
    with torch.no_grad(), model.trace(x, backend="inductor") as tracer:
        change(model.up.output)
        out = model.output.save()
    return out, tracer.program


def scaled(index: Any) -> Callable[[Any], Any]:
    def change(h: Any) -> None:
        h[index] *= 3.0

    return change


FEW, MANY = 2, 12  # rows, below and above any example that a compiler is given
SOME = [slice(7, None), slice(None, -7)]
MORE = [slice(None, 7), slice(-7, None), slice(7, 9), slice(0, None, 3)]


@pytest.mark.parametrize("index", [*SOME, *(pytest.param(index, marks=pytest.mark.slow) for index in MORE)], ids=str)
def test_slices_beyond_the_example(index: slice) -> None:
    """Compiled on many rows and called on few, and the other way round; bits are those of Inductor."""
    net, change = seeded(Net).eval().requires_grad_(False), scaled(index)
    for first, others in ((MANY, (FEW, 1, 9)), (FEW, (MANY, 1))):
        model = fxsight.Model(net, cache=False)
        out, program = found(model, rows(first), change)
        torch.testing.assert_close(out, expected(net, rows(first), change))
        for count in others:
            torch.testing.assert_close(program(rows(count))[0], expected(net, rows(count), change), msg=str(count))
        assert torch.equal(program(rows(0))[0], torch.empty(0, 4))


def op_by_op(module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
    return module.forward


def test_an_index_beyond_the_example() -> None:
    net, change, artifacts = seeded(Net).eval().requires_grad_(False), scaled(8), Artifacts(compiler=op_by_op)
    model = fxsight.Model(net, cache=False)
    model.__dict__["_captures"] = Captures(net, None, artifacts)
    for count in (9, 12, 30):
        assert torch.equal(found(model, rows(count), change)[0], expected(net, rows(count), change))
    assert artifacts.made == 1, "where there are more than 8 rows"
    program = found(model, rows(9), change)[1]
    with pytest.raises(IndexError, match="index 8 is out of bounds for dimension 0 with size 3"):
        program(rows(3))


def test_what_holds_for_all_sizes_is_compiled_once() -> None:
    net, artifacts = seeded(Net).eval().requires_grad_(False), Artifacts(compiler=op_by_op)
    model = fxsight.Model(net, cache=False)
    model.__dict__["_captures"] = Captures(net, None, artifacts)
    made = []
    for count in (2, 4, 9, 1, 12, 3, 7):
        change = scaled(slice(4, None))
        assert torch.equal(found(model, rows(count), change)[0], expected(net, rows(count), change))
        made.append(artifacts.made)
    assert made[-1] <= 4, "no row more, one, several; one row in all"
    for count in (2, 4, 9, 1, 12, 3, 7):
        found(model, rows(count), scaled(slice(4, None)))
    assert artifacts.made == made[-1], "what is known of a size is kept"


def test_in_one_piece() -> None:
    net, change = seeded(Net).eval().requires_grad_(False), scaled(slice(7, None))
    program = found(fxsight.Model(net, cache=False), rows(FEW), change)[1]
    program.compile_whole()
    for count in (FEW, MANY):
        torch.testing.assert_close(program(rows(count))[0], expected(net, rows(count), change))


def test_programs_that_regions_cannot_do() -> None:
    """A program compiled by itself, for free sizes and for the very ones."""
    program = program_of(
        """
        x: 'input 0'  # f32[batch, 8]
        half = aten.slice.Tensor(x, 0, 7, 9223372036854775807)  # f32[Max(0, batch - 7), 8]  {stride='8, 1', shares='x'}
        end = aten.tanh.default(half)  # f32[Max(0, batch - 7), 8]
        return (end,)
        """
    )
    first = torch.randn(12, 8)
    lowered = inductor(program, [first], {}, Artifacts())
    for x in (first, torch.randn(9, 8), torch.randn(3, 8)):
        torch.testing.assert_close(lowered(x)[0], x[7:].tanh())


def test_the_guards_of_an_artifact_are_kept_on_disk(tmp_path: Path) -> None:
    net, change = seeded(Net).eval().requires_grad_(False), scaled(slice(7, None))
    seen = []
    for _ in range(2):
        artifacts = Artifacts(tmp_path)
        model = fxsight.Model(net, cache=False)
        model.__dict__["_captures"] = Captures(net, None, artifacts)
        for count in (MANY, FEW):
            torch.testing.assert_close(found(model, rows(count), change)[0], expected(net, rows(count), change))
        seen.append((artifacts.made, artifacts.read))
        assert any(a.guards for a in artifacts._kept.values())
        assert {s for a in artifacts._kept.values() for g in a.guards for s in g.free_symbols} == {symbol("s0")}
    assert seen[0][1] == 0 and seen[1] == (0, seen[0][0])
