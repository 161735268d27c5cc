"""What cannot be captured says so at the model's own line; what can is the module itself, for other sizes as well."""

import copy
import inspect
import io
import logging
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

import fxsight.progress
from fxsight.capture import capture
from fxsight.captures import Captures
from fxsight.errors import CaptureError
from fxsight.model import Model
from fxsight.progress import Progress, stderr_console
from fxsight.tracer import Tracer
from fxsight.tree import flatten

SLOW = ("flex attention",)  # imports all of Inductor


def params(cases: Mapping[str, Any]) -> list[Any]:
    return [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in cases.items()]


def traced(model: Model, *args: Any, **kwargs: Any) -> tuple[Any, Tracer]:
    with model.trace(*args, backend="eager", **kwargs) as trace:
        output = model.output
        trace.save(output)
    return output, trace


def error_of(net: nn.Module, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        traced(Model(net, cache=False), *args, **kwargs)
    return str(caught.value)


def place(cls: type, code: str) -> str:
    """``file:line: code`` of a line in a class of this file."""
    lines, first = inspect.getsourcelines(cls)
    number = next(i for i, line in enumerate(lines) if line.strip() == code)
    return f"{__file__}:{first + number}: {code}"


# ------------------------------------------------------------------------------------------- what cannot be captured


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        big = x.abs().sum().item() > 3
        return x * 2 if big else x


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 1:
            x = x / 2
        return x


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all(), "not finite"
        return x


@torch.library.custom_op("fxsight_tests::without_fake", mutates_args=())
def without_fake(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("fxsight_tests::with_fake", mutates_args=())
def with_fake(x: Tensor) -> Tensor:
    return x * 2


@with_fake.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


LIBRARY: Any = torch.library.Library("fxsight_tests", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("raw(Tensor x) -> Tensor")
LIBRARY.impl("raw", lambda x: x * 2, "CPU")


class WithoutFake(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return without_fake(x) + 1


class WithFake(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return with_fake(x) + 1


class Raw(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.ops.fxsight_tests.raw(x) + 1


class Narrow(nn.Module):
    """Takes three features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Any) -> Any:
        return self.linear(x) * 2


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Narrow()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + 1


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 7:
            raise ValueError("seven dimensions, please")
        return x


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.numpy()))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Any:
        return self.table(ids)


class Autocast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.transpose(-1, -2)


class Cond(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Vmap(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.vmap(lambda row: row.sum())(x)


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.transpose(-1, -2)


class Grad(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.func.grad(lambda row: (row**2).sum())(x)


class Jvp(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.func.jvp(torch.sin, (x,), (x,))


class Attention(nn.Module):
    """An operator that Dynamo looks into, and cannot."""

    def forward(self, x: Tensor) -> Any:
        from torch.nn.attention.flex_attention import flex_attention

        query = x[:, None, None]
        return flex_attention(query, query, query)


class Grows(nn.Module):
    """Puts a longer tensor in the place of a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x[0]])
        return x * 2


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


NUMBERS = "its control flow or a size depends on the numbers in a tensor"
WHERE = "use torch.where in the model, or trace a submodule that has no such branch"
FAKE = "register one with torch.library.register_fake"
PLAIN = "write it with plain operators, or trace a submodule without it"
FIRST = "run the module itself on these inputs first; if that works, see docs/capture.md"
X = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 0.0, -3.0, 1.5]])


class Failure(NamedTuple):
    net: nn.Module
    args: tuple[Any, ...]
    cause: str
    at: str
    fix: str


FAILURES = {
    "branch": Failure(Branch(), (X,), NUMBERS, place(Branch, "if x.sum() > 0:"), WHERE),
    "item": Failure(Item(), (X,), NUMBERS, place(Item, "return x * 2 if big else x"), WHERE),
    "while": Failure(Loop(), (X,), NUMBERS, place(Loop, "while x.norm() > 1:"), WHERE),
    "assert": Failure(Checked(), (X,), NUMBERS, place(Checked, 'assert torch.isfinite(x).all(), "not finite"'), WHERE),
    "custom operator": Failure(
        WithoutFake(),
        (X,),
        "the operator fxsight_tests::without_fake has no shape rule",
        place(WithoutFake, "return without_fake(x) + 1"),
        FAKE,
    ),
    "operator of a library": Failure(
        Raw(),
        (X,),
        "the operator fxsight_tests.raw.default has no shape rule",
        place(Raw, "return torch.ops.fxsight_tests.raw(x) + 1"),
        FAKE,
    ),
    "shapes": Failure(
        Nested(),
        (X,),
        "RuntimeError: a and b must have same reduction dim, but got [2, 4] X [3, 4].",
        place(Narrow, "return self.linear(x) * 2"),
        FIRST,
    ),
    "an error of its own": Failure(
        Refusing(),
        (X,),
        "ValueError: seven dimensions, please",
        place(Refusing, 'raise ValueError("seven dimensions, please")'),
        FIRST,
    ),
    "numpy": Failure(
        Numpy(),
        (X,),
        "it leaves torch for numpy, which needs the numbers in a tensor",
        place(Numpy, "return torch.from_numpy(np.tanh(x.numpy()))"),
        "write it in torch, or make it an operator with torch.library.custom_op and register_fake",
    ),
    "dtype": Failure(
        Tokens(),
        (X,),
        "RuntimeError: Expected tensor for argument #1 'indices' to have one of the following scalar types: "
        "Long, Int; but got torch.float32 instead",
        place(Tokens, "return self.table(ids)"),
        FIRST,
    ),
    "a string": Failure(
        Narrow(),
        ("text",),
        "TypeError: linear(): argument 'input' (position 1) must be Tensor, not str",
        place(Narrow, "return self.linear(x) * 2"),
        FIRST,
    ),
    "an array": Failure(
        Narrow(),
        (np.ones((2, 3)),),
        "TypeError: linear(): argument 'input' (position 1) must be Tensor, not numpy.ndarray",
        place(Narrow, "return self.linear(x) * 2"),
        FIRST,
    ),
    "a missing argument": Failure(
        Pair(), (X,), "TypeError: Pair.forward() missing 1 required positional argument: 'y'", "", FIRST
    ),
    "autocast": Failure(
        Autocast(),
        (X,),
        "it switches autocast on, whose casts a program does not hold",
        place(Autocast, "return x @ x.transpose(-1, -2)"),
        "cast explicitly in the model, or trace without autocast",
    ),
    "vmap": Failure(
        Vmap(),
        (X,),
        "it calls torch.vmap, which takes functions",
        place(Vmap, "return torch.vmap(lambda row: row.sum())(x)"),
        PLAIN,
    ),
    "jvp": Failure(
        Jvp(),
        (X,),
        "it calls torch.func.jvp, which takes functions",
        place(Jvp, "return torch.func.jvp(torch.sin, (x,), (x,))"),
        PLAIN,
    ),
    "grad": Failure(
        Grad(),
        (X,),
        "it calls torch.func.grad or the like, which takes functions",
        place(Grad, "return torch.func.grad(lambda row: (row**2).sum())(x)"),
        PLAIN,
    ),
    "cond": Failure(
        Cond(),
        (X,),
        "it calls torch.cond or another operator that takes functions",
        place(Cond, "return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))"),
        "use torch.where in the model, or trace a submodule without it",
    ),
    "flex attention": Failure(
        Attention(),
        (X,),
        "it calls torch.cond or another operator that takes functions",
        place(Attention, "return flex_attention(query, query, query)"),
        "use torch.where in the model, or trace a submodule without it",
    ),
    "a buffer that grows": Failure(
        Grows(),
        (X,),
        "it puts a tensor of another shape, dtype or device in the place of the buffer seen",
        place(Grows, "self.seen = torch.cat([self.seen, x[0]])"),
        "make the buffer like that from the start, or keep the tensor in an attribute",
    ),
    "operator on meta": Failure(
        Raw(),
        (X.to("meta"),),
        "the operator fxsight_tests.raw.default has no shape rule",
        place(Raw, "return torch.ops.fxsight_tests.raw(x) + 1"),
        FAKE,
    ),
    "an error without a word": Failure(
        Bare(), (X,), "NotImplementedError", place(Bare, "raise NotImplementedError"), FIRST
    ),
    "one row in training": Failure(
        nn.BatchNorm1d(4).train(),
        (X[:1],),
        "ValueError: Expected more than 1 value per channel when training, got input size torch.Size([1, 4])",
        "",
        FIRST,
    ),
}


@pytest.mark.parametrize("failure", params(FAILURES))
def test_the_whole_message(failure: Failure, capfd: pytest.CaptureFixture[str]) -> None:
    at = f"\n  at {failure.at}" if failure.at else ""
    expected = f"{type(failure.net).__name__} cannot be captured as one graph: {failure.cause}{at}\n  {failure.fix}"
    assert error_of(failure.net, *failure.args) == expected
    assert capfd.readouterr() == ("", ""), "torch's own reports stay away"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_by_jit() -> None:
    compiled = torch.jit.script(nn.Linear(4, 4))
    cause = "is compiled by torch.jit, which hides its operations\n  use the module it was compiled from"
    start = "cannot be captured as one graph:"
    assert error_of(nn.Sequential(compiled), X) == f"Sequential {start} 0 {cause}"
    assert error_of(compiled, X) == f"RecursiveScriptModule {start} it {cause}"


def test_the_cause_is_kept() -> None:
    with pytest.raises(CaptureError) as caught:
        traced(Model(Refusing(), cache=False), X)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_failure_leaves_nothing_behind() -> None:
    net = Branch()
    before = copy.deepcopy(vars(net))
    model = Model(net, cache=False)
    with pytest.raises(CaptureError):
        traced(model, X)
    assert vars(net) == before
    with pytest.raises(CaptureError):
        traced(model, X)
    narrow = Model(Narrow(), cache=False)
    with pytest.raises(CaptureError):
        traced(narrow, X)
    assert torch.equal(traced(narrow, X[:, :3])[0], narrow._module(X[:, :3]))


# ---------------------------------------------------------------------------------------------- what can be captured


class Point(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Result:
    loss: Tensor
    extra: tuple[Tensor, None]


class Structured(nn.Module):
    def forward(self, batch: dict[str, Any], scale: float | None = None) -> dict[str, Any]:
        total = batch["a"] + batch["b"]["c"][0]
        return {"y": total, "none": scale, "pair": (total * 2, [total + 1])}


class Points(nn.Module):
    def forward(self, point: Point, extra: Tensor | None = None) -> tuple[Point, Tensor | None]:
        return Point(point.a * 2, point.b + point.a), None if extra is None else point.a - extra


class Results(nn.Module):
    def forward(self, x: Tensor) -> Result:
        return Result(x.sum(), (x * 2, None))


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        hidden = self.linear(x)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(x, hidden))


class ReturnsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.same(x), self.same(x) + 1


class ChangesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        x[:, 0] = 0
        return x * 2


class ChangesValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        y[:, 0].mul_(3)
        return y.relu_()


class Counts(nn.Module):
    """Adds to a buffer in place."""

    n: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return x * self.n


class Replaces(nn.Module):
    """Puts another tensor in the place of a buffer of a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def forward(self, x: Tensor) -> Tensor:
        self.counts.n = self.counts.n + 2
        return x * self.counts.n


class Swaps(nn.Module):
    """Two buffers change places, a third gets a view of its old self; the old one is returned."""

    a: Tensor
    b: Tensor
    c: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c"):
            self.register_buffer(name, torch.arange(4.0).reshape(2, 2) + ord(name))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        old = self.a
        self.a, self.b, self.c = self.b, self.a, self.c.t()
        return old, x + self.a.sum()


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(4, 3, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        hidden, last = self.inner(x)
        return self.head(hidden), last


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor) -> Any:
        state = (torch.zeros_like(x), torch.zeros_like(x))
        for _ in range(3):
            state = self.cell(x, state)
        return state


class Counting(nn.Module):
    """No tensor goes in."""

    def forward(self, n: int) -> Tensor:
        return torch.arange(n) * 2


class Thrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.cell(x).tanh()
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.table(ids))


class Regularised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.dropout(self.norm(self.linear(x)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.gelu(self.up(x)))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.adaptive_avg_pool2d(self.conv(x).relu(), 1).flatten(1))


class Held(nn.Module):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.many = torch.full((4,), 2.0), [torch.ones(4)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one + self.many[0] + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Size(nn.Module):
    """A size as a number, and as a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[0] + torch.tensor(x.shape[1])


class NoGrad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return y + x


class Times(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y + 1


def randn(*sizes: int) -> Tensor:
    return torch.randn(sizes)


def ids(*sizes: int) -> Tensor:
    return torch.randint(0, 5, sizes)


Inputs = Callable[..., tuple[Any, ...]]


class Success(NamedTuple):
    """A module, its inputs as a function of sizes, the sizes to try, and how many captures these take."""

    make: Callable[[], nn.Module]
    inputs: Inputs
    sizes: Sequence[tuple[int, ...]]
    made: int = 1


def matrix(*sizes: int) -> tuple[Tensor]:
    return (randn(*sizes),)


ROWS = [(2, 4), (3, 4), (1, 4)]
SUCCESSES = {
    "nested dicts": Success(
        Structured, lambda b: ({"a": randn(b, 4), "b": {"c": (randn(b, 4), None)}},), [(2,), (3,), (1,)]
    ),
    "named tuples": Success(Points, lambda b: (Point(randn(b, 4), randn(b, 4)), randn(b, 4)), [(2,), (1,), (5,)]),
    "None": Success(Points, lambda b: (Point(randn(b, 4), randn(b, 4)), None), [(2,), (3,)]),
    "dataclass out": Success(Results, matrix, ROWS),
    "ModelOutput out": Success(Outputs, matrix, [(2, 3, 4), (1, 1, 4), (4, 1, 4), (1, 5, 4)]),
    "returns its input": Success(ReturnsInput, matrix, ROWS),
    "changes its input": Success(ChangesInput, matrix, ROWS),
    "changes values": Success(ChangesValues, matrix, ROWS),
    "adds to a buffer": Success(Counts, matrix, ROWS),
    "replaces a buffer": Success(Replaces, matrix, ROWS),
    "buffers change places": Success(Swaps, matrix, ROWS),
    # torch's recurrent operators ask for the number of steps.
    "LSTM": Success(lambda: nn.LSTM(4, 3), matrix, [(2, 3, 4), (1, 1, 4), (2, 3, 4), (5, 4)], made=3),
    "GRU": Success(lambda: nn.GRU(4, 3, batch_first=True), matrix, [(2, 3, 4), (3, 2, 4)], made=2),
    "RNN": Success(lambda: nn.RNN(4, 3, nonlinearity="relu"), matrix, [(2, 3, 4), (3, 2, 4)], made=2),
    "LSTM in a model": Success(lambda: Recurrent(nn.LSTM), matrix, [(2, 3, 4), (3, 2, 4)], made=2),
    "GRU in a model": Success(lambda: Recurrent(nn.GRU), matrix, [(2, 3, 4), (3, 2, 4)], made=2),
    "LSTM in training": Success(lambda: nn.LSTM(4, 3, 2, dropout=0.5).train(), matrix, [(2, 3, 4), (2, 3, 4)]),
    "LSTM cells": Success(Cells, matrix, ROWS, made=2),
    "numbers only": Success(Counting, lambda n: (n,), [(3,), (5,), (3,)], made=2),
    "called several times": Success(Thrice, matrix, ROWS),
    "tied weights": Success(Tied, lambda b, n: (ids(b, n),), [(2, 3), (1, 1), (4, 2)]),
    "training": Success(lambda: Regularised().train(), matrix, [(4, 4), (3, 4)]),
    "evaluation": Success(lambda: Regularised().eval(), matrix, ROWS),
    "frozen": Success(lambda: Mlp().requires_grad_(False), matrix, ROWS),
    "half frozen": Success(lambda: frozen_part(Mlp()), matrix, ROWS),
    "one row first": Success(Mlp, matrix, [(1, 4), (3, 4), (1, 4)]),
    "length one first": Success(Mlp, matrix, [(1, 1, 4), (3, 1, 4), (1, 7, 4)]),
    "length two first": Success(Mlp, matrix, [(2, 2, 4), (3, 1, 4), (1, 7, 4)]),
    "no rows": Success(Mlp, matrix, [(2, 4), (0, 4)]),
    "one dimension": Success(lambda: nn.Softmax(dim=0), matrix, [(5,), (1,), (2,)]),
    "no dimension": Success(Times, lambda: (randn(), randn()), [(), ()]),
    "some and no dimension": Success(Times, lambda *s: (randn(*s), randn()), [(2, 3), (1, 1), (4, 1)]),
    "two inputs": Success(Pair, lambda b, n, m: (randn(b, n, 4), randn(b, m, 4)), [(2, 3, 5), (1, 3, 5), (3, 4, 4)]),
    "images": Success(Image, matrix, [(2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 9, 12)]),
    "tensors held": Success(Held, matrix, ROWS),
    "random numbers": Success(Random, matrix, ROWS),
    "sizes": Success(Size, matrix, [(2, 3), (4, 5), (1, 1)]),
    "without gradients": Success(NoGrad, matrix, ROWS),
    "operator with a shape rule": Success(WithFake, matrix, ROWS),
    "double": Success(lambda: Mlp().double(), lambda *s: (randn(*s).double(),), ROWS),
}


def frozen_part(net: Mlp) -> Mlp:
    net.up.requires_grad_(False)
    return net


def same(one: Any, other: Any) -> bool:
    """Whether two structures are equal to the bit, their tensors in dtype and gradient as well."""
    left, shape = flatten(one)
    right, other_shape = flatten(other)
    return shape == other_shape and all(
        (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad) and torch.equal(a, b)
        if isinstance(a, Tensor)
        else a == b
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("case", params(SUCCESSES))
def test_the_program_is_the_module(case: Success) -> None:
    torch.manual_seed(0)
    net = case.make()
    twin = copy.deepcopy(net)
    model = Model(net, cache=False)
    for number, sizes in enumerate(case.sizes):
        args = case.inputs(*sizes)
        given = copy.deepcopy(args)
        torch.manual_seed(number)
        expected = twin(*args)
        torch.manual_seed(number)
        output, _ = traced(model, *given)
        assert same(output, expected), sizes
        assert same(given, args), f"{sizes}: what it does to its inputs"
        assert same(dict(net.named_buffers()), dict(twin.named_buffers())), f"{sizes}: what it does to its buffers"
    assert model._captures.made == case.made


def test_the_finished_program_takes_other_sizes() -> None:
    net = Mlp()
    trace = traced(Model(net, cache=False), randn(2, 3, 4))[1]
    for sizes in ((1, 1, 4), (5, 2, 4), (2, 3, 4)):
        x = randn(*sizes)
        assert same(trace.program(x), (net(x),))


def test_gradients_are_the_module_s() -> None:
    net, x = Mlp(), randn(3, 4)
    (expected,) = torch.autograd.grad(net(x).sum(), [net.up.weight])
    output, _ = traced(Model(net, cache=False), x)
    (found,) = torch.autograd.grad(output.sum(), [net.up.weight])
    assert torch.equal(found, expected)


def test_each_call_has_its_values() -> None:
    net, x = Thrice(), randn(2, 4)
    model = Model(net, cache=False)
    with model.trace(x, backend="eager"):
        values = [model.cell.call(n).output.save() for n in range(3)]
    hidden = x
    for value in values:
        expected = net.cell(hidden)
        assert torch.equal(value, expected)
        hidden = expected.tanh()


def test_a_module_without_memory() -> None:
    with torch.device("meta"):
        net = Mlp()
    output, trace = traced(Model(net, cache=False), torch.empty(2, 4, device="meta"))
    assert (output.device.type, output.shape) == ("meta", (2, 4))
    assert "aten.gelu.default" in str(trace.program)


def test_numbers_and_strings_are_part_of_the_signature() -> None:
    class Mode(nn.Module):
        def forward(self, x: Tensor, n: float, mode: str = "times") -> Tensor:
            return x * n if mode == "times" else x - n

    net, x = Mode(), randn(2, 3)
    model = Model(net, cache=False)
    for made, args in enumerate([(x, 2), (x, 3), (x, 3.0), (x, 2, "minus")], 1):
        for _ in range(2):
            assert same(traced(model, *args)[0], net(*args))
        assert model._captures.made == made


def test_print_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("x is", x)
            return x * 2

    model = Model(Prints(), cache=False)
    for _ in range(2):
        assert torch.equal(traced(model, X)[0], X * 2)
    assert capsys.readouterr().out == "x is FakeTensor(..., size=(s28, s40))\n", "once, without numbers"


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.last = 0, list[int](), None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.last = x  # type: ignore[assignment]
        self.new = x
        return x * self.calls


def test_what_a_forward_keeps_in_its_module_is_left_as_it_was() -> None:
    net = Remembers()
    seen = net.seen
    model = Model(net, cache=False)
    assert torch.equal(traced(model, X)[0], X)
    assert torch.equal(traced(model, X)[0], X), "as from the state at its capture"
    assert (net.calls, net.last, seen) == (0, None, [])
    assert net.seen is seen
    assert not hasattr(net, "new")

    net(X)
    assert torch.equal(traced(model, X)[0], X * 2), "another state is another signature"


def test_what_torch_computes_sizes_with_is_no_part_of_the_model() -> None:
    program, _ = Captures(nn.LSTM(4, 3), None).find((randn(2, 3, 4),), {})
    files = {call.body[0] for call in program.book.calls if call.body}
    assert not [file for file in files if "sympy" in file or "mpmath" in file]


def test_the_weights_of_a_recurrent_layer_stay_where_they_are() -> None:
    net = nn.LSTM(4, 3)
    weights = net._flat_weights
    traced(Model(net, cache=False), randn(2, 3, 4))
    assert net._flat_weights is weights
    assert all(a is b for a, b in zip(weights, net.parameters(), strict=True))


class Keeps(nn.Module):
    """Leaves something in all sorts of containers, and a new submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Any] = {"rows": [1], "names": {"a"}}
        self.ordered = OrderedDict[str, int](a=1, b=2)
        self.last, self.pair = deque([1, 2], maxlen=2), ([1], 2)

    def forward(self, x: Tensor) -> Tensor:
        self.table["rows"].append(x)
        self.table["names"].add("b")
        self.table["new"] = x
        self.ordered.move_to_end("a")
        self.last.append(3)
        self.pair[0].clear()
        self.late = nn.Identity()
        del self.training
        self.training = False
        return x * 2


def test_what_a_forward_puts_into_containers_is_taken_out_again() -> None:
    net = Keeps()

    def held() -> tuple[Any, ...]:
        return net.table, net.table["rows"], net.ordered, net.last, net.pair

    were = held()
    before = copy.deepcopy({k: v for k, v in vars(net).items() if k[:1] != "_"})
    assert torch.equal(traced(Model(net, cache=False), X)[0], X * 2)
    assert {k: v for k, v in vars(net).items() if k[:1] != "_"} == before
    assert list(net.ordered) == ["a", "b"]
    assert list(vars(net)) == list(vars(Keeps())), "in the order of the constructor"
    assert all(a is b for a, b in zip(held(), were, strict=True))
    assert not list(net.children())


def test_torch_s_reports_stay_away_and_others_come_through() -> None:
    class Warns(Branch):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("mine", UserWarning, stacklevel=1)
            return super().forward(x)

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = list(logger.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error_of(Warns(), X)
        error_of(Cond(), X)
        traced(Model(nn.LSTM(4, 3), cache=False), randn(2, 3, 4))
    assert {str(warning.message) for warning in caught} == {"mine"}
    assert logger.filters == before


# ---------------------------------------------------------------------------------------------------- progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen(io.StringIO):
    """A terminal, or not."""

    def __init__(self, tty: bool = True) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def terminal(screen: Screen) -> Console:
    return Console(
        file=screen, force_terminal=True, force_jupyter=False, width=60, color_system=None, legacy_windows=False
    )


def test_nothing_is_shown_within_a_second() -> None:
    clock, screen = Clock(), Screen()
    with Progress("capturing Net", clock, lambda: terminal(screen)) as progress:
        for clock.now in (0.1, 0.5, 0.99):
            progress()
    assert screen.getvalue() == ""


def test_after_a_second_a_line_is_shown_and_taken_away() -> None:
    clock, screen = Clock(), Screen()
    with Progress("capturing Net", clock, lambda: terminal(screen)) as progress:
        for clock.now in (0.5, 1.1, 1.15, 2.2):
            progress()
        shown = screen.getvalue()
    assert shown.count("capturing Net, 1 s") >= 1
    assert shown.count("capturing Net, 2 s") == 1
    assert "\x1b[2K" in screen.getvalue()[len(shown) :], "the line is erased"


def test_an_error_takes_the_line_away_as_well() -> None:
    clock, screen = Clock(), Screen()
    with pytest.raises(CaptureError), Progress("capturing Net", clock, lambda: terminal(screen)) as progress:
        clock.now = 1.5
        progress()
        raise CaptureError
    assert screen.getvalue().endswith("\x1b[2K")


def test_between_two_drawings_a_tick_does_nothing() -> None:
    clock, screen = Clock(), Screen()
    with Progress("capturing Net", clock, lambda: terminal(screen)) as progress:
        clock.now = 1.5
        progress()
        before = screen.getvalue()
        clock.now = 1.55
        progress()
        assert screen.getvalue() == before


def test_where_nobody_looks_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    clock, asked = Clock(), list[bool]()
    screen = Screen(tty=False)
    monkeypatch.setattr("sys.stderr", screen)

    def console() -> Console | None:
        asked.append(True)
        return stderr_console()

    with Progress("capturing Net", clock, console) as progress:
        for clock.now in (1.5, 2.5, 3.5):
            progress()
    assert (screen.getvalue(), asked) == ("", [True])


def test_what_draws_is_not_part_of_the_model() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def tick() -> None:
        Text.assemble("a", "b").truncate(1)

    plain, watched = capture(net, (torch.ones(2, 2),), {}), capture(net, (torch.ones(2, 2),), {}, None, tick)
    assert watched.book.names == plain.book.names
    assert watched.text == plain.text


@pytest.mark.parametrize(
    ("tty", "term", "shown"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_a_terminal_can_redraw(monkeypatch: pytest.MonkeyPatch, tty: bool, term: str, shown: bool) -> None:
    monkeypatch.setattr("sys.stderr", Screen(tty))
    monkeypatch.setenv("TERM", term)
    assert (stderr_console() is not None) == shown


def test_a_capture_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(fxsight.progress, "AFTER", 0.0)
    monkeypatch.setattr(fxsight.progress, "stderr_console", lambda: terminal(screen))
    Captures(Mlp(), None).find((randn(2, 4),), {})
    assert "capturing Mlp, 0 s" in screen.getvalue()
