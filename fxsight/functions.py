"""Functions as names and names as functions: what a program may call.

``aten.add.Tensor`` is an ATen overload, ``torch.Tensor.mul`` and ``torch.nn.functional.gelu`` are torch's public
functions, ``operator.getitem`` is Python's. A name outside these is refused, so text and files can be read safely.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch.overrides import get_overridable_functions, resolve_name

from fxsight import _torch
from fxsight.errors import TextError

Target = Callable[..., Any]

# Python functions a program may contain: indexing, and the arithmetic of sizes.
PYTHON: Mapping[str, Target] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in [
            "getitem",
            "add",
            "sub",
            "mul",
            "floordiv",
            "mod",
            "neg",
            "pow",
            "truediv",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and_",
            "or_",
            "not_",
        ]
    },
    "getattr": getattr,  # only of ``ATTRIBUTES``: see ``check_call``
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_int": torch.sym_int,
    "torch.sym_float": torch.sym_float,
    "torch.sym_not": torch.sym_not,
    "torch.sym_ite": torch.sym_ite,
    "torch.sym_sqrt": getattr(torch, "_sym_sqrt", math.sqrt),
}
# What ``getattr`` may take of a tensor.
ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
_ROOTS: tuple[tuple[str, Any], ...] = (
    ("torch.nn.functional.", torch.nn.functional),
    ("torch.Tensor.", torch.Tensor),
    ("torch.special.", torch.special),
    ("torch.linalg.", torch.linalg),
    ("torch.fft.", torch.fft),
    ("torch.nn.init.", torch.nn.init),
    ("torch.", torch),
)


@cache
def function_name(target: Any) -> str:
    """The name of a function.

    Raises: TextError for a function that a program may not contain.
    """
    if isinstance(target, _torch.OpOverload):
        packet = str(target)
        return packet if packet.startswith("aten.") else f"torch.ops.{packet}"
    for name, known in PYTHON.items():
        if known is target:
            return name
    public = _public_name(target)
    if public is None:
        raise TextError(f"not a torch function: {target!r}; a recorded call must be one of torch's own")
    return public


def _public_name(target: Any) -> str | None:
    owner = getattr(target, "__objclass__", None)
    if owner is not None and issubclass(torch.Tensor, owner):
        return f"torch.Tensor.{target.__name__}"
    found: str | None = resolve_name(target)
    if found is not None:
        return found.replace("torch.functional.", "torch.")
    name = getattr(target, "__name__", "")
    for prefix, root in _ROOTS:
        if getattr(root, name, None) is target:
            return prefix + name
    return None


def find_function(name: str) -> Target:
    """The function of that name.

    Raises: TextError when there is none, or when a program may not call it.
    """
    if name in PYTHON:
        return PYTHON[name]
    if name.startswith(("aten.", "torch.ops.")):
        return _find_overload(name.removeprefix("torch.ops."))
    for prefix, root in _ROOTS:
        rest = name.removeprefix(prefix)
        if rest != name and "." not in rest:
            found: Target | None = getattr(root, rest, None)
            if found is not None and _is_allowed(prefix, rest, found):
                return found
    raise TextError(f"no function {name!r}; a program calls aten.*, torch.*, torch.Tensor.* and operator.getitem")


def _is_allowed(prefix: str, name: str, found: Target) -> bool:
    if prefix == "torch.Tensor.":
        return _is_method(prefix, name)
    in_place = (
        name.endswith("_")
        and not name.startswith("_")
        and prefix in ("torch.", "torch.nn.init.", "torch.nn.functional.")
    )
    return _is_tensor_function(found) or (in_place and callable(found))


def _is_method(prefix: str, name: str) -> bool:
    """Whether it names a method of tensors: any but those with which Python pickles and inspects objects."""
    if prefix != "torch.Tensor." or not callable(getattr(torch.Tensor, name, None)):
        return False
    return not name.startswith("_") or name.strip("_") in _OPERATORS


_INFIX = (
    "add",
    "sub",
    "mul",
    "truediv",
    "div",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_OTHER = ("getitem", "setitem", "neg", "pos", "invert", "abs", "eq", "ne", "lt", "le", "gt", "ge", "iter", "len")
_OPERATORS = frozenset([*_OTHER, *(side + name for name in _INFIX for side in ("", "r", "i"))])


def _is_tensor_function(target: Any) -> bool:
    """Whether torch lists it among the functions of tensors: nothing that loads, saves or executes is."""
    try:
        return target in _tensor_functions()
    except TypeError:  # cannot be hashed
        return False


@cache
def _tensor_functions() -> frozenset[Any]:
    return frozenset(fn for functions in get_overridable_functions().values() for fn in functions)


def _find_overload(name: str) -> Target:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise TextError(f"no operator {name!r} in torch {torch.__version__}")
    if not isinstance(found, _torch.OpOverload):
        raise TextError(f"{name!r} is not one overload; write for example aten.add.Tensor")
    return found
