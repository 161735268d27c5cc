"""What an intervention means, said with plain PyTorch hooks: the oracle our tests compare with.

It knows nothing of fxsight. `run`: a model with a few edits and reads, given as functions. `programs.py` has programs
as data and runs them by the same rules; `random_programs.py` makes some up. The rules:

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
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

import torch
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
        for path, port in locations(steps):
            here = [(i, step) for i, step in enumerate(steps) if (step.path, step.port) == (path, port)]
            stack.enter_context(intercepted(net, path, port, partial(_apply, here, done), functions))
        output = net(*copy.deepcopy(args), **copy.deepcopy(dict(kwargs)))
    _refuse_unreached(step for i, step in enumerate(steps) if i not in done)
    return output, [done[i] for i, step in enumerate(steps) if isinstance(step, Read)]


class Located(Protocol):
    """A step at a port of a path."""

    @property
    def path(self) -> str: ...

    @property
    def port(self) -> Port: ...


def locations(steps: Iterable[Located]) -> list[tuple[str, Port]]:
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
                live = assigned(value, live)
        done[i] = live.clone()
    return live


def assigned(value: Tensor, live: Tensor) -> Tensor:
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


def intercepted(
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
