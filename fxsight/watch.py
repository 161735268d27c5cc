"""Whether anything of a module has changed that its forward may branch on: asked at every trace, in microseconds.

``settings`` says what such a change is; a watch compares the dictionaries that hold it with copies, which Python does
by identity first. When it is in doubt it says "changed", and the settings are looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Watch:
    """A module as it was when the watch was made."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        dicts = [part.__dict__ for part in parts]
        watched = [
            *dicts,
            *(d[name] for d in dicts for name in ("_modules", "_parameters", "_buffers")),
            *(vars(d["config"]) for d in dicts if hasattr(d.get("config"), "__dict__")),
        ]
        self._pairs = [(d, dict(d)) for d in watched]
        self._hooks = [d[name] for d in dicts for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._hooked = sum(map(len, self._hooks))
        self.tensors = [
            t for d in dicts for name in ("_parameters", "_buffers") for t in d[name].values() if t is not None
        ]
        self._memory = [t.data_ptr() for t in self.tensors]
        self.names = _names(module)

    def same(self) -> bool:
        """Whether nothing has changed since."""
        try:
            for now, before in self._pairs:
                if now != before:
                    return False
        except RuntimeError:  # tensors were compared: one of them has been replaced
            return False
        if [t.data_ptr() for t in self.tensors] != self._memory:
            return False
        return sum(map(len, self._hooks)) == self._hooked


def _names(module: nn.Module) -> dict[int, str]:
    """Names of the module's parameters and buffers by ``id``; the first name of a shared one."""
    pairs: list[tuple[str, torch.Tensor]] = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return {id(tensor): name for name, tensor in reversed(pairs)}


def kinds(leaves: list[Any]) -> tuple[Any, ...] | None:
    """What a program depends on of inputs that are tensors or plain; None when one is something else."""
    if any(type(leaf) not in _KNOWN for leaf in leaves):
        return None
    return tuple(
        (leaf.dtype, leaf.shape, leaf.device, leaf.dtype.is_floating_point and leaf.stride())
        if type(leaf) is torch.Tensor
        else (type(leaf), leaf)
        for leaf in leaves
    )


_KNOWN = frozenset((torch.Tensor, bool, int, str, type(None)))
