"""Calls of modules that a body makes and the model's own forward does not: an attached autoencoder, an unused head.

    model.h[3].attachment = Sae()
    with model.trace(x):
        model.h[3].output = model.h[3].attachment(model.h[3].output)
        codes = model.h[3].attachment.encoder.output.save()

What was given and returned is kept while the block is open, for the module that is called and all below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


@dataclass(frozen=True)
class AttachedCall:
    """One call: what was given and what was returned, values of the open trace among them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    def port(self, port: str) -> Any:
        """``output``, ``inputs`` (args and kwargs) or ``input`` (the first of them; None without any)."""
        if port == "output":
            return self.output
        if port == "inputs":
            return self.args, dict(self.kwargs)
        return next(iter((*self.args, *self.kwargs.values())), None)


class AttachedCalls:
    """The calls made inside each open block, by path of the module, in order."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Any, dict[str, list[AttachedCall]]] = WeakKeyDictionary()

    def __bool__(self) -> bool:
        return bool(self._made)

    def call(self, trace: Any, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a module and keep this call and those below it.  Returns: what the module returns."""
        made = self._made.setdefault(trace, {})
        parts = [(f"{path}.{name}" if name else path, part) for name, part in module.named_modules()]
        handles = [part.register_forward_hook(_keeper(made, where), with_kwargs=True) for where, part in parts]
        try:
            return module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def find(self, trace: Any, path: str, n: int) -> AttachedCall | None:
        """Call number ``n`` of a module inside a block; None if there was none."""
        calls = self._made.get(trace, {}).get(path, [])
        return calls[n] if n < len(calls) else None

    def count(self, trace: Any, path: str) -> int:
        """How many calls of a module there were inside a block."""
        return len(self._made.get(trace, {}).get(path, []))

    def forget(self, trace: Any) -> None:
        """The block has ended."""
        self._made.pop(trace, None)


def _keeper(made: dict[str, list[AttachedCall]], path: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made.setdefault(path, []).append(AttachedCall(args, kwargs, output))

    return keep
