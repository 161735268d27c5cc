"""Structured values: tuples, lists, dicts, named tuples, dataclasses and model outputs as leaves and a shape.

The shape (``Tree``) is data: it can be compared, hashed, printed, stored in a file and used in another process to
build the value again. It is deliberately small: a class takes part when it is a plain container, a named tuple, a
dataclass that holds tensors, or a ``transformers`` ``ModelOutput`` or cache (``past``); everything else is a leaf.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxsight.past import Constant, build, constant, find_class, is_past, members_of

Json = Any
_SHOWN = 8  # members of a container that are shown before the rest is counted


@dataclass(frozen=True)
class Tree:
    """The shape of a value: ``kind`` and, for containers, the keys and shapes of the members.

    kind: "leaf", "tuple", "list", "dict", "namedtuple", "fields" (dataclass or ModelOutput), "object" (a cache or a
    layer of one) or "constant" (a dtype, device or class in it, without leaves).
    name: ``module:qualname`` of the class, or the constant as text; else "".
    """

    kind: str
    name: str = ""
    keys: tuple[Any, ...] = ()
    children: tuple[Tree, ...] = ()

    @property
    def size(self) -> int:
        """How many leaves."""
        return 1 if self.kind == "leaf" else sum(child.size for child in self.children)

    def build(self, leaves: Sequence[Any]) -> Any:
        """The value with this shape and these leaves (``len(leaves) == size``)."""
        return self._build(iter(leaves))

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind == "leaf":
            return next(leaves)
        return _BUILDERS[self.kind](self, [child._build(leaves) for child in self.children])

    def paths(self, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """The way to each leaf, in order: keys of ``[]``."""
        if self.kind == "leaf":
            yield prefix
        for key, child in zip(self.keys, self.children, strict=True):
            yield from child.paths((*prefix, key))

    def text(self, leaves: Sequence[str]) -> str:
        """The value in words, given those of its leaves: ``(f32[2, 4], {'mask': None})``; long containers are cut."""
        return self._text(iter(leaves))

    def _text(self, leaves: Iterator[str]) -> str:
        if self.kind == "leaf":
            return next(leaves)
        parts = [child._text(leaves) for child in self.children]
        if self.kind not in ("tuple", "list"):
            form = "{!r}: {}" if self.kind == "dict" else "{}={}"
            parts = [form.format(key, part) for key, part in zip(self.keys, parts, strict=True)]
        if len(parts) > _SHOWN:
            parts = [*parts[: _SHOWN // 2], f"... {len(parts) - _SHOWN // 2} more"]
        inner = ", ".join(parts)
        match self.kind:
            case "tuple":
                return f"({inner},)" if len(parts) == 1 else f"({inner})"
            case "list":
                return f"[{inner}]"
            case "dict":
                return "{" + inner + "}"
            case "constant":
                return self.name
            case _:
                return f"{self.name.partition(':')[2].rpartition('.')[2]}({inner})"

    def to_json(self) -> Json:
        """Lists and strings only."""
        if self.kind == "leaf":
            return 0
        return [self.kind, self.name, list(self.keys), [child.to_json() for child in self.children]]

    @staticmethod
    def from_json(data: Json) -> Tree:
        """The inverse of ``to_json``."""
        if data == 0:
            return LEAF
        kind, name, keys, children = data
        return Tree(kind, name, tuple(keys), tuple(Tree.from_json(child) for child in children))


LEAF = Tree("leaf")


def flatten(value: Any) -> tuple[list[Any], Tree]:
    """Leaves in order, and the shape."""
    leaves: list[Any] = []
    return leaves, _flatten(value, leaves)


def plain_leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The leaves of the arguments of a call where each is a plain tensor or a plain value; None for all others.

    The same as ``flatten((args, kwargs))[0]``, and many times faster.
    """
    leaves = [*args, *kwargs.values()]
    return None if any(type(leaf) not in _PLAIN for leaf in leaves) else leaves


_PLAIN = frozenset((torch.Tensor, bool, int, float, str, type(None)))


def leaves_of(value: Any) -> list[Any]:
    """The leaves alone."""
    return flatten(value)[0]


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with ``fn`` of each leaf; what is not a container comes back as ``fn`` leaves it."""
    leaves, tree = flatten(value)
    return tree.build([fn(leaf) for leaf in leaves])


def _flatten(value: Any, leaves: list[Any]) -> Tree:
    cls = type(value)
    if cls in _LEAVES or issubclass(cls, torch.Tensor):
        leaves.append(value)
        return LEAF
    if cls is tuple or cls is list:
        return Tree(cls.__name__, "", tuple(range(len(value))), tuple(_flatten(x, leaves) for x in value))
    if cls is Constant:
        return Tree("constant", value.text)
    parts = _open(value)
    if parts is None:
        leaves.append(value)
        return LEAF
    kind, keys, members = parts
    name = "" if kind in ("tuple", "list", "dict") else f"{type(value).__module__}:{type(value).__qualname__}"
    return Tree(kind, name, tuple(keys), tuple(_flatten(member, leaves) for member in members))


def _open(value: Any) -> tuple[str, Sequence[Any], Sequence[Any]] | None:
    """Kind, keys and members of a container; None for a leaf."""
    cls = type(value)
    if cls.__module__ == "torch.return_types":
        return "structseq", range(len(value)), value
    if isinstance(value, tuple):
        kind = "namedtuple" if hasattr(cls, "_fields") else "tuple"
        return kind, range(len(value)), value  # pyright: ignore
    if cls in _LISTS or (isinstance(value, list) and cls.__module__ == _OURS):
        return "list", range(len(value)), value
    if is_model_output(value):
        return "fields", list(value.keys()), list(value.values())  # pyright: ignore
    if cls in _DICTS or (isinstance(value, dict) and cls.__module__ == _OURS):
        return "dict", list(value), list(value.values())  # pyright: ignore
    if is_past(value):
        opened = members_of(value)
        return "object", list(opened), list(opened.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "__dict__", {})  # a config may refuse to give what it has in another form for each layer
        names = [f.name for f in dataclasses.fields(value)]
        members = {name: own[name] if name in own else getattr(value, name, None) for name in names}
        if any(isinstance(member, torch.Tensor) for member in members.values()):
            return "fields", list(members), list(members.values())
    return None


_LEAVES = frozenset(
    (torch.Tensor, type(None), bool, int, float, str, slice, type(...), torch.dtype)
)  # the most frequent
_LISTS = (list, immutable_list)  # arguments of fx nodes are immutable ones
_DICTS = (dict, OrderedDict, immutable_dict)
_OURS = "fxsight.containers"  # lists and dicts with ``.save()``


def is_model_output(value: Any) -> bool:
    """Whether it is a ``transformers.utils.ModelOutput`` (told by its bases' names: nothing is imported for it)."""
    return isinstance(value, OrderedDict) and any(c.__name__ == "ModelOutput" for c in type(value).__mro__)


def _build_fields(tree: Tree, members: list[Any]) -> Any:
    return find_class(tree.name)(**dict(zip(tree.keys, members, strict=True)))


_BUILDERS: dict[str, Callable[[Tree, list[Any]], Any]] = {
    "tuple": lambda tree, members: tuple(members),
    "list": lambda tree, members: members,
    "dict": lambda tree, members: dict(zip(tree.keys, members, strict=True)),
    "namedtuple": lambda tree, members: find_class(tree.name)(*members),
    "structseq": lambda tree, members: find_class(tree.name)(members),
    "fields": _build_fields,
    "object": lambda tree, members: build(find_class(tree.name), dict(zip(tree.keys, members, strict=True))),
    "constant": lambda tree, members: constant(tree.name),
}
