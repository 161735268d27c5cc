"""Further names for modules: ``Model(net, rename={"transformer.h": "layers", "mlp": ["ff", "mlp2"]})``.

The names a model was written with stay: an alias is one more way to the same module, at the same address.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from fxsight.errors import RenameError, nearest

Key = str | type[nn.Module]
Rename = Mapping[Key, str | Sequence[str]]
Words = Callable[[str, nn.Module], Collection[str]]  # the words that the view of a module has, by its path


@dataclass(frozen=True)
class Aliases:
    """The aliases of one model: per module path, alias and way to the module it names.

    rename: as the user gave it.

        "mlp"                 every module of that name, beside it
        "transformer.h"       one module by its path, on the model itself; ".lm_head" for a child of the model
        "transformer.h.*.mlp" modules by their path, beside them; ``*`` is any text without a dot
        nn.LayerNorm          every module of that class, beside it
    """

    rename: Rename = field(default_factory=dict[Key, str | Sequence[str]])
    table: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])

    @staticmethod
    def of(root: nn.Module, rename: Rename, words: Words, strict: bool = True) -> Aliases:
        """The aliases of a model.  strict: whether each key has to name a module.

        Raises: RenameError for a key that names no module, and for a name that is taken.
        """
        paths = dict(root.named_modules(remove_duplicate=False))
        table: dict[str, dict[str, str]] = {}
        for key, given in rename.items():
            found = list(_matches(key, paths))
            if not found and strict:
                raise RenameError(_nothing(key, paths))
            for alias in [given] if isinstance(given, str) else given:
                name = _checked(alias, key)
                for owner, target in found:
                    _put(table.setdefault(owner, {}), name, target, owner, paths[owner], words)
        return Aliases(dict(rename), table)

    def below(self, path: str) -> Mapping[str, str]:
        """The aliases that the module at a path has for modules below it: alias, and way from there."""
        return self.table.get(path, {})

    def of_child(self, path: str, name: str) -> list[str]:
        """The aliases of one child of the module at a path."""
        return [alias for alias, target in self.below(path).items() if target == name]

    def resolve(self, path: str) -> str:
        """The path with every alias on the way replaced by the name it stands for."""
        found = ""
        for part in path.split(".") if path else ():
            step = self.below(found).get(part, part)
            found = f"{found}.{step}" if found else step
        return found


def _matches(key: Key, paths: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Where the alias stands, and the way to the module from there."""
    if not isinstance(key, str):
        for path, module in paths.items():
            if path and isinstance(module, key):
                yield _split(path)
        return
    wanted = key.removeprefix(".").split(".")
    if len(wanted) == 1 and not key.startswith("."):
        yield from (_split(path) for path in paths if path and fnmatch.fnmatchcase(_split(path)[1], key))
        return
    for path in paths:
        parts = path.split(".")
        if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
            yield _split(path) if "*" in key else ("", path)


def _split(path: str) -> tuple[str, str]:
    owner, _, name = path.rpartition(".")
    return owner, name


def _checked(alias: str, key: Key) -> str:
    name = alias.removeprefix(".")
    if not name.isidentifier():
        raise RenameError(f"rename: {alias!r}, for {_shown(key)}, is not a name; give one word, such as 'layers'")
    return name


def _put(table: dict[str, str], alias: str, target: str, owner: str, module: nn.Module, words: Words) -> None:
    place = owner or "the model"
    if table.get(alias, target) != target:
        raise RenameError(f"rename: {alias!r} would name both {table[alias]!r} and {target!r} of {place}")
    if alias in words(owner, module):
        raise RenameError(f"rename: {alias!r}, for {target!r} of {place}, is a word that every view has")
    if hasattr(module, alias):
        kind = "a module" if alias in dict(module.named_children()) else "an attribute"
        raise RenameError(f"rename: {alias!r}, for {target!r} of {place}, is {kind} of it already")
    table[alias] = target


def _nothing(key: Key, paths: Mapping[str, nn.Module]) -> str:
    if not isinstance(key, str):
        classes = {type(module).__name__ for module in paths.values()}
        hint = nearest(key.__name__, classes) or f"there are {', '.join(sorted(classes))}"
        return f"rename: no module is a {key.__name__}; {hint}"
    plain = key.removeprefix(".")
    dotted = plain != key or "." in plain
    known = [path for path in paths if path] if dotted else list({_split(path)[1]: None for path in paths if path})
    hint = nearest(plain, known) or f"there are {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    return f"rename: no module {'at' if dotted else 'is called'} {key!r}; {hint}"


def _shown(key: Key) -> str:
    return repr(key) if isinstance(key, str) else key.__name__
