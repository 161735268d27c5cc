"""The first call that a method such as ``generate`` makes of its module: it depends on the prompt alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxsight.rehearsal import OBSERVERS, quiet
from fxsight.rows import Call
from fxsight.twin import twin


class _Met(Exception):
    """The call has been met; never seen outside."""


def first_call(module: nn.Module, method: str, call: Call) -> Call:
    """What ``module.method(*args, **kwargs)`` calls the module with first; the module itself is not called.

    What the method calls before runs, such as an encoder. Nothing of the user's is called, no random number is drawn.

    Raises: what the method raises for these arguments.
    """
    met: list[Call] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        met.append((args, kwargs))
        raise _Met

    args, kwargs = call
    kwargs = {name: value for name, value in kwargs.items() if name not in OBSERVERS}
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            getattr(twin(module, forward), method)(*args, **kwargs)
    except _Met:
        pass
    return met[0]
