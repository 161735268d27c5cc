"""What a torch call does to shapes: run once on fake tensors, remembered by what it was given.

A rule says, for given dtypes, shapes, strides and plain arguments, what the results are, which of them share memory
with an argument, and which argument is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxsight import _torch
from fxsight.errors import TraceError
from fxsight.spec import TensorSpec
from fxsight.tree import Tree, flatten


@dataclass(frozen=True)
class Rule:
    """What one call does.

    tree, leaves: of the result; a tensor as its spec, anything else as itself.  views: per leaf, the number of the
    argument leaf whose memory it shares, or None.  changed: the argument leaf that is changed in place, or None.
    returns_changed: whether the result is that very argument.  needs_data: nothing is known without numbers.
    """

    tree: Tree
    leaves: tuple[Any, ...] = ()
    views: tuple[int | None, ...] = ()
    changed: int | None = None
    returns_changed: bool = False
    needs_data: bool = False

    @property
    def spec(self) -> Any:
        """Of the result as a whole: one spec, or a tuple of them."""
        specs = tuple(leaf if isinstance(leaf, TensorSpec) else None for leaf in self.leaves)
        return specs[0] if self.tree.kind == "leaf" else specs

    @property
    def has_tensors(self) -> bool:
        """Whether any result is a tensor."""
        return any(isinstance(leaf, TensorSpec) for leaf in self.leaves)


Table = dict[Any, Rule]


def rule_for(
    table: Table, func: Any, specs: Sequence[Any], tree: Tree, fakes: Callable[[], list[Any]], mode: Callable[[], Any]
) -> Rule:
    """The rule of a call, from the table or by trying it.

    specs: per argument leaf the spec of a tensor or the leaf itself.
    fakes, mode: where it is tried, they make the leaves as fake tensors, and the mode of these.

    Raises: what torch raises on these shapes.
    """
    key = (func, tree, tuple(map(_key_of_scaling if func in _SCALING else _key, specs)))
    try:
        known = table.get(key)
    except TypeError:  # an argument that cannot be hashed
        return _try(func, tree, fakes(), mode())
    if known is None:
        known = table[key] = _try(func, tree, fakes(), mode())
    return known


def _key(leaf: Any) -> Any:
    if isinstance(leaf, TensorSpec):
        return (leaf.dtype, leaf.shape, leaf.stride, leaf.device)
    if isinstance(leaf, slice):
        return ("slice", leaf.start, leaf.stop, leaf.step)
    return (type(leaf), leaf)


# Functions for which one number is as good as another: shapes and dtypes do not depend on it.
_SCALING = frozenset(
    getattr(torch.Tensor, name + end)
    for name in ("add", "sub", "mul", "div", "__add__", "__sub__", "__mul__", "__truediv__", "__radd__", "__rmul__")
    for end in ("", "_")
    if hasattr(torch.Tensor, name + end)
) | {torch.Tensor.__iadd__, torch.Tensor.__isub__, torch.Tensor.__imul__, torch.Tensor.__itruediv__}


def _key_of_scaling(leaf: Any) -> Any:
    return float if type(leaf) is float else _key(leaf)


def _try(func: Any, tree: Tree, fakes: list[Any], mode: Any) -> Rule:
    with torch.inference_mode(False), mode, torch.no_grad():
        fakes = _counting(fakes)
        before = [_torch.version(fake) if isinstance(fake, torch.Tensor) else 0 for fake in fakes]
        args, kwargs = tree.build(fakes)
        try:
            result = func(*args, **kwargs)
        except _torch.NeedsData:
            return Rule(tree, needs_data=True)
    moved = [i for i, f in enumerate(fakes) if isinstance(f, torch.Tensor) and _torch.version(f) != before[i]]
    if len({id(fakes[i]) for i in moved}) > 1:
        raise TraceError(f"{getattr(func, '__name__', func)} changes several tensors in place; write one call for each")
    changed = moved[-1] if moved else None  # ``out=`` comes last
    found, shape = flatten(result)
    returned = changed is not None and result is fakes[changed]
    views = tuple(_view_of(leaf, fakes) for leaf in found)
    return Rule(shape, tuple(map(_described, found)), views, changed, returned)


def _counting(fakes: list[Any]) -> list[Any]:
    """The same tensors, such that torch counts their changes: of those that are made in inference mode it does not."""
    made: dict[int, Any] = {}
    for fake in fakes:
        if isinstance(fake, torch.Tensor) and fake.is_inference():
            made[id(fake)] = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    return [made.get(id(fake), fake) for fake in fakes]


def _view_of(leaf: Any, fakes: list[Any]) -> int | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    memory = _torch.storage_key(leaf)
    same = (i for i, f in enumerate(fakes) if isinstance(f, torch.Tensor) and _torch.storage_key(f) == memory)
    return next(same, None)


def _described(leaf: Any) -> Any:
    return TensorSpec.of(leaf) if isinstance(leaf, torch.Tensor) else leaf
