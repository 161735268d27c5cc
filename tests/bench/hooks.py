"""Raw forward hooks as a careful person writes them: what every tool is compared with and checked against."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Change = Callable[[Any], Any]


@contextmanager
def outputs(changes: Mapping[nn.Module, Change]) -> Iterator[None]:
    """While open, each module's output goes through its function; what that returns replaces it."""
    handles = [m.register_forward_hook(lambda _m, _a, out, f=f: f(out)) for m, f in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs(module: nn.Module, change: Change) -> Iterator[None]:
    """While open, the module's first argument goes through the function; None leaves it as it is."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = change(args[0])
        return None if new is None else (new, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Stop(Exception):
    """Raised in a hook when all that was wanted has been seen."""


def keep_and_stop(into: list[Tensor]) -> Change:
    """A change that keeps the output and ends the forward."""

    def change(output: Tensor) -> None:
        into.append(output)
        raise Stop

    return change
