"""A twin of a module: the same parameters and parts, but a forward that is a function of ours.

So a method of the module's own that calls the module again and again, as ``generate`` does, can be followed call by
call: it is called on the twin. Neither the module nor its class is touched.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def twin(module: nn.Module, forward: Callable[..., Any], encode: Callable[..., Any] | None = None) -> Any:
    """A module of a class that derives from the module's, all of whose attributes are the module's own.

    forward: called instead of the module's forward, with the same arguments; it may call the module, hooks and all.
    encode: called so instead of the module's encoder, where its methods ask for that; None for the encoder itself.
    """
    original = type(module)

    def step(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    shown: Any = step
    shown.__signature__ = inspect.signature(original.forward)  # methods ask what the forward takes
    names = {"forward": step, "__module__": original.__module__, "__qualname__": original.__qualname__}
    made: Any = object.__new__(type(original.__name__, (original,), {**names, "__doc__": original.__doc__}))
    vars(made).update(vars(module))
    vars(made).update({name: OrderedDict() for name in _HOOKS if name in vars(module)})  # those of the module run in it
    vars(made).pop("forward", None)  # one that was set on the module
    if encode is not None and encoder_path(module):
        encoder = twin(module.get_submodule(encoder_path(module)), encode)
        vars(made)["get_encoder"] = lambda *kind, **kinds: encoder
    return made


def encoder_path(module: Any) -> str:
    """The path of the encoder that a module's ``generate`` calls before its steps; empty where it has none."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return ""
    encoder = module.get_encoder()
    return next((path for path, part in module.named_modules() if part is encoder), "")
