"""A value becomes a plain tensor, in place, for every variable that holds it."""

from __future__ import annotations

from typing import Any

import torch

from fxsight import _torch
from fxsight.value import Value


def become(value: Value, tensor: torch.Tensor) -> None:
    """Turn a value into a plain tensor, for all who hold it; ``.value`` on it still works.

    Source: ``torch.utils.swap_tensors`` exchanges the two objects' contents and classes.
    """
    vars(value).pop("value", None)  # of the time before, in a loop
    plain = tensor.detach() if type(tensor) is torch.nn.Parameter else tensor
    try:
        _torch.swap(value, plain)
    except RuntimeError:  # something else refers to this very tensor (a view of it): swap with a view, too
        _torch.swap(value, plain.view_as(plain))
    now: Any = value
    # Another tensor of the same memory, so that there is no cycle; a view would keep it alive for ever, so with a graph
    # behind it it is the value itself.
    now.value = value if value.requires_grad else value.detach()
