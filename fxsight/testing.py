"""For tests of passes, ours and yours: the questions every pass is asked, and programs to ask them about.

    check_pass(DropUnused(), random_program(seed=3))
    check_pass(Scale(GELU, 0.5), program, neutral=Scale(GELU, 1.0), equals=lambda m, x: m.down(gelu(m.up(x)) * 0.5))

What is wrong is an ``AssertionError`` that shows it: the lines that differ, or the largest difference.
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxsight.book import Book, Call, Ref, Structure
from fxsight.draft import Draft
from fxsight.lower import eager
from fxsight.node import Binding, InputLeaf, tensor_spec
from fxsight.parse import parse_program
from fxsight.program import Program
from fxsight.rewrite import Pass
from fxsight.run import Weights
from fxsight.spec import SizeSpec, TensorSpec, number
from fxsight.text import node_line
from fxsight.tree import LEAF, Tree, flatten
from fxsight.verify import verify

Inputs = Sequence[Any]

# -- the questions ---------------------------------------------------------------------------------------------------


def check_pass(
    pass_: Pass,
    program: Program,
    *,
    module: nn.Module | None = None,
    inputs: Sequence[Inputs] | None = None,
    neutral: Pass | None = None,
    equals: Callable[..., Any] | None = None,
    tolerance: float = 0.0,
) -> Program:
    """Ask a pass what every pass must answer; the rewritten program.

    - The program it is given is as it was: its text is the same before and after.
    - Two runs give equal programs, and the history of both ends with the pass.
    - The result keeps the rules of ``verify``, and is read back from its own text.
    - "Nothing to do" is the program itself, ``changed`` False; so is what ``neutral`` makes of it.
    - The result computes what the program did, or what ``equals`` does.

    module: where the weights are; without it they are random.  inputs: leaves of the program's inputs, one list a
    run; without it two random lists, of two sizes.  neutral: the same pass with options that should change nothing.
    equals: plain torch: from the module (None without one) and the inputs to what the program is to return.
    tolerance: largest difference, relative and absolute; 0 compares bit by bit, as long as no arithmetic changed.

    Raises: AssertionError; ProgramError where the result breaks a rule.
    """
    before, again = program.text, pass_.apply(program)
    result = _checked(pass_, program, again.changed, again.program, before)
    _same_text(f"{pass_.label}: two runs differ", result.text, pass_.apply(program).program.text)
    if neutral is not None:
        unchanged = neutral.apply(program)
        _same_text(f"{neutral.label} is not neutral", before, unchanged.program.text)
        assert unchanged.program is program and not unchanged.changed, f"{neutral.label} says it changed something"
    for leaves in inputs if inputs is not None else (random_inputs(program, 0), random_inputs(program, 1)):
        expected = run(program, leaves, module) if equals is None else flatten(equals(module, *_copies(leaves)))[0]
        _same_numbers(pass_.label, run(result, leaves, module), expected, tolerance)
    return result


def _checked(pass_: Pass, program: Program, changed: bool, result: Program, before: str) -> Program:
    _same_text(f"{pass_.label} changed the program it was given", before, program.text)
    assert changed == (result is not program), f"{pass_.label}: changed is {changed}"
    if changed:
        assert result.history == (*program.history, pass_.label), f"{pass_.label} is not in {result.history}"
    read = parse_program(verify(result).text, result.book, result.literals)
    _same_text(f"{pass_.label}: its program is not read back from its text", result.text, read.text)
    return result


def _same_text(what: str, expected: str, found: str) -> None:
    if expected != found:
        lines = difflib.unified_diff(expected.splitlines(), found.splitlines(), "expected", "found", lineterm="", n=1)
        raise AssertionError("\n".join([what, *lines]))


def _same_numbers(label: str, found: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    assert len(found) == len(expected), f"{label}: it returns {len(found)} values, not {len(expected)}; give equals=..."
    for place, pair in enumerate(zip(found, expected, strict=True)):
        try:
            torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{label}: value {place}: {error}") from None


# -- running ---------------------------------------------------------------------------------------------------------


def run(
    program: Program,
    inputs: Inputs,
    module: nn.Module | None = None,
    runner: Callable[..., Sequence[Any]] | None = None,
) -> list[Any]:
    """What a program returns, op by op, for the leaves of its inputs; weights of the module, or random ones.

    The same random numbers at every call. Inputs and weights stay as they are: the program works on copies.
    runner: a function of the program's placeholders to run in its place.
    """
    leaves = _copies(inputs)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        bound = program.bindings.items()
        arguments = [_argument(program, name, binding, leaves, module) for name, binding in bound]
        torch.manual_seed(1)
        return list((runner or eager(program))(*arguments))


def random_inputs(program: Program, seed: int = 0) -> list[Any]:
    """Leaves for a program's inputs: its fixed ones, and random tensors; every seed has its own sizes.

    Floating-point numbers are normal, integers among 0 to 3.
    """
    rng = random.Random(seed)
    sizes = {s.name: max(s.low, 2) + rng.randrange(4) for s in program.sizes}
    generator = torch.Generator().manual_seed(seed)
    leaves = program.input_leaves
    return [_input(leaf, sizes, generator) for leaf in leaves]


def _input(leaf: InputLeaf, sizes: Mapping[str, int], generator: torch.Generator) -> Any:
    if isinstance(leaf, TensorSpec):
        return _random(leaf.at(sizes), generator)
    return number(leaf.expr, sizes) if isinstance(leaf, SizeSpec) else leaf.value


def _argument(program: Program, name: str, binding: Binding, leaves: Inputs, module: nn.Module | None) -> Any:
    if binding.kind == "input":
        return leaves[int(binding.key)]
    if binding.kind == "literal":
        return program.literals[str(binding.key)].clone()
    if binding.kind == "weight" and module is not None:
        return Weights(module, [str(binding.key)])()[0].clone()
    generator = torch.Generator().manual_seed(sum(map(ord, str(binding))))  # the same in every program
    return _random(tensor_spec(program.nodes[name]), generator)


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    shape = [int(d) for d in spec.shape]
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=spec.dtype)
    return torch.randint(0, 4, shape, generator=generator).to(spec.dtype)


def _copies(leaves: Inputs) -> list[Any]:
    return [x.clone() if isinstance(x, Tensor) else x for x in leaves]


# -- programs --------------------------------------------------------------------------------------------------------


def program_of(lines: str) -> Program:
    """A program from its lines alone, as ``Program.text`` has them, without the header.

        x: 'input 0'                               # f32[batch, 8]
        w: 'weight w'                              # f32[8, 8]
        half = aten.slice.Tensor(x, 1, 0, 4)       # f32[batch, 4]  {stride='8, 1', shares='x'}
        return (half,)

    Sizes are at least 1. The time of an operator is the number of its line among the operators, from 1, where the line
    gives none; all have addresses in the root module: ``/aten_slice_0``.

    Raises: TextError.
    """
    rows = [line.strip() for line in lines.strip().splitlines()]
    given = [row.partition("#") for row in rows if re.match(r"\w+: '", row)]
    calls = [row for row in rows if re.match(r"\w+ = ", row)]
    returned = re.findall(r"\w+", rows[-1].removeprefix("return"))
    inputs = [(name.partition(":")[0], spec.strip()) for name, _, spec in given if "'input " in name]
    sizes = dict.fromkeys(re.findall(r"[a-z_]\w*", " ".join(spec.partition("[")[2] for _, spec in inputs)))
    text = [
        "# program Written",
        *([f"# sizes: {', '.join(f'{size} >= 1' for size in sizes)}"] if sizes else []),
        f"# inputs: {_leaves(_pair(len(inputs)), [{'type': spec, 'shares': name} for name, spec in inputs])}",
        f"# outputs: {_leaves(_members(len(returned)), [None] * len(returned))}",
        "def program(",
        *(f"    {name.strip().removesuffix(',')},  # {spec.strip()}" for name, _, spec in given),
        "):",
        *(f"    {_timed(row, number)}" for number, row in enumerate(calls, 1)),
        f"    return ({''.join(f'{name}, ' for name in returned)})",
        "",
    ]
    return parse_program("\n".join(text), _book([name for name, _ in inputs], returned, len(calls) + 1))


def listing(program: Program) -> str:
    """The operators of a program and what it returns, one a line, without types, addresses and origins."""
    rows = [node_line(n).strip() for n in program.graph.nodes if n.op == "call_function"]
    return "\n".join([*rows, f"return ({''.join(f'{n.name}, ' for n in program.results).strip()})"])


def _timed(row: str, number: int) -> str:
    """The line with a time and the root as its call, where it has none."""
    given = "time=" in row or "call=" in row
    if row.endswith("}") and not given:
        return f"{row[:-1]}, call=0, time={number}}}"
    return row if given else f"{row}  {{call=0, time={number}}}"


def _members(count: int) -> Tree:
    return Tree("tuple", "", tuple(range(count)), (LEAF,) * count)


def _pair(count: int) -> Tree:
    return Tree("tuple", "", (0, 1), (_members(count), Tree("dict")))


def _leaves(tree: Tree, leaves: Sequence[Any]) -> str:
    return json.dumps([tree.to_json(), leaves])


def _book(inputs: Sequence[str], returned: Sequence[str], end: int) -> Book:
    """An address book of the root module alone."""
    given = Structure(_pair(len(inputs)), tuple(map(Ref, inputs)))
    output = Structure(_members(len(returned)), tuple(map(Ref, returned)))
    return Book((Call(0, None, "module", "root", 0, "", 0, "Written", "", None, given, output, 0, end),))


def random_program(seed: int, size: int = 16, *, in_place: bool = True) -> Program:
    """A program like captured ones, of about ``size`` operators, for property tests; nothing is exported for it.

    It has two inputs (f32[batch, 8]), weights, views, borders of modules (``alias``), stacks that are taken apart
    again, values nobody needs, dropout and, with ``in_place``, operators that change memory others see. Addresses are
    those of ``program_of``. The same seed gives the same program.
    """
    draft = Draft(random.Random(seed))
    makers = [draft.unary, draft.binary, draft.linear, draft.border, draft.view, draft.stack, draft.dropout]
    for make in draft.rng.choices([*makers, draft.change] if in_place else makers, k=size):
        make()
    return program_of(draft.text())
