"""``save``, ``session`` and ``apply``: what users say without a model."""

from __future__ import annotations

from typing import Any

import torch

from fxsight.containers import Saved
from fxsight.context import here
from fxsight.errors import TraceError
from fxsight.sessions import Session
from fxsight.shared import ALONE, SHARED
from fxsight.tree import flatten
from fxsight.value import apply_now, keep, values_in


def save(value: Any) -> Any:
    """Keep every value in a structure: after the block they are plain tensors.  Returns: the structure.

    In a session a value may have become a plain tensor already, where a number was needed: it is kept as it is.

    Raises: NotSavedError for a value of a block that has ended; TraceError when there is no value in it.
    """
    if isinstance(value, Saved):
        return value.save()
    values = list(values_in(value))
    if not values and here().session is not None and any(isinstance(x, torch.Tensor) for x in flatten(value)[0]):
        return value  # computed already, for a number
    if not values:
        raise TraceError("nothing to save: no value of a trace in it")
    keep(value)
    return value


def session(share: bool = True) -> Session:
    """A block for several traces, of one model or of several: see ``Model.session``."""
    return Session(SHARED if share else ALONE)


def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call any Python function on the numbers of values, now: with the edits written so far, each computed once.

    Returns: what the function returns; its tensors are values of the trace again, to be written and saved; plain
    numbers and containers have ``.save()``.
    Raises: NeedsValueError in a scan; what the function raises.
    """
    return apply_now(function, args, kwargs)
