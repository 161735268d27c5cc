"""What a node may call and with what: functions by name (``functions``), and arguments as Python text."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from fxsight.errors import TextError
from fxsight.functions import ATTRIBUTES, find_function, function_name
from fxsight.gradient import FUNCTIONS
from fxsight.mutate import mutate
from fxsight.spread import spread, spread_columns
from fxsight.stage import Stage, Table

Target = Callable[..., Any]

_OWN: Mapping[str, Target] = {"mutate": mutate, "spread": spread, "spread_columns": spread_columns}


def target_name(target: Any) -> str:
    """The name of what a node calls.

    Raises: TextError for a function that a program may not contain.
    """
    if target in _OWN.values():
        return str(target.__name__)
    if isinstance(target, (Stage, Table)):
        return target.title
    name = str(getattr(target, "__name__", ""))
    return name if FUNCTIONS.get(name) is target else function_name(target)


def find_target(name: str) -> Target:
    """The function of that name.

    Raises: TextError when there is none, or when a program may not call it.
    """
    return _OWN.get(name) or FUNCTIONS.get(name) or find_function(name)


def check_call(target: Any, args: Any) -> None:
    """A call reads from a program may make: no attribute but views of tensors, no function but those with names.

    Raises: TextError.
    """
    if target is getattr and not (len(args) == 2 and args[1] in ATTRIBUTES):
        raise TextError(f"getattr takes one of {', '.join(sorted(ATTRIBUTES))} of a tensor")
    if target is operator.getitem and not isinstance(args[1] if len(args) == 2 else None, int):
        raise TextError("operator.getitem takes a member by its number")
    if target is mutate:
        for name in mutate_functions(args):
            find_target(name)


def mutate_functions(args: Any) -> list[str]:
    """The names of the functions that a ``mutate`` with these arguments calls.

    Raises: TextError when they are none of such a call.
    """
    is_call = len(args) == 5 and isinstance(args[1], tuple) and isinstance(args[3], tuple)
    if not is_call or not all(_is_step(step) for step in args[1]) or not isinstance(args[2], str):
        raise TextError("mutate takes a value, the views, a function's name, and its arguments")
    return [*(step[0] for step in args[1]), args[2]]


def _is_step(step: Any) -> bool:
    kinds = (str, tuple, dict, tuple)
    return isinstance(step, tuple) and len(step) == 4 and all(map(isinstance, step, kinds))


def _name(node: fx.Node) -> str:
    return node.name


_PLAIN = frozenset([type(None), bool, int, str])


def argument_text(value: Any, named: Callable[[fx.Node], str] = _name) -> str:
    """An argument of a node as Python text.  named: of a node.

    Raises: TextError for a value that cannot stand in a program.
    """
    if type(value) in _PLAIN:
        return repr(value)
    match value:
        case fx.Node():
            return named(value)
        case tuple():
            return f"({', '.join([argument_text(v, named) for v in value])}{',' if len(value) == 1 else ''})"
        case list():
            return f"[{', '.join([argument_text(v, named) for v in value])}]"
        case dict():
            return "{" + ", ".join([f"{k!r}: {argument_text(v, named)}" for k, v in value.items()]) + "}"
        case slice():
            return f"slice({', '.join([argument_text(v, named) for v in (value.start, value.stop, value.step)])})"
        case torch.device():
            return f"torch.device({str(value)!r})"
        case torch.dtype() | torch.layout() | torch.memory_format():
            return str(value)
        case float() if not math.isfinite(value):
            return f"float({str(value)!r})"
        case sympy.Expr():
            return str(value)
        case None | bool() | int() | float() | complex() | str():
            return repr(value)
        case _ if value is Ellipsis:
            return "..."
        case _:
            raise TextError(f"a {type(value).__name__} cannot be an argument in a program: {value!r}")


def check_argument(value: Any) -> None:
    """Whether an argument of a node can be written.

    Raises: TextError for a value that cannot stand in a program.
    """
    if isinstance(value, (tuple, list)):
        for part in value:
            check_argument(part)
    elif isinstance(value, dict):
        for part in value.values():
            check_argument(part)
    elif not (type(value) in _PLAIN or isinstance(value, fx.Node)):
        argument_text(value)
