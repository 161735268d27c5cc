"""``edited.compile()``: the edited model as an ``nn.Module``, for code that knows nothing of fxsight.

The module is the model's own in everything but its class: the two have one and the same ``__dict__``, so that
parameters, settings, ``state_dict``, ``.to`` and ``.eval`` are those of the model, at once and in both directions. The
class derives from the model's, and only its call is another.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import nn

from fxsight.auto import Backend
from fxsight.captures import Captures
from fxsight.edits import Edits
from fxsight.errors import TraceError


def drop_in(captures: Captures, edits: Edits, backend: Backend) -> nn.Module:
    """The module; it makes the edits that there are at each call.

    backend: how it runs where nobody wants gradients; with gradients it runs op by op, in which they flow.
    """
    module, cls = captures.module, type(captures.module)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        wanted = torch.is_grad_enabled() and _has_gradients(module, edits, (*args, *kwargs.values()))
        return edits.call(captures, (args, kwargs), "eager" if wanted else backend)

    own = {"forward": forward, "__call__": forward, "__reduce_ex__": _refuse, "__module__": cls.__module__}
    made: Any = object.__new__(type(cls.__name__, (cls,), own))
    object.__setattr__(made, "__dict__", module.__dict__)
    found: nn.Module = made
    return found


def _has_gradients(module: nn.Module, edits: Edits, inputs: tuple[Any, ...]) -> bool:
    """Whether a result has a history of gradients."""
    tensors = (*inputs, *module.parameters(), *edits.parameters.values())
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def _refuse(self: Any, protocol: Any) -> NoReturn:
    raise TraceError("a compiled edited model cannot be copied or pickled: copy the Model, and compile the copy")
