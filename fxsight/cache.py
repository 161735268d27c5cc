"""``Cache``: what ``tracer.cache()`` has kept, by module: plain tensors, in the structures of the model.

    with model.trace(x) as tracer:
        cache = tracer.cache()
    cache["model.transformer.h.0"].output         # the same as cache["transformer.h.0"].output
    cache.model.transformer.h[0].output           # and so is this
    cache["model.cell"][2].output                 # of a module called several times: a list, one for each call

It is filled when its block ends, and is nothing but data: it can be pickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxsight.errors import NotCached, TraceError, nearest
from fxsight.rename import Aliases
from fxsight.spec import TensorSpec
from fxsight.tree import map_leaves

ROOT = "model"


def key_of(path: str) -> str:
    """The key of a module: its path in ``named_modules`` with ``model`` before it."""
    return f"{ROOT}.{path}" if path else ROOT


@dataclass(frozen=True, eq=False)
class Entry:
    """What one call of a module took and gave.

    name: the key, with ``#n`` for later calls.  kept: ``output`` and ``inputs``, as far as they were asked for.
    missing: why one of them is not there.
    """

    name: str
    kept: Mapping[str, Any] = field(repr=False)
    missing: Mapping[str, str] = field(repr=False, default_factory=dict[str, str])

    @property
    def output(self) -> Any:
        """What the module returned."""
        return self._port("output", "include_output=True")

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All its arguments: ``(args, kwargs)``."""
        found: tuple[tuple[Any, ...], dict[str, Any]] = self._port("inputs", "include_inputs=True")
        return found

    @property
    def input(self) -> Any:
        """Its first argument; None for a call without."""
        args, kwargs = self.inputs
        return next(iter((*args, *kwargs.values())), None)

    def _port(self, port: str, option: str) -> Any:
        if port not in self.kept:
            why = self.missing.get(port, f"is not kept: write tracer.cache({option})")
            raise NotCached(f"{self.name}:{port} {why}")
        return self.kept[port]

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{port} {map_leaves(_shown, value)}" for port, value in self.kept.items())


def _shown(leaf: Any) -> Any:
    return TensorSpec(leaf.dtype, tuple(leaf.shape), ()) if isinstance(leaf, torch.Tensor) else leaf


class Cache(Mapping[str, Any]):
    """The values of many modules, kept in one trace: see ``Tracer.cache``.

    ``cache[key]`` is an ``Entry``, or a list of them where the module was called several times; ``key#n`` is one of
    these. Keys are in the order of the calls. ``cache.model`` leads to the same entries along the names of modules.

    Raises: NotCached, which is a KeyError, AttributeError and IndexError, for what is not there, saying why;
    TraceError before the end of the block.
    """

    def __init__(self, aliases: Aliases | None = None) -> None:
        self._aliases = Aliases(table=(aliases or Aliases()).table)
        self._entries: dict[str, tuple[Entry, ...]] = {}
        self._names: dict[str, None] = {}  # the keys of all modules of the model, in order
        self._absent: dict[str, str] = {}
        self._steps: dict[int, Cache] = {}
        self._waits = "it is filled when its block ends (in a session, when that ends); inside it, read .output itself"

    def fill(self, entries: Mapping[str, Sequence[Entry]], names: Sequence[str], absent: Mapping[str, str]) -> None:
        """The block has run.  names: the keys of all modules of the model.  absent: why some are not there."""
        self._entries = {key: tuple(calls) for key, calls in entries.items()}
        self._names, self._absent, self._waits = dict.fromkeys(names), dict(absent), ""

    def join(self, steps: Mapping[int, Cache]) -> None:
        """The generation has run: it has what the caches of its steps have, in their order."""
        filled = {number: cache for number, cache in steps.items() if not cache._waits}
        if not filled:
            self.void(next(iter(steps.values()))._waits)
            return
        found: dict[str, list[Entry]] = {}
        for cache in filled.values():
            for key, calls in cache._entries.items():
                found.setdefault(key, []).extend(calls)
        entries = {
            key: [replace(entry, name=f"{key}#{n}" if n else key) for n, entry in enumerate(calls)]
            for key, calls in found.items()
        }
        last = filled[max(filled)]
        absent = {key: why for key, why in last._absent.items() if key not in entries}
        self.fill(entries, tuple(last._names), absent)
        self._steps = dict(steps)

    def step(self, number: int) -> Cache:
        """Of a generation, what is kept of one step; -1 is the encoder, which runs before the steps.

        Raises: NotCached for another step.
        """
        self._filled  # noqa: B018 - raises before the end of the block
        if number not in self._steps:
            known = ", ".join(map(str, self._steps)) or "no steps: it is not of a generation"
            raise NotCached(f"no step {number} in this cache; it has {known}")
        return self._steps[number]

    def void(self, why: str) -> None:
        """It will never be filled."""
        self._waits = why

    @property
    def _filled(self) -> dict[str, tuple[Entry, ...]]:
        if self._waits:
            raise TraceError(f"this cache has no values: {self._waits}")
        return self._entries

    def __getitem__(self, key: str) -> Any:
        calls = self.calls(key)
        if "#" in key:
            return calls[0]
        return calls[0] if len(calls) == 1 else list(calls)

    def calls(self, key: str) -> tuple[Entry, ...]:
        """One entry for each call of a module; of ``key#n`` one alone."""
        name, _, number = key.partition("#")
        calls = next((self._filled[k] for k in (name, key_of(name), self._own(name)) if k in self._filled), None)
        if calls is None:
            raise NotCached(self._why_absent(name))
        if not number:
            return calls
        if not number.isdecimal() or int(number) >= len(calls):
            raise NotCached(f"no call {number} of {name} in this cache: it was called {_times(len(calls))}")
        return (calls[int(number)],)

    def _own(self, key: str) -> str:
        """The key with the model's own names for aliases."""
        return key_of(self._aliases.resolve(key.removeprefix(ROOT).removeprefix(".")))

    def _why_absent(self, name: str) -> str:
        key = next((k for k in (name, key_of(name), self._own(name)) if k in self._names), None)
        if key is None:
            known = [*self._filled, *(k.removeprefix(f"{ROOT}.") for k in self._filled)]
            return f"no module {name!r} in this cache; {nearest(name, known) or 'see cache.keys()'}"
        return f"{name} is not in this cache: it {self._absent.get(key, 'is not called in this forward')}"

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and bool(self.calls(key))
        except NotCached:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._filled)

    def __len__(self) -> int:
        return len(self._filled)

    def __getattr__(self, name: str) -> CachedModule:
        if name.startswith("_"):
            raise AttributeError(name)
        root = self.module(ROOT)
        return root if name == ROOT else getattr(root, name)

    def module(self, key: str) -> CachedModule:
        """A module of the model by its key, whether or not it has an entry.

        Raises: NotCached where the model has no such module.
        """
        self._filled  # noqa: B018 - raises before the end of the block
        if key not in self._names and self._own(key) in self._names:
            key = self._own(key)
        if key not in self._names:
            parent, _, name = key.rpartition(".")
            known = [k.rpartition(".")[2] for k in self.children(parent)]
            hint = nearest(name, known) or f"it has {', '.join(known) or 'no children'}"
            raise NotCached(f"{parent} has no module {name!r}; {hint}")
        return CachedModule(self, key)

    def children(self, key: str) -> list[str]:
        """The keys of the children of a module, in order."""
        return [k for k in self._names if k.rpartition(".")[0] == key]

    def __repr__(self) -> str:
        return f"<Cache: {self._waits}>" if self._waits else f"<Cache of {len(self)} modules: {', '.join(self)}>"


class CachedModule:
    """One module of a cache: ``.output``, ``.inputs``, ``.input``, and its children by name and number.

    A text in brackets is always a child: ``cache.model.encoder["output"]``.
    """

    def __init__(self, cache: Cache, key: str) -> None:
        self._cache, self._key = cache, key

    @property
    def entry(self) -> Entry:
        """Its one call.

        Raises: NotCached when there is none, or several.
        """
        calls = self._cache.calls(self._key)
        if len(calls) > 1:
            raise NotCached(f"{self._key} was called {_times(len(calls))}: write .call(n), or cache[{self._key!r}][n]")
        return calls[0]  # pyright: ignore

    def call(self, n: int) -> Entry:
        """Its call number ``n`` (0 is the first)."""
        return self._cache.calls(f"{self._key}#{n}")[0]

    @property
    def output(self) -> Any:
        """What the module returned."""
        return self.entry.output

    @property
    def inputs(self) -> Any:
        """All its arguments: ``(args, kwargs)``."""
        return self.entry.inputs

    @property
    def input(self) -> Any:
        """Its first argument."""
        return self.entry.input

    def __getattr__(self, name: str) -> CachedModule:
        if name.startswith("_"):
            raise AttributeError(name)
        own = getattr(type(self), name, None)
        if isinstance(own, property) and own.fget is not None:  # it raised NotCached, an AttributeError: raise it again
            return own.fget(self)  # type: ignore[no-any-return]
        return self._cache.module(f"{self._key}.{name}")

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return self._cache.module(f"{self._key}.{key}")
        children = self._cache.children(self._key)
        if isinstance(key, slice):
            return [CachedModule(self._cache, child) for child in children[key]]
        if not -len(children) <= key < len(children):
            raise NotCached(f"{self._key} has {len(children)} modules; there is no {key}")
        return CachedModule(self._cache, children[key])

    def __len__(self) -> int:
        return len(self._cache.children(self._key))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[CachedModule]:
        return iter(self[:])

    def __dir__(self) -> list[str]:
        names = [key.rpartition(".")[2] for key in self._cache.children(self._key)]
        return sorted({*object.__dir__(self), *names})

    def __repr__(self) -> str:
        calls = self._cache.calls(self._key) if self._key in self._cache else ()
        return "\n".join(map(str, calls)) or f"{self._key}: not in this cache"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
