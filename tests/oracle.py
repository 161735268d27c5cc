"""What an intervention means, said with plain PyTorch hooks: the oracle our tests compare with.

It knows nothing of fxsight. Two parts. `run`: a model with a few edits and reads, given as functions.
Random programs: `random_program` makes one as data, `run_with_hooks` runs it in one forward, `describe`
prints it as its user would write it.

The rules both parts follow:

- A read is a snapshot, taken when the forward reaches its location, after the edits listed before it there.
- An assignment gives this location a copy of the value. Who else holds the old tensor does not notice.
- An in-place edit changes the live tensor: whoever shares its storage and runs later sees it.
- On one location edits and reads happen in the order listed; between locations the forward decides.
- A variable is a value: no edit changes it.

A path is a module's, as `get_submodule` takes it, `""` for the whole model. Of a module called several times
in one forward the path means the first call; `calls(path, n)` another.
"""

import copy
import functools
import itertools
import random
import re
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Port: TypeAlias = Literal["input", "output"]
# What happens at a location: takes the live tensor, gives the tensor the forward continues with.
Visit: TypeAlias = Callable[[Tensor], Tensor]
# Names for functions to intercept: an object or a mapping, and the key under which the function is there.
Functions: TypeAlias = Mapping[str, tuple[Any, str]]
NO_FUNCTIONS: Functions = MappingProxyType({})


# ----------------------------------------------------------------------------------------- edits as functions


@dataclass(frozen=True)
class Edit:
    """A change at one location. fn takes the live tensor; for `assign` it returns the new value."""

    path: str
    port: Port
    kind: Literal["assign", "inplace"]
    fn: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Read:
    """A copy of the value at one location."""

    path: str
    port: Port


def calls(path: str, n: int) -> str:
    """The path that means the n-th call in one forward, from 0: `cell#2` is the third, `cell` the first."""
    return f"{path}#{n}" if n else path


def run(
    net: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    steps: Sequence[Edit | Read] = (),
    functions: Functions = NO_FUNCTIONS,
) -> tuple[Any, list[Tensor]]:
    """Run a model without gradients, with edits and reads: its output, and the values of the reads as listed.

    A step is about the first tensor in the port: of an output the tensor itself or the first one in a tuple
    or dict, of an input the first among the positional, then the keyword arguments. A step whose path is a
    name in `functions` is about that function. The caller's arguments are copied: no edit reaches them.
    LookupError: a step's location was not reached, or holds no tensor.
    """
    done: dict[int, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for path, port in _locations(steps):
            here = [(i, step) for i, step in enumerate(steps) if (step.path, step.port) == (path, port)]
            stack.enter_context(_intercepted(net, path, port, partial(_apply, here, done), functions))
        output = net(*copy.deepcopy(args), **copy.deepcopy(dict(kwargs)))
    _refuse_unreached(step for i, step in enumerate(steps) if i not in done)
    return output, [done[i] for i, step in enumerate(steps) if isinstance(step, Read)]


def _locations(
    steps: Iterable["Edit | Read | ReadStep | AssignStep | InplaceStep"],
) -> list[tuple[str, Port]]:
    """The locations the steps are about, each once."""
    found: dict[tuple[str, Port], None] = {}
    for step in steps:
        found[step.path, step.port] = None
    return list(found)


def _apply(here: Sequence[tuple[int, Edit | Read]], done: dict[int, Tensor], live: Tensor) -> Tensor:
    """Do the steps of one location on its live tensor; note under each step's number the value it left."""
    for i, step in here:
        if isinstance(step, Edit):
            value = step.fn(live)
            if step.kind == "assign":
                assert value is not None, f"{step} returns no value to assign"
                live = _assigned(value, live)
        done[i] = live.clone()
    return live


def _assigned(value: Tensor, live: Tensor) -> Tensor:
    """A copy of the value, broadcast to the shape of what it replaces."""
    return value.broadcast_to(live.shape).clone(memory_format=torch.contiguous_format)


def _refuse_unreached(steps: Iterable[object]) -> None:
    if missed := list(steps):
        raise LookupError(f"never reached in this forward, or no tensor there: {missed}")


# ----------------------------------------------------------------------------------------------- interception


@contextmanager
def patched(
    owner: Any, key: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Generator[None, None, None]:
    """Within the block `wrapper(original)` stands for a function: an object's attribute or a mapping's item.

    For example `patched(torch.nn.functional, "gelu", …)` or `patched(ALL_ATTENTION_FUNCTIONS, "sdpa", …)`.
    """
    is_item = isinstance(owner, MutableMapping)
    original = owner[key] if is_item else getattr(owner, key)
    put = owner.__setitem__ if is_item else partial(setattr, owner)
    put(key, wrapper(original))
    try:
        yield
    finally:
        put(key, original)


def _intercepted(
    net: nn.Module, path: str, port: Port, visit: Visit, functions: Functions = NO_FUNCTIONS
) -> AbstractContextManager[object]:
    """A context in which `visit` gets the first tensor of a port, at the call the path names."""
    name, _, n = path.partition("#")
    arrive = _on_call(int(n or 0), visit)
    if name in functions:
        return patched(*functions[name], partial(_wrapped, port, arrive))
    module = net.get_submodule(name)
    if port == "output":
        return module.register_forward_hook(lambda _module, _args, output: arrive(output))
    return module.register_forward_pre_hook(lambda _module, args, kwargs: arrive((args, kwargs)), with_kwargs=True)


def _on_call(n: int, visit: Visit) -> Callable[[Any], Any]:
    """A function to call with each value that passes; the n-th gets its first tensor visited."""
    count = itertools.count()
    return lambda tree: _visit_first(visit, tree)[0] if next(count) == n else tree


def _wrapped(port: Port, arrive: Callable[[Any], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what passes through one of its ports handed to `arrive`."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if port == "output":
            return arrive(original(*args, **kwargs))
        args, kwargs = arrive((args, kwargs))
        return original(*args, **kwargs)

    return wrapper


def _visit_first(visit: Visit, tree: Any) -> tuple[Any, bool]:
    """The tree with `visit` applied to its first tensor, and whether there was one."""
    if isinstance(tree, Tensor):
        return visit(tree), True
    if not isinstance(tree, Mapping | tuple | list):
        return tree, False
    for key, child in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        new, found = _visit_first(visit, child)
        if found:
            return (tree if new is child else _with_item(tree, key, new)), True
    return tree, False


def _with_item(tree: Any, key: Any, new: Any) -> Any:
    """A copy of a tuple, list or dict in which one item is new."""
    if isinstance(tree, tuple):
        return (*tree[:key], new, *tree[key + 1 :])
    tree = copy.copy(tree)
    tree[key] = new
    return tree


# ------------------------------------------------------------------------------------------- programs as data


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
    values = _Values(steps)
    located = [step for step in steps if isinstance(step, ReadStep | AssignStep | InplaceStep)]
    with ExitStack() as stack, torch.no_grad():
        for path, port in _locations(located):
            here = [step for step in located if (step.path, step.port) == (path, port)]
            stack.enter_context(_intercepted(net, path, port, partial(values.visit, here)))
        logits: Tensor = net(ids)
        return [values.of(step.var) for step in steps if isinstance(step, SaveStep)], logits


class _Values:
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
                    live = _assigned(self.of(step.var), live)
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


# ----------------------------------------------------------------------------------------- making up programs


def places(net: nn.Module, ids: Tensor, paths: Sequence[str] | None = None) -> tuple[Place, ...]:
    """The locations of a model that hold f32[batch, length, width], in the order the forward reaches them.

    paths: modules to consider; every module, the model itself included, if None.
    """
    seen: list[Place] = []

    def visit(path: str, port: Port, live: Tensor) -> Tensor:
        if live.is_floating_point() and live.dim() == 3:
            seen.append(Place(path, port, live.shape[-1]))
        return live

    ports: tuple[Port, Port] = ("input", "output")
    names = [name for name, _ in net.named_modules()] if paths is None else paths
    with ExitStack() as stack, torch.no_grad():
        for path, port in itertools.product(names, ports):
            stack.enter_context(_intercepted(net, path, port, partial(visit, path, port)))
        net(ids)
    return tuple(seen)


def random_program(seed: int, at: Sequence[Place], size: int = 12) -> Program:
    """A program that is causal by construction: a write uses only what is read at its location or before it.

    seed: the same seed and places give the same program.  at: in execution order, as `places` gives them.
    size: about how many statements before the saves; at least one of them writes. Statements about different
    locations stand in any order.
    """
    draft = _Draft(random.Random(seed), tuple(at))
    kinds: list[Callable[[], object]] = [draft.read, draft.compute, draft.assign, draft.edit]
    draft.read()
    for make in draft.rng.choices(kinds, weights=(3, 3, 2, 3), k=size - 2):
        make()
    draft.rng.choice([draft.assign, draft.edit])()
    draft.save()
    return tuple(draft.steps)


@dataclass(frozen=True)
class _Var:
    """A variable of a draft; since: index of the place from which on it is known."""

    name: str
    width: int
    since: int
    is_row: bool = False


@dataclass
class _Draft:
    """A random program being written. Every method appends statements."""

    rng: random.Random
    at: tuple[Place, ...]
    steps: list[Step] = field(default_factory=list)
    vars: list[_Var] = field(default_factory=list)

    def read(self, index: int | None = None) -> _Var:
        """Read at a place, any if None."""
        index = self.rng.randrange(len(self.at)) if index is None else index
        place = self.at[index]
        var = self._new(place.width, index)
        self.steps.append(ReadStep(var.name, place.path, place.port))
        return var

    def compute(self) -> None:
        """A new value from one or two of the earlier ones."""
        known = [var for var in self.vars if not var.is_row]
        first = self.rng.choice(known)
        self._op(self.rng.choice([name for name in OPS if OPS[name].arity]), first, known)

    def assign(self) -> None:
        """Replace the value at some place, mostly by something made for it."""
        index = self.rng.randrange(len(self.at))
        var = self._row(index) if self.rng.random() < 0.1 else self._known_at(index)
        place = self.at[index]
        self.steps.append(AssignStep(place.path, place.port, var.name))

    def edit(self) -> None:
        """Edit the value at some place in place."""
        index = self.rng.randrange(len(self.at))
        how = self.rng.choice(list(INPLACE))
        value = self._value(self.rng.choice(INPLACE[how].values), index)
        place = self.at[index]
        self.steps.append(InplaceStep(place.path, place.port, how, value))

    def save(self) -> None:
        """Save some of the variables, in a random order."""
        names = [var.name for var in self.vars if not var.is_row]
        chosen = self.rng.sample(names, self.rng.randint(1, len(names)))
        self.steps.extend(SaveStep(name) for name in chosen)

    def _known_at(self, index: int) -> _Var:
        """A variable of a place's width, known when the forward gets there: an old one, or one made now."""
        fits = [v for v in self.vars if not v.is_row and v.width == self.at[index].width and v.since <= index]
        if fits and self.rng.random() < 0.6:
            return self.rng.choice(fits)
        earlier = [i for i in range(index + 1) if self.at[i].width == self.at[index].width]
        source = self.read(self.rng.choice(earlier))
        return self._op(self.rng.choice([name for name in OPS if OPS[name].arity]), source, [*fits, source])

    def _op(self, name: str, first: _Var, known: Sequence[_Var]) -> _Var:
        """Apply an operation to a variable and, if it takes two, to another of the same width."""
        args = [first]
        if OPS[name].arity == 2:
            others = [var for var in known if var.width == first.width and var != first]
            args.append(self.rng.choice(others or args))
        var = self._new(first.width, max(arg.since for arg in args))
        const = self._const(OPS[name].const, first.width)
        self.steps.append(OpStep(var.name, name, tuple(arg.name for arg in args), const))
        return var

    def _row(self, index: int) -> _Var:
        """A tensor of the user's that is broadcast when it is assigned."""
        var = self._new(self.at[index].width, 0, is_row=True)
        self.steps.append(OpStep(var.name, "constant", (), self._const("row", var.width)))
        return var

    def _new(self, width: int, since: int, is_row: bool = False) -> _Var:
        var = _Var(f"v{len(self.vars)}", width, since, is_row)
        self.vars.append(var)
        return var

    def _value(self, kind: str, index: int) -> Value:
        return self._known_at(index).name if kind == "var" else self._const(kind, self.at[index].width)

    def _const(self, kind: str, width: int) -> Const | Number | None:
        match kind:
            case "none":
                return None
            case "number":
                return round(self.rng.uniform(-1.5, 1.5), 2)
            case _:
                return Const(self.rng.randrange(1000), (width, width) if kind == "matrix" else (width,))
