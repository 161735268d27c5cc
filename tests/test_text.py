"""Programs as text: the same on every run and at every size, complete, read back to an equal program, and safe."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

import fxsight
from fxsight.errors import TextError
from fxsight.functions import find_function, function_name
from fxsight.lower import eager
from fxsight.node import origin_of
from fxsight.parse import parse_program
from fxsight.program import Program
from fxsight.testing import program_of
from fxsight.verify import verify
from tests.zoo import tiny_transformer, token_ids


class Net(nn.Module):
    """A linear layer, a residual connection, an in-place operator."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.up(x).relu_()
        return {"y": x + y, "width": 4}


@cache
def _model() -> fxsight.Model:
    torch.manual_seed(0)
    return fxsight.Model(Net().eval(), cache=False)


@cache
def _transformer() -> fxsight.Model:
    return fxsight.Model(tiny_transformer().eval(), cache=False)


def _x(batch: int = 2) -> Tensor:
    return torch.ones(batch, 4)


def _edited(model: fxsight.Model, ids: Tensor) -> tuple[Program, Program]:
    """The captured and a finished program of a transformer."""
    with torch.no_grad(), model.trace(ids) as tracer:
        model.blocks[0].output[:, 0] *= 2
        model.blocks[1].output.chunk(2, -1)[1].add_(1.0)
        fxsight.save({"h": model.blocks[1].input, "out": (model.output.softmax(-1),)})
    captured = model._captures.latest
    assert captured is not None
    return captured, tracer.program.program


# ------------------------------------------------------------------------------------------------ as written


def test_a_captured_program() -> None:
    with torch.no_grad(), _model().trace(_x()):
        pass
    assert _code(_model()._captures.latest) == CAPTURED


def test_a_finished_program() -> None:
    with torch.no_grad(), _model().trace(_x()) as tracer:
        _model().up.output[:, 0] = 0
        _model().output["y"].save()
    assert _code(tracer.program.program) == FINISHED


def _code(program: Program | None) -> str:
    """The text without origins, which say lines of torch's own files, and without the columns that they are in."""
    lines = str(program).splitlines()
    kept = [line.partition("  {")[0].rstrip() for line in lines if not line.startswith(("# inputs", "# outputs"))]
    return "\n".join(re.sub(" {4,}#", "    #", line) for line in kept)


CAPTURED = """\
# program Net
# sizes: batch >= 0
# made by: capture
def program(
    up_weight: 'weight up.weight',    # f32[4, 4]
    x: 'input 0',    # f32[batch, 4]
):
    alias = aten.alias.default(x)    # f32[batch, 4]
    alias_1 = aten.alias.default(alias)    # f32[batch, 4]  up
    linear = aten.linear.default(alias_1, up_weight)    # f32[batch, 4]  up/F_linear_0
    alias_2 = aten.alias.default(linear)    # f32[batch, 4]  up
    relu_ = aten.relu_.default(alias_2)    # f32[batch, 4]  /relu__0
    add = aten.add.Tensor(alias, relu_)    # f32[batch, 4]  /operator_add_0
    alias_3 = aten.alias.default(add)    # f32[batch, 4]
    return (alias_3,)"""

FINISHED = """\
# program Net
# sizes: batch >= 0
# made by: capture, Weave(reads=2, writes=1, saves=1), EraseBoundaries(), ExpandMutations()
def program(
    up_weight: 'weight up.weight',    # f32[4, 4]
    x: 'input 0',    # f32[batch, 4]
):
    linear = aten.linear.default(x, up_weight)    # f32[batch, 4]  up/F_linear_0
    snapshot = aten.clone.default(linear)    # f32[batch, 4]  up
    user_mutate = aten.clone.default(snapshot)    # f32[2, 4]
    user_setitem = torch.Tensor.__setitem__(user_mutate, (slice(None, None, None), 0), 0)    # none
    copy = aten.clone.default(user_mutate)    # f32[2, 4]
    relu_ = aten.relu_.default(copy)    # f32[batch, 4]  /relu__0
    add = aten.add.Tensor(x, relu_)    # f32[batch, 4]  /operator_add_0
    return (add,)"""


# ---------------------------------------------------------------------------------------------------- stable

_PRINT = """
import torch
from tests.test_text import _edited
from tests.zoo import tiny_transformer, token_ids
import fxsight
for program in _edited(fxsight.Model(tiny_transformer().eval(), cache=False), token_ids({batch}, {length})):
    print(program)
"""


def _in_a_process(batch: int, length: int, seed: str) -> str:
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PRINT.format(batch=batch, length=length)]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True, timeout=300).stdout


def test_two_processes_print_the_same() -> None:
    captured, finished = _edited(_transformer(), token_ids(2, 5))
    text = f"{captured}\n{finished}\n"
    assert _in_a_process(2, 5, "1") == text


def test_two_sizes_print_the_same() -> None:
    """The finished programs, recorded at different sizes: the same but for the shapes noted beside a body's lines."""
    other = fxsight.Model(tiny_transformer().eval(), cache=False)
    expected = list(map(_without_notes, _edited(_transformer(), token_ids(2, 5))))
    assert list(map(_without_notes, _edited(other, token_ids(3, 8)))) == expected
    assert list(map(_without_notes, _edited(other, token_ids(4, 2)))) == expected


def _without_notes(program: Any) -> list[str]:
    return [line.partition("    # ")[0].rstrip() for line in str(program).splitlines()]


# ------------------------------------------------------------------------------------------------ there and back


def test_text_reads_back_to_an_equal_program() -> None:
    for program in _edited(_transformer(), token_ids(2, 5)):
        read = verify(parse_program(str(program), program.book, program.literals))
        assert read == program and str(read) == str(program)
        assert [n.meta for n in read.graph.nodes if n.op != "output"] == [
            {k: v for k, v in n.meta.items() if k in ("spec", "origin", "binding")}
            for n in program.graph.nodes
            if n.op != "output"
        ]
        assert (read.inputs, read.input_leaves, read.outputs) == (program.inputs, program.input_leaves, program.outputs)
        assert (read.sizes, read.guards, read.history) == (program.sizes, program.guards, program.history)


def test_a_program_that_was_read_back_runs() -> None:
    ids = token_ids(2, 5)
    with torch.no_grad(), _transformer().trace(ids) as tracer:
        _transformer().blocks[0].output[:, 0] *= 2
        out = _transformer().output.save()
    program = tracer.program.program
    read = parse_program(str(program), program.book, program.literals)
    weights = dict(_transformer()._module.named_parameters()) | dict(_transformer()._module.named_buffers())
    values = [ids if b.kind == "input" else weights[str(b.key)] for b in read.bindings.values()]
    with torch.no_grad():
        assert torch.equal(eager(read)(*values)[0], out)


ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "slices": lambda x: x[..., 1:3, None, ::2],
    "negative": lambda x: x[-1:, :-1],
    "all": lambda x: x[:],
    "list": lambda x: x[:, [0, -1]],
    "nested list": lambda x: x[[0, 1], [[1], [0]]],
    "tuple": lambda x: x.permute((1, 0)),
    "empty": lambda x: x[()],
    "dtype": lambda x: x.to(torch.float64, copy=True).sum(dtype=torch.bfloat16),
    "device": lambda x: x.to(torch.device("cpu"), torch.float16) + x.new_zeros(4, device="cpu"),
    "layout": lambda x: torch.zeros_like(x, layout=torch.strided, memory_format=torch.contiguous_format),
    "inf": lambda x: x.masked_fill(x > 0, -math.inf).clamp(max=math.inf),
    "nan": lambda x: torch.nan_to_num(x, nan=math.nan, posinf=1e30),
    "float": lambda x: x * 0.1 + 1e-45 - 3.141592653589793 * 1e22,
    "negative zero": lambda x: x * -0.0,
    "complex": lambda x: (x * (1 + 2j)).real,
    "none": lambda x: torch.clamp(x, None, 0.5),
    "bool": lambda x: x.argsort(dim=-1, descending=True, stable=False),
    "int": lambda x: x + 2**40,
    "string": lambda x: torch.nn.functional.pad(x, [1, 1], mode="constant", value=2.0),
    "text": lambda x: torch.einsum("ij,kj->ik", x, x),
    "dict": lambda x: torch.nn.functional.interpolate(x[None], size=7, mode="linear", align_corners=False),
    "reduce": lambda x: x.scatter_reduce(0, torch.zeros(2, 4, dtype=torch.long), x, reduce="amax"),
    "lists of values": lambda x: torch.cat([x, x.flip([0, 1])], dim=-1),
    "in place": lambda x: x.clone().index_put_((torch.tensor([0]),), torch.tensor(1.0), accumulate=True),
    "quotes": lambda x: torch.div(x, 2, rounding_mode="floor"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_survive(name: str) -> None:
    with torch.no_grad(), _model().trace(_x()) as tracer:
        kept = ARGUMENTS[name](_model().up.output).save()
    program = tracer.program.program
    read = verify(parse_program(str(program), program.book))
    assert read.graph.nodes and str(read).partition("# inputs")[2] == str(program).partition("# inputs")[2]
    values = [
        _x() if b.kind == "input" else _model().up.weight if b.kind == "weight" else None
        for b in read.bindings.values()
    ]
    constants = iter(tracer.program.constants)
    values = [
        next(constants) if b.kind == "constant" else v for b, v in zip(read.bindings.values(), values, strict=True)
    ]
    with torch.no_grad():
        found = eager(read)(*values)[0]
    assert found.dtype == kept.dtype and torch.equal(found.nan_to_num(7), kept.nan_to_num(7))
    assert torch.equal(found.signbit(), kept.signbit())


def test_every_function_of_torch_has_a_name_that_finds_it() -> None:
    functions = {f for group in get_overridable_functions().values() for f in group}
    named = [f for f in functions if not getattr(f, "__name__", "").startswith("_")]
    lost = [function_name(f) for f in named if function_name(find_function(function_name(f))) != function_name(f)]
    assert len(named) > 900 and lost == []


# -------------------------------------------------------------------------------------------------------- safe


@pytest.mark.parametrize(
    "line",
    [
        "y = eval('1')",
        "y = os.system('touch x')",
        "y = torch.load('x')",
        "y = torch.save(x, 'x')",
        "y = torch.hub.load('a', 'b')",
        "y = torch.Tensor.__reduce_ex__(x, 2)",
        "y = torch.nn.functional.__builtins__(x)",
        "y = torch.serialization.load('x')",
        "y = torch.ops.load_library('x')",
        "y = torch.classes.load_library('x')",
        "y = getattr(x, '__class__')",
        "y = operator.attrgetter('__class__')(x)",
        "y = operator.methodcaller('numpy')(x)",
        "y = torch.Tensor.apply_(x, print)",
        "y = mutate(x, (), 'torch.load', ('%self',), {})",
        "y = mutate(x, (), 'eval', ('%self',), {})",
        "y = torch.add(x, __import__('os'))",
        "y = torch.add(x, (lambda: 1)())",
        "y = torch.add(x, *x)",
        "y = torch.add(x, **{'other': x})",
        "y = torch.add(x, x.shape)",
        "y = torch.add(x, f'{x}')",
        "y = torch.add(x, [a for a in x])",
        "y = torch.add(x, torch.nn)",
        "y = z = torch.add(x, x)",
        "y: int = torch.add(x, x)",
        "import os",
        "del x",
        "torch.add(x, x)",
        "y = torch.add(x, unknown)",
    ],
)
def test_what_is_not_a_program_is_refused(line: str) -> None:
    with pytest.raises(TextError):
        verify(parse_program(_small(line)))


def _small(line: str) -> str:
    header = '# program Net\n# made by: capture\n# inputs: [0, [{"type": "f32[2]"}]]\n# outputs: [0, [null]]\n'
    return f"{header}def program(\n    x: 'input 0',    # f32[2]\n):\n    {line}    # f32[2]\n    return (x,)\n"


def test_the_small_program_is_one() -> None:
    assert verify(parse_program(_small("y = torch.add(x, x)"))).name == "Net"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: a program is one function definition"),
        ("x = 1", "line 1: a program is one function definition"),
        ("def program(:", "line 1: invalid syntax"),
        (_small("import os"), "line 8: not 'name = function(...)': 'import os'"),
        (_small("y = torch.add(x, unknown)"), "line 8: 'unknown' is used before it is made"),
        (_small("x = torch.add(x, x)"), "line 8: the name 'x' is taken or reserved"),
        (_small("y = torch.add(x, f'{x}')"), "line 8: not an argument: \"f'{x}'\""),
        (
            _small("y = torch.load(x)"),
            "line 8: no function 'torch.load'; a program calls aten.*, torch.*, torch.Tensor.* and operator.getitem",
        ),
        (_small("y = aten.add(x, x)"), "line 8: 'aten.add' is not one overload; write for example aten.add.Tensor"),
        (
            _small("y = aten.nothing.default(x)"),
            f"line 8: no operator 'aten.nothing.default' in torch {torch.__version__}",
        ),
        (
            _small("y = torch.add(x, x)").replace("'input 0'", "'input a'"),
            "line 6: not a binding: 'input a'; write 'weight NAME' or 'input NUMBER'",
        ),
        (
            _small("y = torch.add(x, x)    # what"),
            "line 8: cannot read the note 'what    # f32[2]'; write for example '# f32[batch, 64]'",
        ),
        (_small("y = torch.add(x, x)").replace("# sizes", ""), ""),
    ],
)
def test_errors_name_the_line(text: str, message: str) -> None:
    if not message:
        assert parse_program(text).name == "Net"
        return
    with pytest.raises(TextError) as caught:
        parse_program(text)
    assert str(caught.value) == message


_PIECES = [
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    "'",
    '"',
    "#",
    ":",
    "=",
    "\n",
    " ",
    "0",
    "-1",
    "x",
    "f32",
    "None",
    "**",
    "/",
    "\\",
    "\t",
    "é",
    "\0",
]


def _mutated(text: str, rng: random.Random) -> str:
    """The text with something cut, doubled, swapped or put in."""
    first, second = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    second = min(second, first + rng.choice([1, 3, 40]))
    return rng.choice(
        [
            text[:first],
            text[:first] + text[second:],
            text[:second] + text[first:],
            text[:first] + rng.choice(_PIECES) + text[first:],
            text[:first] + rng.choice(_PIECES) + text[second:],
        ]
    )


def _survives(text: str) -> str:
    """What else than a program or a TextError comes of a text."""
    try:
        parse_program(text)
    except TextError:
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:100]
    return ""


def test_damaged_text_is_a_text_error() -> None:
    """Cut, doubled and overwritten anywhere: a program or a TextError, nothing else, and nothing is executed."""
    text, rng = str(_edited(_transformer(), token_ids(2, 5))[1]), random.Random(0)
    wrong = [found for _ in range(150) if (found := _survives(_mutated(text, rng)))]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_a_note_with_fewer_parts_than_members() -> None:
    note = "(f32[2], f32[2])  {parts=[{'stride': '1'}]}"
    text = _small("y = torch.unbind(x)").replace("unbind(x)    # f32[2]", f"unbind(x)    # {note}")
    with pytest.raises(TextError, match="the note of y has 2 members, and says this of them"):
        parse_program(text)


def test_damaged_headers_are_text_errors() -> None:
    text, rng = (
        _small("y = torch.add(x, x)").replace("# made", "# sizes: batch >= 1\n# where: Eq(batch, 2)\n# made"),
        random.Random(1),
    )
    wrong = [found for _ in range(600) if (found := _survives(_mutated(text, rng)))]
    assert not wrong, "\n".join(sorted(set(wrong)))


NOTED = """
    x: 'input 0'  # f32[batch, 4]
    made = torch.einsum({!r}, x)  # f32[batch, 4]  {{{}}}
    return (made,)
"""


@pytest.mark.parametrize("argument", ["ij -> ij", "# ij", "it's # ij", 'a "word" # more', "\\' # \\"])
def test_a_note_begins_outside_of_strings(argument: str) -> None:
    node = program_of(NOTED.format(argument, "line='a.py:4', call=12")).nodes["made"]
    assert node.args[0] == argument and (origin_of(node).line, origin_of(node).call) == ("a.py:4", 12)


@pytest.mark.parametrize("line", ["", "it's", 'a "word"', "back\\slash", "{a, b}, c=4"])
def test_a_note_keeps_any_text(line: str) -> None:
    program = program_of(NOTED.format("ij -> ij", f"line={line!r}, call=12, time=0"))
    assert origin_of(program.nodes["made"]).line == line
    assert parse_program(program.text).text == program.text


@pytest.mark.parametrize("extras", ["call=01", "call=f()", "call=1 2"])
def test_a_note_of_something_else(extras: str) -> None:
    with pytest.raises(TextError):
        program_of(NOTED.format("ij -> ij", extras))
