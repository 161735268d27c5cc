"""Regions: where a program is cut, which regions are alike, and that the pieces compute what the whole did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxsight
from fxsight.artifacts import Artifacts
from fxsight.book import Book, Call, Structure
from fxsight.canonical import Canonical, canonical, read_spec, write_spec
from fxsight.captures import Captures
from fxsight.compiled import by_regions, inductor
from fxsight.driver import can_drive, drive
from fxsight.editor import copy_graph
from fxsight.effects import is_random
from fxsight.errors import InputError, TraceError
from fxsight.lower import TOLERANCE, eager
from fxsight.node import origin_of
from fxsight.program import Program
from fxsight.regions import Region, cut
from fxsight.run import Executable
from fxsight.spec import SizeSpec
from fxsight.testing import program_of, random_inputs, random_program, run
from fxsight.tree import Tree
from tests.zoo import ResidualUnit, seeded, tiny_transformer, token_ids

Edit = Callable[[Any], None]


def op_by_op(module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
    """In Inductor's place: the same kernels as without regions, so the same bits."""
    return module.forward


def plainly() -> Artifacts:
    return Artifacts(compiler=op_by_op)


class Stack(nn.Module):
    """A layer before, ``depth`` blocks, a layer after."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(_Block() for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.norm(x)).tanh() * 2 + 1
        return x + self.down(hidden.relu().sigmoid())  # type: ignore[no-any-return]


def traced(net: nn.Module, x: Tensor, edit: Edit | None = None, artifacts: Artifacts | None = None) -> Executable:
    """The finished program of a body: an edit, and the output saved."""
    model = fxsight.Model(net, cache=False)
    if artifacts is not None:
        model.__dict__["_captures"] = Captures(net, None, artifacts)
    with torch.no_grad(), model.trace(x, backend="eager" if artifacts is None else "inductor") as tracer:
        if edit is not None:
            edit(model)
        model.output.save()
    program: Executable = tracer.program
    return program


def counted(artifacts: Artifacts) -> tuple[int, int]:
    """How many regions there are, and how many were compiled: the layer before the blocks and that after them are one
    product each, in which there is nothing for a compiler."""
    return len(artifacts._kept), artifacts.made


def stack(depth: int = 4) -> nn.Module:
    return seeded(lambda: Stack(depth)).eval()


def rows(count: int = 2) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count))


def forms(program: Program) -> list[Canonical]:
    """The canonical regions of a program in which all sizes and shapes are known."""
    specs = {node: node.meta["spec"] for node in program.graph.nodes if node.op != "output"}
    sizes = {size.name: 5 + i for i, size in enumerate(program.sizes)}
    return [canonical(region, specs, sizes, program.guards) for region in cut(program)]


# -- where ------------------------------------------------------------------------------------------------------------


def test_the_blocks_and_what_is_around_them() -> None:
    regions = cut(traced(stack(3), rows()).program)
    assert [str(region) for region in regions] == [
        "outside: (x, embed_weight, embed_bias) linear -> (linear)",
        *(
            f"blocks.{k}: ({hidden}, blocks_{k}_norm_weight, blocks_{k}_norm_bias, blocks_{k}_up_weight, "
            f"blocks_{k}_up_bias, blocks_{k}_down_weight, blocks_{k}_down_bias) {nodes} -> ({result})"
            for k, (hidden, nodes, result) in enumerate(BLOCKS)
        ),
        "outside: (add_5, head_weight, head_bias) linear_7 -> (linear_7)",
    ]


BLOCKS = [
    ("linear", "layer_norm, linear_1, tanh, mul, add, relu, sigmoid, linear_2, add_1", "add_1"),
    ("add_1", "layer_norm_1, linear_3, tanh_1, mul_1, add_2, relu_1, sigmoid_1, linear_4, add_3", "add_3"),
    ("add_3", "layer_norm_2, linear_5, tanh_2, mul_2, add_4, relu_2, sigmoid_2, linear_6, add_5", "add_5"),
]


def test_small_members_and_single_ones_are_no_blocks() -> None:
    layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    assert [region.place for region in cut(traced(layers, rows()).program)] == [""]
    assert [region.place for region in cut(traced(stack(1), rows()).program)] == [""]


def test_calls_of_one_module_are_blocks() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([_Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](self.layers[0](x))  # type: ignore[no-any-return]

    program = traced(seeded(Shared).eval(), torch.ones(2, 8)).program
    assert [region.place for region in cut(program)] == ["layers.0", "layers.0#1"]
    assert len({form.text for form in forms(program)}) == 1


# -- which are alike --------------------------------------------------------------------------------------------------


def test_blocks_that_are_alike_have_one_text() -> None:
    texts = [form.text for form in forms(traced(stack(), rows()).program)]
    assert len(set(texts[1:5])) == 1
    assert texts[1] == TEXT


TEXT = """\
s0: size like 5
p0: f32[s0, 8]
p1: f32[8]
p2: f32[8]
p3: f32[16, 8]
p4: f32[16]
p5: f32[8, 16]
p6: f32[8]
n0 = aten.layer_norm.default(p0, [8], p1, p2, 1e-05, False)
n1 = aten.linear.default(n0, p3, p4)
n2 = aten.tanh.default(n1)
n3 = aten.mul.Tensor(n2, 2)
n4 = aten.add.Tensor(n3, 1)
n5 = aten.relu.default(n4)
n6 = aten.sigmoid.default(n5)
n7 = aten.linear.default(n6, p5, p6)
n8 = aten.add.Tensor(p0, n7)
return (n8,)
"""


@pytest.mark.parametrize("changed", ["n1 = aten.linear", "f32[16, 8]", "s0: size like 5", "1e-05", "(n8,)"])
def test_what_a_compiler_may_look_at_is_in_the_text(changed: str) -> None:
    assert changed in TEXT


def test_another_constant_shape_or_result_is_another_text() -> None:
    lines = ["x: 'input 0'  # f32[batch, 8]", "a = aten.mul.Tensor(x, 2.0)  # f32[batch, 8]", "return (a,)"]
    variants = [
        lines,
        [lines[0], lines[1].replace("2.0", "3.0"), lines[2]],
        [line.replace("8]", "9]") for line in lines],
        [line.replace("batch, 8", "8, batch") for line in lines],
        [line.replace("f32", "f64") for line in lines],
        [lines[0], lines[1], "return (a, a)"],
        [lines[0], lines[1], "b = aten.mul.Tensor(a, 2.0)  # f32[batch, 8]", "return (a, b)"],
    ]
    texts = [forms(program_of("\n".join(variant)))[0].text for variant in variants]
    assert len({*texts}) == len(variants) - 1 and texts[0] == texts[5]  # a value returned twice is one result


def test_strides_and_devices_are_in_the_text() -> None:
    for text in ("f32[s0, 8]", "f32[8, s0] strides 1, 8", "i64[]", "f16[2*s0] on cuda:0", "b1[s0] strides 0 on meta"):
        assert write_spec(read_spec(text)) == text
    assert write_spec(read_spec("size 2*s0")) == "size 2*s0" and isinstance(read_spec("size 4"), SizeSpec)


def halve(k: int) -> Edit:
    def edit(model: Any) -> None:
        model.blocks[k].norm.output[:] *= 0.5

    return edit


def test_an_edit_changes_the_text_of_its_block_alone() -> None:
    plain = [form.text for form in forms(traced(stack(), rows()).program)]
    for k in range(4):
        edited = [form.text for form in forms(traced(stack(), rows(), halve(k)).program)]
        assert [i for i, (a, b) in enumerate(zip(plain, edited, strict=True)) if a != b] == [k + 1]


# -- how often is compiled --------------------------------------------------------------------------------------------


def test_one_compilation_for_all_blocks_and_one_for_an_edit() -> None:
    artifacts = plainly()
    net, x = stack(), rows()
    assert traced(net, x, None, artifacts)(x)[0].equal(net(x))
    assert counted(artifacts) == (3, 1)
    for k in range(4):
        traced(net, x, halve(k), artifacts)
        assert counted(artifacts) == (4, 2), "the same edit, at another block"
    traced(net, x, lambda model: model.blocks[2].up.output.mul_(0), artifacts)
    assert counted(artifacts) == (5, 3)
    traced(stack(9), x, None, artifacts)
    assert counted(artifacts) == (5, 3), "as many blocks as one likes"


def test_other_sizes_compile_nothing_new() -> None:
    artifacts = plainly()
    net = stack()
    for length in (2, 5, 1, 7):
        x = rows(length)
        expected = traced(net, x, halve(1))(x)[0]
        assert traced(net, x, halve(1), artifacts)(x)[0].equal(expected)
    assert counted(artifacts) == (4, 2), "four regions, whatever the sizes"


def test_a_body_that_depends_on_sizes_is_compiled_for_them() -> None:
    artifacts = plainly()
    net = stack()

    def edit(model: Any) -> None:
        hidden = model.blocks[1].output
        model.blocks[1].output = hidden + torch.arange(float(hidden.shape[0])).reshape(-1, 1)

    for made, length in ((7, 3), (14, 4)):
        x = rows(length)
        assert traced(net, x, edit, artifacts)(x)[0].equal(traced(net, x, edit)(x)[0])
        assert artifacts.made <= made


# -- what they compute ------------------------------------------------------------------------------------------------


def in_blocks(program: Program, count: int) -> Program:
    """The program with its operators shared out to ``count`` blocks, ``h.0``, ``h.1``, …"""
    nothing = Structure(Tree("tuple"), ())
    root = program.book.calls[0]
    calls = [
        Call(k + 1, 0, "module", f"h_{k}", 0, f"h.{k}", 0, "Block", "", None, nothing, nothing, 0, 0)
        for k in range(count)
    ]
    graph = copy_graph(program.graph)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for i, node in enumerate(nodes):
        node.meta["origin"] = replace(origin_of(node), call=1 + i * count // len(nodes))
    return replace(program, graph=graph, book=Book((root, *calls)))


def by_the_regions(program: Program, artifacts: Artifacts) -> Callable[..., Sequence[Any]]:
    def runner(*arguments: Any) -> Sequence[Any]:
        return by_regions(program, arguments, {}, artifacts)(*arguments)

    return runner


def check(seed: int) -> int:
    """Compare a random program in blocks with the same program as it is, bit for bit.  Returns: how many regions."""
    program = in_blocks(random_program(seed, 48), 4)
    for kind in (0, 1):
        inputs = random_inputs(program, kind)
        found = run(program, inputs, runner=by_the_regions(program, plainly()))
        for a, b in zip(found, run(program, inputs), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride(), f"seed {seed} differs:\n{program.text}"
    return len(cut(program))


def test_random_programs_in_regions() -> None:
    assert {check(seed) for seed in range(8)} >= {1, 2}


@pytest.mark.slow
def test_many_random_programs_in_regions() -> None:
    assert {check(seed) for seed in range(8, 80)} >= {1, 2, 3, 4}


def compare(program: Program, artifacts: Artifacts) -> None:
    """Inductor against op by op, within the stated tolerance."""
    rtol, atol = TOLERANCE[torch.float32]
    for kind in (0, 1):
        inputs = random_inputs(program, kind)
        found = run(program, inputs, runner=by_the_regions(program, artifacts))
        for a, b in zip(found, run(program, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_programs_compiled(seed: int) -> None:
    """In one region and in several; programs that draw random numbers run op by op, so these draw none."""
    program = _without_draws(seed)
    compare(program, Artifacts())
    compare(in_blocks(program, 3), Artifacts())


def _without_draws(seed: int) -> Program:
    found = (random_program(number, 24) for number in range(100 * seed, 100 * seed + 100))
    return next(program for program in found if not any(map(is_random, program.graph.nodes)))


# -- memory that is changed -------------------------------------------------------------------------------------------


def changing(lines: str) -> list[Region]:
    """The regions of a program whose first half is in one block, and the second in another."""
    return list(cut(in_blocks(program_of(lines), 2)))


FILL = "\n".join(f"f{i} = aten.neg.default(x)  # f32[4, 8]" for i in range(7))
AFTER = "\n".join(f"g{i} = aten.abs.default(x)  # f32[4, 8]" for i in range(6))


def test_nothing_is_cut_between_a_view_and_the_change_of_its_memory() -> None:
    (region,) = changing(
        f"""
        x: 'input 0'  # f32[4, 8]
        {FILL}
        base = aten.relu.default(x)  # f32[4, 8]
        view = aten.slice.Tensor(base, 1, 0, 4)  # f32[4, 4]  {{stride='8, 1', shares='base'}}
        change = aten.mul_.Tensor(base, 0.5)  # f32[4, 8]  {{shares='base'}}
        {AFTER}
        total = aten.add.Tensor(view, 1.0)  # f32[4, 4]
        return (total,)
        """
    )
    assert region.place == "h.0" and len(region.outputs) == 1


def test_memory_that_is_changed_no_more_crosses_the_border() -> None:
    first, second = changing(
        f"""
        x: 'input 0'  # f32[4, 8]
        {FILL}
        base = aten.relu.default(x)  # f32[4, 8]
        change = aten.mul_.Tensor(base, 0.5)  # f32[4, 8]  {{shares='base'}}
        {AFTER}
        g6 = aten.abs.default(x)  # f32[4, 8]
        g7 = aten.abs.default(x)  # f32[4, 8]
        total = aten.add.Tensor(base, 1.0)  # f32[4, 8]
        return (total,)
        """
    )
    assert [n.name for n in first.outputs] == [n.name for n in second.inputs if n.op != "placeholder"] == ["base"]


def test_members_of_a_tuple_are_not_cut_off() -> None:
    (region,) = changing(
        f"""
        x: 'input 0'  # f32[4, 8]
        {FILL}
        split = aten.split.Tensor(x, 4, 1)  # (f32[4, 4], f32[4, 4])
        {AFTER}
        half = operator.getitem(split, 1)  # f32[4, 4]
        one = aten.neg.default(half)  # f32[4, 4]
        two = aten.neg.default(one)  # f32[4, 4]
        three = aten.neg.default(two)  # f32[4, 4]
        return (three,)
        """
    )
    assert [n.name for n in region.outputs] == ["three"]


def test_two_names_of_memory_that_changes_are_left_to_one_piece() -> None:
    program = program_of(
        """
        a: 'weight a'  # f32[8]
        b: 'weight b'  # f32[8]  {shares='a'}
        change = aten.add_.Tensor(a, 1.0)  # f32[8]  {shares='a'}
        total = aten.add.Tensor(change, b)  # f32[8]
        return (total,)
        """
    )
    assert not can_drive(program, [torch.zeros(8), torch.zeros(8)])


def test_in_place_blocks_and_buffers_in_training() -> None:
    """What a vision model does: blocks that end in place, and norms that keep statistics."""
    net = seeded(lambda: nn.Sequential(ResidualUnit(4), ResidualUnit(4), ResidualUnit(4))).train()
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    program = traced(net, x).program
    assert [region.place for region in cut(program)] == ["0", "1", "2", ""]
    twin = seeded(lambda: nn.Sequential(ResidualUnit(4), ResidualUnit(4), ResidualUnit(4))).train()
    traced(twin, x)
    with torch.no_grad():
        found = traced(net, x, None, plainly())(x)[0]
        expected = traced(twin, x)(x)[0]
    assert found.equal(expected)
    for (name, a), (_, b) in zip(net.named_buffers(), twin.named_buffers(), strict=True):
        assert a.equal(b), name


# -- the driver -------------------------------------------------------------------------------------------------------


def test_values_are_dropped_after_their_last_use() -> None:
    x = rows()
    program = traced(stack(), x).program
    arguments = list(_arguments(program, x))
    driver = drive(program, cut(program), arguments, {}, {size.name: 5 for size in program.sizes}, plainly())
    results = [i for step in driver.steps for i in step.gives]
    assert driver.returns == (results[-1],)
    for step, result in zip(driver.steps[1:], results[:-1], strict=True):
        assert result in step.frees


def _arguments(program: Program, x: Tensor) -> list[Tensor]:
    net = dict(stack().named_parameters())
    return [net[str(b.key)] if b.kind == "weight" else x for b in program.bindings.values()]


def test_inputs_and_constants_may_lie_as_they_like() -> None:
    net, artifacts, vector = stack(), plainly(), torch.ones(8, 2).T
    x = torch.randn(6, 2).T

    def edit(model: Any) -> None:
        model.blocks[0].output = model.blocks[0].output + vector

    expected = traced(net, x, edit)(x)[0]
    for y in (x, x.contiguous()):
        torch.testing.assert_close(traced(net, y, edit, artifacts)(y)[0], expected)
    assert counted(artifacts) == (4, 2), (
        "the layer before; with the two rows of the vector: a block, three blocks, the layer after"
    )


def test_random_numbers_are_drawn_in_the_same_order() -> None:
    net = seeded(lambda: nn.Sequential(*(nn.Sequential(_Block(), nn.Dropout(0.5)) for _ in range(3)))).train()
    x = torch.ones(4, 8)
    for artifacts in (None, plainly()):
        program = traced(net, x, None, artifacts)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(3)
            found = program(x)[0]
            torch.manual_seed(3)
            assert found.equal(net(x))


def test_what_draws_random_numbers_is_not_compiled() -> None:
    def refuses(module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        raise AssertionError("compiled")

    program = program_of(
        """
        x: 'input 0'  # f32[batch, 8]
        drop = aten.dropout.default(x, 0.5, True)  # f32[batch, 8]
        return (drop,)
        """
    )
    inputs = random_inputs(program)
    for lowered in (
        by_the_regions(program, Artifacts(compiler=refuses)),
        lambda *arguments: inductor(program, arguments, {}, Artifacts())(*arguments),
    ):
        assert run(program, inputs, runner=lowered)[0].equal(run(program, inputs)[0])


def test_sizes_that_only_numbers_tell_do_not_cross_borders() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0].sum()

    x = rows()
    assert traced(Chosen(), x, None, plainly())(x)[0].equal(x[x > 0].sum())
    program = in_blocks(
        program_of(
            f"""
            x: 'input 0'  # f32[4, 8]
            {FILL}
            some = aten.nonzero.default(x)  # i64[u0, 2]
            {AFTER}
            one = aten.neg.default(some)  # i64[u0, 2]
            two = aten.neg.default(one)  # i64[u0, 2]
            return (two,)
            """
        ),
        2,
    )
    with pytest.raises(InputError, match=r"needs sizes that only running the model tells: .*; use backend='eager'"):
        by_regions(program, [torch.ones(4, 8)], {}, plainly())


# -- one piece --------------------------------------------------------------------------------------------------------


def test_compiling_in_one_piece_is_for_the_compiled_tier() -> None:
    with pytest.raises(TraceError, match=r"runs op by op, bit for bit: trace it with backend='inductor' to compile it"):
        traced(stack(), rows()).compile_whole()


@pytest.mark.slow
def test_regions_and_one_piece_agree() -> None:
    net, x, artifacts = tiny_transformer().eval(), token_ids(2, 5), Artifacts()
    program = traced(net, x, None, artifacts)
    rtol, atol = TOLERANCE[torch.float32]
    with torch.no_grad():
        torch.testing.assert_close(program(x)[0], net(x), rtol=rtol, atol=atol)
        made = artifacts.made
        program.compile_whole()
        torch.testing.assert_close(program(x)[0], net(x), rtol=rtol, atol=atol)
        torch.testing.assert_close(program(token_ids(3, 7))[0], net(token_ids(3, 7)), rtol=rtol, atol=atol)
    assert artifacts.made == made + 1 and program.tier == "inductor"  # one piece is one more, for all sizes


def test_no_operators_no_regions() -> None:
    program = program_of("x: 'input 0'  # f32[batch, 8]\nreturn (x,)")
    x = torch.ones(2, 8)
    assert cut(program) == () and by_regions(program, [x], {}, plainly())(x) == [x] and eager(program)(x)[0] is x
