"""The models we test on and the hooks we compare with, tested alone: nothing of fxsight is used here."""

import ast
import copy
import inspect
import textwrap
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import Edit, Port, Read, calls, patched, run
from tests.programs import (
    INPLACE,
    OPS,
    AssignStep,
    Const,
    InplaceStep,
    Op,
    OpStep,
    Place,
    ReadStep,
    SaveStep,
    Step,
    constant,
    describe,
    run_with_hooks,
)
from tests.random_programs import places, random_program
from tests.zoo import ENTRIES, Entry, TinyTransformer, tiny_transformer, token_ids

each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


@cache
def made(entry: Entry) -> nn.Module:
    return entry.make()


@pytest.fixture(scope="module")
def net() -> TinyTransformer:
    return tiny_transformer()


@pytest.fixture
def ids() -> Tensor:
    return token_ids(2, 5)


def main_tensor(output: Any) -> Tensor:
    result = output if isinstance(output, Tensor) else output["logits"]
    assert isinstance(result, Tensor)
    return result


def logits_of(entry: Entry, steps: list[Edit | Read] | None = None, size: tuple[int, int] | None = None) -> Tensor:
    args, kwargs = entry.inputs(*(size or next(entry.sizes())))
    function = {"function": entry.function.place()}
    return main_tensor(run(made(entry), args, kwargs, steps or [], function)[0])


def function_path(entry: Entry) -> str:
    return calls("function", entry.function.call)


# ---------------------------------------------------------------------------------------------------- the zoo


def test_every_family_is_there() -> None:
    names = "gpt2 llama qwen3 gemma3_text mistral mixtral phi3 gpt_neox opt bloom mamba bert t5 vit cnn rnn"
    assert [entry.name for entry in ENTRIES] == names.split()


@each_entry
def test_runs_at_every_size(entry: Entry) -> None:
    for batch, length in entry.sizes():
        result = logits_of(entry, size=(batch, length))
        assert result.shape[0] == batch
        assert result.dtype == torch.float32
        assert result.isfinite().all()
        assert not result.allclose(result[:1])


@each_entry
def test_is_small_and_in_evaluation_mode(entry: Entry) -> None:
    assert sum(p.numel() for p in made(entry).parameters()) < 100_000
    assert not any(module.training for module in made(entry).modules())


@each_entry
def test_is_the_same_each_time_and_spares_the_random_state(entry: Entry) -> None:
    state = torch.get_rng_state()
    first, second = entry.make().state_dict(), entry.make().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_entry
def test_inputs_are_the_same_each_time(entry: Entry) -> None:
    size = next(entry.sizes())
    assert repr(entry.inputs(*size)) == repr(entry.inputs(*size))
    assert torch.equal(logits_of(entry), logits_of(entry))


@each_entry
def test_every_path_is_reached(entry: Entry) -> None:
    paths = [entry.module, entry.inner, entry.op[2], function_path(entry)]
    steps = [Read(path, "output") for path in paths]
    for batch, length in entry.sizes():
        args, kwargs = entry.inputs(batch, length)
        function = {"function": entry.function.place()}
        _, values = run(made(entry), args, kwargs, steps, function)
        assert all(value.is_floating_point() for value in values)


@each_entry
@pytest.mark.parametrize("port", ["input", "output"])
def test_an_identity_edit_changes_nothing(entry: Entry, port: Port) -> None:
    plain = logits_of(entry)
    for path in (entry.module, entry.inner, entry.op[2], function_path(entry)):
        assert torch.equal(logits_of(entry, [Edit(path, port, "assign", lambda h: h)]), plain)
        assert torch.equal(logits_of(entry, [Edit(path, port, "inplace", lambda h: None)]), plain)


@each_entry
def test_an_edit_changes_the_result(entry: Entry) -> None:
    plain = logits_of(entry)
    for path in (entry.module, entry.inner, entry.op[2], function_path(entry)):
        assert not torch.equal(logits_of(entry, [Edit(path, "output", "assign", lambda h: h * 2 + 1)]), plain)
        assert not torch.equal(logits_of(entry, [Edit(path, "output", "inplace", lambda h: h.mul_(2).add_(1))]), plain)


@each_entry
def test_operations_are_in_the_source(entry: Entry) -> None:
    module, name, called = entry.op
    assert name in call_names(made(entry).get_submodule(module))
    assert called == ".".join(filter(None, [module, name.removeprefix("self_").rsplit("_", 1)[0]]))
    assert entry.function.name in call_names(made(entry).get_submodule(entry.function.module))


@each_entry
def test_the_function_is_called_where_it_says(entry: Entry) -> None:
    """The one call that is intercepted happens while the forward of its module runs."""
    events: list[str] = []

    def noting(event: str) -> Any:
        return lambda h: events.append(event)

    logits_of(
        entry,
        [
            Edit(entry.function.module, "input", "inplace", noting("enter")),
            Edit(function_path(entry), "output", "inplace", noting("call")),
            Edit(entry.function.module, "output", "inplace", noting("leave")),
        ],
    )
    assert events == ["enter", "call", "leave"]


def call_names(module: nn.Module) -> set[str]:
    """The calls in a module's forward: the callee's names joined by `_`, counted, inner calls first."""
    forward = inspect.unwrap(type(module).forward)
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    counts: Counter[str] = Counter()
    names: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            walk(child)
        if isinstance(node, ast.Call):
            name = callee_name(node.func)
            names.add(f"{name}_{counts[name]}")
            counts[name] += 1

    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    for statement in function.body:
        walk(statement)
    return names


def callee_name(callee: ast.expr) -> str:
    match callee:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name() | ast.Attribute() as owner, attr=name):
            return f"{callee_name(owner)}_{name}"
        case ast.Attribute(attr=name):
            return name
        case _:
            return "unknown"


# -------------------------------------------------------------------------------------------- edits and reads


def test_an_assignment_is_seen_at_its_location_only(net: TinyTransformer, ids: Tensor) -> None:
    """The input of `ln_1` is the residual stream; the residual sum reads that, not what `ln_1` is given."""
    _, values = run(
        net,
        (ids,),
        {},
        [
            Read("blocks.0", "output"),
            Edit("blocks.1.ln_1", "input", "assign", torch.zeros_like),
            Read("blocks.1.ln_1", "input"),
            Read("blocks.1.attn", "output"),
            Read("blocks.1.ln_2", "input"),
        ],
    )
    stream, zeros, attention, after = values
    assert not zeros.any()
    assert torch.equal(after, stream + attention)


def test_an_edit_in_place_is_seen_by_whoever_runs_later(net: TinyTransformer, ids: Tensor) -> None:
    _, values = run(
        net,
        (ids,),
        {},
        [
            Read("blocks.1", "input"),
            Edit("blocks.1.ln_1", "input", "inplace", lambda h: h.zero_()),
            Read("blocks.1.attn", "output"),
            Read("blocks.1.ln_2", "input"),
        ],
    )
    before, attention, after = values
    assert before.any()
    assert torch.equal(after, attention)


def test_steps_at_one_location_run_in_order(net: TinyTransformer, ids: Tensor) -> None:
    where: tuple[str, Port] = ("blocks.0.mlp", "output")
    _, values = run(
        net,
        (ids,),
        {},
        [
            Read(*where),
            Edit(*where, "inplace", lambda h: h.mul_(2)),
            Read(*where),
            Edit(*where, "assign", lambda h: h + 1),
            Read(*where),
        ],
    )
    assert torch.equal(values[1], values[0] * 2)
    assert torch.equal(values[2], values[1] + 1)


def test_an_assigned_value_is_broadcast_and_copied(net: TinyTransformer, ids: Tensor) -> None:
    row = torch.arange(16.0)
    where: tuple[str, Port] = ("blocks.2", "output")
    steps: list[Edit | Read] = [
        Edit(*where, "assign", lambda _: row),
        Edit(*where, "inplace", lambda h: h.add_(1)),
        Read(*where),
    ]
    _, values = run(net, (ids,), {}, steps)
    assert torch.equal(values[0], (row + 1).expand(2, 5, 16))
    assert torch.equal(row, torch.arange(16.0))


def test_each_call_of_a_module_can_be_chosen() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "rnn")
    args, kwargs = entry.inputs(2, 4)
    steps: list[Edit | Read] = [Read(calls("cell", n), "output") for n in range(4)]
    _, plain = run(made(entry), args, kwargs, steps)
    _, edited = run(made(entry), args, kwargs, [*steps, Edit("cell#2", "output", "inplace", lambda h: h.zero_())])
    assert [torch.equal(a, b) for a, b in zip(plain, edited, strict=True)] == [True, True, True, False]
    with pytest.raises(LookupError, match=r"never reached in this forward.*cell#4"):
        run(made(entry), args, kwargs, [Read("cell#4", "output")])


def test_the_callers_tensors_are_left_alone() -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "cnn")
    args, kwargs = entry.inputs(2, 8)
    before = copy.deepcopy(args)
    run(made(entry), args, kwargs, [Edit("", "input", "inplace", lambda h: h.zero_())])
    assert torch.equal(args[0], before[0])


def test_a_patched_function_is_put_back() -> None:
    original = torch.nn.functional.gelu
    table = {"gelu": original}
    for owner in (torch.nn.functional, table):
        with pytest.raises(KeyError), patched(owner, "gelu", lambda gelu: lambda x: gelu(x) * 0):
            assert not (table["gelu"] if owner is table else torch.nn.functional.gelu)(torch.ones(3)).any()
            raise KeyError
    assert torch.nn.functional.gelu is original
    assert table["gelu"] is original


def test_a_patched_function_agrees_with_a_hook(net: TinyTransformer, ids: Tensor) -> None:
    """GELU's output is the input of `mlp.down`, and nobody else's."""

    def halve(h: Tensor) -> Tensor:
        return h * 0.5

    gelu = {"gelu": (torch.nn.functional, "gelu")}
    by_patch, _ = run(net, (ids,), {}, [Edit("gelu#1", "output", "assign", halve)], gelu)
    by_hook, _ = run(net, (ids,), {}, [Edit("blocks.1.mlp.down", "input", "assign", halve)])
    assert torch.equal(by_patch, by_hook)
    assert not torch.equal(by_patch, run(net, (ids,), {})[0])


# -------------------------------------------------------------------------------------------- random programs


def test_places_stand_in_the_order_of_execution(net: TinyTransformer, ids: Tensor) -> None:
    found = places(net, ids)
    assert found[:4] == (
        Place("embed", "output", 16),
        Place("blocks.0", "input", 16),
        Place("blocks.0.ln_1", "input", 16),
        Place("blocks.0.ln_1", "output", 16),
    )
    assert found[-2:] == (Place("head", "output", 98), Place("", "output", 98))
    assert len(set(found)) == len(found)
    assert found == places(net, token_ids(3, 8))
    assert set(places(net, ids, ["blocks.1.mlp"])) <= set(found)


def test_a_program_is_the_same_each_time(net: TinyTransformer, ids: Tensor) -> None:
    at = places(net, ids)
    assert random_program(7, at) == random_program(7, at)
    assert len({random_program(seed, at) for seed in range(20)}) == 20


def test_programs_use_every_kind_of_step_and_every_table_entry(net: TinyTransformer, ids: Tensor) -> None:
    at = places(net, ids)
    steps = [step for seed in range(200) for step in random_program(seed, at)]
    assert {step.fn_name for step in steps if isinstance(step, OpStep)} == set(OPS)
    assert {step.how for step in steps if isinstance(step, InplaceStep)} == set(INPLACE)
    writes = [step for step in steps if isinstance(step, AssignStep | InplaceStep)]
    assert {(step.path, step.port) for step in writes} == {(place.path, place.port) for place in at}
    assert any(isinstance(step, InplaceStep) and isinstance(step.value, str) for step in steps)


@pytest.mark.parametrize("size", [(2, 5), (3, 8)])
def test_random_programs_run_and_matter(net: TinyTransformer, size: tuple[int, int]) -> None:
    ids = token_ids(*size)
    plain = run(net, (ids,), {})[0]
    at = places(net, ids)
    changed = 0
    for seed in range(50):
        steps = random_program(seed, at)
        first, second = run_with_hooks(steps, net, ids), run_with_hooks(steps, net, ids)
        for a, b in zip([*first[0], first[1]], [*second[0], second[1]], strict=True):
            assert a.isfinite().all(), describe(steps)
            assert torch.equal(a, b), describe(steps)
        changed += not torch.equal(first[1], plain)
    assert changed >= 25


def test_a_program_of_reads_changes_nothing(net: TinyTransformer, ids: Tensor) -> None:
    at = places(net, ids)
    reads = [ReadStep(f"v{i}", place.path, place.port) for i, place in enumerate(at)]
    saves = [SaveStep(read.var) for read in reads]
    values, logits = run_with_hooks([*reads, *saves], net, ids)
    plain, expected = run(net, (ids,), {}, [Read(place.path, place.port) for place in at])
    assert torch.equal(logits, plain)
    assert all(map(torch.equal, values, expected))


def test_a_program_agrees_with_edits_as_functions(net: TinyTransformer, ids: Tensor) -> None:
    """A patch across layers, written both ways; a variable keeps its value whatever happens to its copies."""
    row = Const(3, (16,))
    steps: list[Step] = [
        ReadStep("v0", "blocks.0.mlp", "output"),
        InplaceStep("blocks.1.mlp", "output", "add", "v0"),
        AssignStep("blocks.1.ln_2", "output", "v0"),
        InplaceStep("blocks.1.mlp", "input", "mul", row),
        InplaceStep("blocks.0.mlp", "output", "relu"),
        SaveStep("v0"),
    ]
    (saved,), logits = run_with_hooks(steps, net, ids)
    _, (patch,) = run(net, (ids,), {}, [Read("blocks.0.mlp", "output")])
    by_functions, _ = run(
        net,
        (ids,),
        {},
        [
            Edit("blocks.0.mlp", "output", "inplace", lambda h: h.relu_()),
            Edit("blocks.1.ln_2", "output", "assign", lambda _: patch),
            Edit("blocks.1.mlp", "input", "inplace", lambda h: h.mul_(row.tensor())),
            Edit("blocks.1.mlp", "output", "inplace", lambda h: h.add_(patch)),
        ],
    )
    assert torch.equal(saved, patch)
    assert torch.equal(logits, by_functions)


def test_a_program_that_is_not_causal_is_refused(net: TinyTransformer, ids: Tensor) -> None:
    steps: list[Step] = [ReadStep("v0", "blocks.2", "output"), AssignStep("blocks.0", "output", "v0")]
    with pytest.raises(LookupError, match=r"^'?v0 is not read yet: this program is not causal'?$"):
        run_with_hooks(steps, net, ids)


def test_describe() -> None:
    steps: list[Step] = [
        ReadStep("v0", "blocks.0.attn", "output"),
        OpStep("v1", "mix", ("v0", "v0"), 0.5),
        OpStep("v2", "edited_copy", ("v1",), -1.0),
        AssignStep("", "output", "v2"),
        InplaceStep("blocks.1", "input", "add", Const(4, (16,))),
        InplaceStep("blocks.1", "input", "set_position_from", "v0"),
        SaveStep("v2"),
    ]
    assert describe(steps) == (
        "with model.trace(ids):\n"
        "    v0 = model.blocks[0].attn.output\n"
        "    v1 = v0 * 0.5 + v0\n"
        "    v2 = v1.clone(); v2[:, 0] = -1.0\n"
        "    model.output = v2\n"
        "    model.blocks[1].input.add_(constant(4, (16,)))\n"
        "    model.blocks[1].input[:, -1] = v0[:, 0]\n"
        "    v2.save()"
    )


def test_programs_are_described_in_python_that_parses(net: TinyTransformer, ids: Tensor) -> None:
    at = places(net, ids)
    for seed in range(50):
        ast.parse(describe(random_program(seed, at)))


VALUES: dict[str, Any] = {"number": -0.7, "row": constant(1, (6,)), "matrix": constant(2, (6, 6))}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_an_operation_leaves_its_arguments_alone(op: Op) -> None:
    arguments = [constant(seed, (2, 5, 6)) for seed in range(op.arity)]
    if op.const != "none":
        arguments.append(VALUES[op.const])
    before = copy.deepcopy(arguments)
    assert op.fn(*arguments).shape == ((2, 5, 6) if op.arity else (6,))
    assert str(arguments) == str(before)


@pytest.mark.parametrize("how", INPLACE)
def test_an_edit_in_place_changes_the_tensor(how: str) -> None:
    for kind in INPLACE[how].values:
        before = constant(0, (2, 5, 6))
        live = before.clone()
        value = constant(1, (2, 5, 6)) if kind == "var" else VALUES.get(kind)
        INPLACE[how].fn(live, *(() if kind == "none" else (value,)))
        assert not torch.equal(live, before)


def test_names_of_calls() -> None:
    class Sample(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(torch.relu(x)).sum().view(1)
            return x if x.dim() else (x @ x).sum()

    expected = {"torch_relu_0", "torch_relu_1", "sum_0", "sum_1", "view_0", "x_dim_0"}
    assert call_names(Sample()) == expected
