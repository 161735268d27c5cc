"""What stands around the blocks is compiled where that saves something, else it runs op by op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsight
from fxsight.artifacts import Artifacts
from fxsight.captures import Captures
from fxsight.lower import TOLERANCE
from fxsight.program import Program
from fxsight.regions import cut
from fxsight.run import Executable
from fxsight.worth import worthwhile
from tests.zoo import seeded, tiny_transformer, token_ids


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.norm(x)).tanh() * 2 + 1
        return x + self.down(hidden.relu().sigmoid())  # type: ignore[no-any-return]


class Tower(nn.Module):
    """An operator, six blocks of a width, a norm and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(6))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def tower(width: int) -> nn.Module:
    return seeded(lambda: Tower(width)).eval().requires_grad_(False)


def traced(net: nn.Module, x: Tensor, artifacts: Artifacts, edit: Callable[[Any], None] | None = None) -> Executable:
    model = fxsight.Model(net, cache=False)
    model.__dict__["_captures"] = Captures(net, None, artifacts)
    with torch.no_grad(), model.trace(x, backend="inductor") as tracer:
        if edit is not None:
            edit(model)
        model.output.save()
    program: Executable = tracer.program
    return program


def op_by_op(module: Any, example: list[Any]) -> Callable[..., Any]:
    return module.forward  # type: ignore[no-any-return]


def judged(program: Program) -> list[tuple[str, bool]]:
    return [(region.place, region.is_compiled) for region in worthwhile(program, cut(program))]


BLOCKS = [(f"blocks.{k}", True) for k in range(6)]


@pytest.mark.parametrize(("width", "is_compiled"), [(8, True), (1024, False)])
def test_small_models_are_compiled_and_large_ones_around_their_blocks_run_op_by_op(
    width: int, is_compiled: bool
) -> None:
    artifacts = Artifacts(compiler=op_by_op)
    program = traced(tower(width), torch.ones(2, width), artifacts).program
    assert judged(program) == [("", is_compiled), *BLOCKS, ("", is_compiled)]
    assert artifacts.made == (3 if is_compiled else 1)


def test_an_edit_that_makes_much_of_the_output_is_compiled() -> None:
    def spread(model: Any) -> None:
        model.output = model.output[..., None].expand(-1, -1, 40_000).tanh().sigmoid().amax(-1)

    program = traced(tower(1024), torch.ones(2, 1024), Artifacts(compiler=op_by_op), spread).program
    assert judged(program) == [("", False), *BLOCKS, ("", True)]


def test_a_program_without_blocks_is_compiled() -> None:
    program = traced(tower(1024).norm, torch.ones(2, 1024), Artifacts(compiler=op_by_op)).program  # type: ignore[arg-type]
    assert judged(program) == [("", True)]


def test_on_another_device_all_is_compiled() -> None:
    program = traced(tower(1024), torch.ones(2, 1024), Artifacts(compiler=op_by_op)).program
    for node in program.graph.nodes:
        spec = node.meta.get("spec")
        if spec is not None:
            node.meta["spec"] = type(spec)(**{**vars(spec), "device": "cuda:0"})
    assert judged(program) == [("", True), *BLOCKS, ("", True)]


def test_what_runs_op_by_op_gives_the_same_numbers_and_is_read_back(tmp_path: Path) -> None:
    net, x, longer = tower(1024), torch.randn(2, 1024), torch.randn(5, 1024)
    made, rtol_atol = Artifacts(tmp_path), TOLERANCE[torch.float32]
    program = traced(net, x, made)
    assert (made.made, made.read) == (1, 0) and len(list(tmp_path.iterdir())) == 3
    for rows in (x, longer):
        torch.testing.assert_close(program(rows)[0], net(rows), rtol=rtol_atol[0], atol=rtol_atol[1])
    again = Artifacts(tmp_path).ready()  # compiles nothing
    same = traced(net, x, again)
    assert (again.made, again.read) == (0, 3)
    for rows in (x, longer):
        assert torch.equal(same(rows)[0], program(rows)[0])


def test_a_region_that_is_compiled_is_another_than_one_that_is_not() -> None:
    """A small transformer compiles what stands around its blocks; its texts say nothing of it."""
    artifacts = Artifacts(compiler=op_by_op)
    program = traced(tiny_transformer().eval(), token_ids(2, 5), artifacts).program
    assert all(is_compiled for _, is_compiled in judged(program))
    assert not any("op by op" in text for text in artifacts._kept)
    traced(tower(1024), torch.ones(2, 1024), artifacts)
    assert sum("op by op\n" in text for text in artifacts._kept) == 2
