"""The settings of a module: everything in it, beside tensors and code, that its forward may branch on."""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))


def settings(module: nn.Module) -> tuple[Any, ...]:
    """Of every submodule: plain attributes (``training`` among them), those of its config, which hooks it has, and
    dtypes, devices and shapes of its weights.

    Cheap enough to be asked at every trace; equal settings mean that a captured program still holds.
    """
    return tuple(_of(part) for part in module.modules())


def _of(module: nn.Module) -> tuple[Any, ...]:
    own = module.__dict__
    plain = tuple(value for value in own.values() if type(value) in _PLAIN)
    hooks = (*own.get("_forward_hooks", ()), *own.get("_forward_pre_hooks", ()))
    config = getattr(own.get("config"), "__dict__", None)
    more = () if config is None else tuple(value for value in config.values() if type(value) in _PLAIN)
    tensors = (*own["_parameters"].values(), *own["_buffers"].values())
    weights = tuple(None if t is None else (t.dtype, t.device, t.shape) for t in tensors)
    return (type(module).__qualname__, plain, hooks, more, weights)
