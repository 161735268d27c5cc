"""Programs of reads, operations and edits as data; `run_with_hooks` runs one in one forward, as the oracle does.

`describe` prints one as its user would write it. Nothing of fxsight is used here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Port, assigned, intercepted, locations


@dataclass(frozen=True)
class Place:
    """A location that holds f32[batch, length, width]."""

    path: str
    port: Port
    width: int


@dataclass(frozen=True)
class Const:
    """A tensor of the user's: normal numbers from a seed."""

    seed: int
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        """f32 of the shape, the same each time."""
        return constant(self.seed, self.shape)


Number: TypeAlias = float
Value: TypeAlias = str | Const | Number | None  # a variable's name, a tensor, a number, or nothing


@dataclass(frozen=True)
class ReadStep:
    """var = model.<path>.<port>"""

    var: str
    path: str
    port: Port


@dataclass(frozen=True)
class OpStep:
    """var = OPS[fn_name].fn(*arg_vars), with the constant as last argument if there is one."""

    var: str
    fn_name: str
    arg_vars: tuple[str, ...]
    const: Const | Number | None = None


@dataclass(frozen=True)
class AssignStep:
    """model.<path>.<port> = var"""

    path: str
    port: Port
    var: str


@dataclass(frozen=True)
class InplaceStep:
    """INPLACE[how].fn(model.<path>.<port>, value), without the value if it is None."""

    path: str
    port: Port
    how: str
    value: Value = None


@dataclass(frozen=True)
class SaveStep:
    """var.save()"""

    var: str


Step: TypeAlias = ReadStep | OpStep | AssignStep | InplaceStep | SaveStep
Program: TypeAlias = tuple[Step, ...]


def constant(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers, f32 of the shape, the same each time. A matrix keeps the size of what it multiplies."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers / shape[0] ** 0.5 if len(shape) == 2 else numbers


@dataclass(frozen=True)
class Op:
    """An operation on values: what it prints as, and `fn`, the function of that very text.

    text: {0} and {1} are variables, {c} is the constant, {v} the result.  arity: how many variables it takes.
    """

    text: str
    arity: int
    const: Literal["none", "number", "row", "matrix"] = "none"

    @cached_property
    def fn(self) -> Callable[..., Tensor]:
        """fn(*variables), or fn(*variables, constant): a new value, or a view; no argument is changed."""
        names = ["a", "b"][: self.arity] + ["c"] * (self.const != "none")
        return _function(names, f"v = {self.text.format('a', 'b', c='c', v='v')}; return v")


@dataclass(frozen=True)
class Inplace:
    """An edit in place: what it prints as, and `fn`, the function of that very text.

    text: {h} is the location, {c} the value.  values: what the value may be.
    """

    text: str
    values: tuple[Literal["none", "number", "row", "var"], ...]

    @cached_property
    def fn(self) -> Callable[..., None]:
        """fn(tensor), or fn(tensor, value): changes the tensor."""
        names = ["h"] if self.values == ("none",) else ["h", "c"]
        return _function(names, self.text.format(h="h", c="c"))


def _function(names: Sequence[str], body: str) -> Callable[..., Any]:
    """The function of some arguments that one line of Python is the body of."""
    scope: dict[str, Any] = {"torch": torch, "F": F}
    exec(f"def fn({', '.join(names)}): {body}", scope)
    fn: Callable[..., Any] = scope["fn"]
    return fn


# A variable is f32[batch, length, width], and all that one step uses have one width. A row is f32[width], a
# matrix f32[width, width]. Here they are real tensors; with fxsight whatever `model.….output` gives.
OPS: Mapping[str, Op] = MappingProxyType(
    {
        "constant": Op("{c}", 0, "row"),
        "add": Op("{0} + {1}", 2),
        "mix": Op("{0} * {c} + {1}", 2, "number"),
        "scale": Op("{0} * {c}", 1, "number"),
        "shift": Op("{0} + {c}", 1, "row"),
        "gate": Op("{0} * {c}.sigmoid()", 1, "row"),
        "project": Op("{0} @ {c}", 1, "matrix"),
        "spread": Op("{c}.expand_as({0})", 1, "row"),
        "relu": Op("{0}.relu()", 1),
        "tanh": Op("torch.tanh({0})", 1),
        "next_position": Op("{0}.roll(1, 1)", 1),
        "next_column": Op("{0}.roll(1, -1)", 1),
        "other_prompt": Op("{0}.flip(0)", 1),
        "centre": Op("{0} - {0}.mean(1, keepdim=True)", 1),
        "last_everywhere": Op("{0}[:, -1:].expand_as({0})", 1),
        "normalise": Op("F.layer_norm({0}, {0}.shape[-1:])", 1),
        "choose": Op("torch.where({0} > 0, {0}, {1})", 2),
        "interleave": Op("torch.cat([{0}[..., 1::2], {0}[..., ::2]], -1)", 1),
        "attend": Op("({0} @ {1}.transpose(1, 2)).softmax(-1) @ {1}", 2),
        "edited_copy": Op("{0}.clone(); {v}[:, 0] = {c}", 1, "number"),
    }
)

INPLACE: Mapping[str, Inplace] = MappingProxyType(
    {
        "set": Inplace("{h}[:] = {c}", ("number", "row", "var")),
        "set_position": Inplace("{h}[:, 0] = {c}", ("number", "row")),
        "set_position_from": Inplace("{h}[:, -1] = {c}[:, 0]", ("var",)),
        "set_columns": Inplace("{h}[..., ::2] = {c}", ("number",)),
        "set_listed": Inplace("{h}[:, :, [0, 3]] = {c}", ("number",)),
        "set_transposed": Inplace("{h}.transpose(1, 2)[:, 0] = {c}", ("number",)),
        "set_masked": Inplace("{h}[{h} > 0] = {c}", ("number",)),
        "swap_positions": Inplace("{h}[:, [0, -1]] = {h}[:, [-1, 0]]", ("none",)),
        "augmented": Inplace("{h}[:] *= {c}", ("number", "row")),
        "mul": Inplace("{h}.mul_({c})", ("number", "row")),
        "mul_add": Inplace("{h}.mul_({c}).add_(1.0)", ("number", "row")),
        "add": Inplace("{h}.add_({c})", ("number", "row", "var")),
        "sub": Inplace("{h}.sub_({c}, alpha=0.5)", ("row", "var")),
        "copy": Inplace("{h}.copy_({c})", ("row", "var")),
        "relu": Inplace("{h}.relu_()", ("none",)),
        "clamp": Inplace("{h}.clamp_(-0.5, 0.5)", ("none",)),
        "sum_along": Inplace("{h}.cumsum_(1)", ("none",)),
        "fill_columns": Inplace("{h}.index_fill_(2, torch.tensor([1, 2]), {c})", ("number",)),
        "fill_masked": Inplace("{h}.masked_fill_({h} < 0, {c})", ("number",)),
        "view_mul": Inplace("{h}[:, 0].mul_({c})", ("number", "row")),
        "view_zero": Inplace("{h}[:1].zero_()", ("none",)),
        "view_tanh": Inplace("{h}[:, ::2].tanh_()", ("none",)),
        "view_of_view": Inplace("{h}[:, 1:].select(2, 0).add_({c})", ("number",)),
        "view_transposed": Inplace("{h}.transpose(1, 2)[..., 1:3].add_({c})", ("number",)),
        "view_head": Inplace("{h}.unflatten(-1, (2, -1))[:, :, 0].mul_({c})", ("number",)),
        "view_half": Inplace("{h}.chunk(2, -1)[0].add_({h}.chunk(2, -1)[1])", ("none",)),
    }
)


def describe(steps: Sequence[Step]) -> str:
    """The program as its user would write it. `constant` is this file's."""
    lines = [_line(step) for step in steps]
    return "\n    ".join(["with model.trace(ids):", *lines])


def _line(step: Step) -> str:
    match step:
        case ReadStep(var, path, port):
            return f"{var} = {_expression(path, port)}"
        case OpStep(var, name, arg_vars, const):
            return f"{var} = {OPS[name].text.format(*arg_vars, c=_text(const), v=var)}"
        case AssignStep(path, port, var):
            return f"{_expression(path, port)} = {var}"
        case InplaceStep(path, port, how, value):
            return INPLACE[how].text.format(h=_expression(path, port), c=_text(value))
        case SaveStep(var):
            return f"{var}.save()"


def _expression(path: str, port: Port) -> str:
    return re.sub(r"\.(\d+)\b", r"[\1]", ".".join(filter(None, ["model", path, port])))


def _text(value: Value) -> str:
    match value:
        case Const(seed, shape):
            return f"constant({seed}, {shape})"
        case _:
            return str(value)


# ------------------------------------------------------------------------------------------ running a program


def run_with_hooks(steps: Sequence[Step], net: nn.Module, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run a program in one forward, without gradients: the saved values in order, and the logits.

    ids: i64[batch, length]. What is written is computed when the forward reaches the location written to.
    LookupError: a written or saved value needs a read that the forward has not reached by then.
    """
    values = Values(steps)
    located = [step for step in steps if isinstance(step, ReadStep | AssignStep | InplaceStep)]
    with ExitStack() as stack, torch.no_grad():
        for path, port in locations(located):
            here = [step for step in located if (step.path, step.port) == (path, port)]
            stack.enter_context(intercepted(net, path, port, partial(values.visit, here)))
        logits: Tensor = net(ids)
        return [values.of(step.var) for step in steps if isinstance(step, SaveStep)], logits


class Values:
    """The variables of a program while its forward runs: reads as they are met, the rest when asked for."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._ops = {step.var: step for step in steps if isinstance(step, OpStep)}
        self._known: dict[str, Tensor] = {}

    def visit(self, here: Sequence[ReadStep | AssignStep | InplaceStep], live: Tensor) -> Tensor:
        """Do the steps of one location, in order, on its live tensor."""
        for step in here:
            match step:
                case ReadStep():
                    self._known[step.var] = live.clone()
                case AssignStep():
                    live = assigned(self.of(step.var), live)
                case InplaceStep(value=None):
                    INPLACE[step.how].fn(live)
                case InplaceStep():
                    INPLACE[step.how].fn(live, self._operand(step.value))
        return live

    def of(self, var: str) -> Tensor:
        """A variable's value, computed from the reads so far."""
        if var not in self._known:
            if var not in self._ops:
                raise LookupError(f"{var} is not read yet: this program is not causal")
            step = self._ops[var]
            consts = () if step.const is None else (self._operand(step.const),)
            self._known[var] = OPS[step.fn_name].fn(*map(self.of, step.arg_vars), *consts)
        return self._known[var]

    def _operand(self, value: Value) -> Tensor | float:
        match value:
            case str():
                return self.of(value)
            case Const():
                return value.tensor()
            case _:
                assert value is not None, "an operand is asked for where there is none"
                return value
