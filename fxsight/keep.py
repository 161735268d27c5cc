"""What one cache keeps: asked for anywhere in a block, read when the block ends, after all its edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxsight.address import Address
from fxsight.asked import fixed
from fxsight.book import Call, SizeRef, Weight
from fxsight.cache import ROOT, Cache, Entry, key_of
from fxsight.errors import TraceError, UnknownAddress, nearest
from fxsight.intervention import Save
from fxsight.node import Fixed
from fxsight.place import Location, Place
from fxsight.record import Recorder
from fxsight.rename import Aliases
from fxsight.rows import Rows, batch_sizes
from fxsight.tree import Tree
from fxsight.write import constant

WhyNot = Callable[[Address], str]  # why a call does not run; empty when it does


@dataclass(frozen=True)
class Asked:
    """The options of one ``tracer.cache(...)``.

    paths: of the modules; None for all.  ports: "output", "inputs" or both.  rows: of the invoke; None for all.
    line: where it was called.
    device, dtype: of the kept tensors (dtype of floating-point ones); None for what the model has there.
    """

    paths: frozenset[str] | None
    ports: tuple[str, ...]
    device: torch.device | None
    dtype: torch.dtype | None
    detach: bool
    rows: Rows | None
    line: str


@dataclass(frozen=True)
class Kept:
    """One port of one call: per leaf a node of the body's graph, or a plain value."""

    path: str
    call: int
    port: str
    tree: Tree
    leaves: tuple[Any, ...]


class Keeper:
    """Fills one cache.  module: the model's root, for the names of its modules.  weight: looks a weight up by name."""

    def __init__(self, cache: Cache, asked: Asked, module: nn.Module, weight: Callable[[str], torch.Tensor]) -> None:
        self._cache, self._asked, self._module, self._weight = cache, asked, module, weight
        self._kept: list[Kept] = []
        self._missing: dict[tuple[str, int], dict[str, str]] = {}

    # -- when the block ends -----------------------------------------------------------------------------------------

    def read(self, recorder: Recorder, why_not: WhyNot) -> Save:
        """Find the present value of everything that is asked for.  Returns: what the program is to keep."""
        program, rows = recorder.program, self._asked.rows
        recorder.rows = None if rows is None else replace(rows, sizes=batch_sizes(program, recorder.sizes))
        for (path, number), call in program.book.modules.items():
            if self._asked.paths is None or path in self._asked.paths:
                reason = why_not(Address(path, number))
                for port in self._asked.ports:
                    self._read(recorder, call, port, reason)
        recorder.rows = None
        keys = [(f"{key_of(k.path)}#{k.call}" if k.call else key_of(k.path), k) for k in self._kept]
        tree = Tree("dict", "", tuple(f"{key}:{k.port}" for key, k in keys), tuple(k.tree for k in self._kept))
        return Save(tree, tuple(_saved(leaf) for k in self._kept for leaf in k.leaves))

    def _read(self, recorder: Recorder, call: Call, port: str, reason: str) -> None:
        place = recorder.places.place(call)
        reason = reason or recorder.why_unreached(place.end if port == "output" else place.start)
        try:
            if not reason:
                found = self._leaves(recorder, place, port)
                self._kept.append(Kept(call.module, call.module_call, port, *found))
        except TraceError as error:  # the rows of an invoke are no dimension of their own there
            reason = f"has no value of its own: {error}"
        if reason:
            self._missing.setdefault((call.module, call.module_call), {})[port] = reason

    def _leaves(self, recorder: Recorder, place: Place, port: str) -> tuple[Tree, tuple[Any, ...]]:
        """The structure of a port and what is in it."""
        structure, locations = recorder.places.locations(place, port)
        leaves: list[Any] = []
        for leaf, location in zip(structure.leaves, locations, strict=True):
            if isinstance(leaf, SizeRef):  # a number now, so the program is one for these sizes
                recorder.body.looked |= set(recorder.sizes)
            if location is not None:
                leaves.append(self._node(recorder, location))
            else:
                leaves.append(leaf if isinstance(leaf, Weight) else constant(recorder, leaf))
        return structure.tree, tuple(leaves)

    def _node(self, recorder: Recorder, location: Location) -> fx.Node:
        """The present value at a location, on the device and of the dtype that are asked for."""
        if recorder.rows is None and self._asked.device is None and self._asked.dtype is None:
            return recorder.node_at(location, self._asked.line)
        value: torch.Tensor = recorder.read(location)
        if self._asked.device is not None and value.device != self._asked.device:
            value = value.to(self._asked.device)
        if self._asked.dtype is not None and value.is_floating_point() and value.dtype != self._asked.dtype:
            value = value.to(self._asked.dtype)
        return recorder.body.node_of(value)

    def void(self, why: str) -> None:
        """Its block does not run."""
        self._cache.void(f"it {why}")

    # -- when it has run ---------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[fx.Node]:
        """What the program computes for it, in order."""
        return [leaf for kept in self._kept for leaf in kept.leaves if isinstance(leaf, fx.Node)]

    def fill(self, tensors: Iterator[torch.Tensor]) -> None:
        """Put the computed tensors, those of ``nodes``, into the cache."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for kept in self._kept:
            leaves = [self._finished(leaf, tensors) for leaf in kept.leaves]
            found.setdefault((kept.path, kept.call), {})[kept.port] = kept.tree.build(leaves)
        entries: dict[str, list[Entry]] = {}
        for (path, number), ports in found.items():
            name = key_of(path) + (f"#{number}" if number else "")
            entries.setdefault(key_of(path), []).append(Entry(name, ports, self._missing.get((path, number), {})))
        names = [key_of(path) for path, _ in self._module.named_modules(remove_duplicate=False)]
        self._cache.fill(entries, names, self._absent(names))

    def _finished(self, leaf: Any, tensors: Iterator[torch.Tensor]) -> Any:
        if isinstance(leaf, Weight):  # a module that returns a weight: as it is now
            return self._weight(leaf.name).detach().clone()
        if not isinstance(leaf, fx.Node):
            return leaf
        tensor = next(tensors)
        return tensor.detach() if self._asked.detach and tensor.requires_grad else tensor

    def _absent(self, names: Sequence[str]) -> dict[str, str]:
        """Why modules have no entry."""
        absent: dict[str, str] = {}
        if self._asked.paths is not None:
            asked = {key_of(path) for path in self._asked.paths}
            absent = {name: "was not asked for (modules=...)" for name in names if name not in asked}
        return absent | {key_of(path): next(iter(why.values())) for (path, _), why in self._missing.items()}


def paths_of(modules: Any, root: nn.Module, aliases: Aliases) -> frozenset[str] | None:
    """The paths of the modules that a cache is asked for: views, paths, keys; None for all.

    Raises: UnknownAddress for a name that the model does not have; TraceError for what is none of its modules.
    """
    if modules is None:
        return None
    known = {key_of(path): part for path, part in root.named_modules(remove_duplicate=False)}
    single = isinstance(modules, str) or hasattr(modules, "address")
    return frozenset(_path_of(module, known, aliases) for module in ([modules] if single else modules))


def _path_of(module: Any, known: Mapping[str, nn.Module], aliases: Aliases) -> str:
    if isinstance(module, str):
        own = key_of(aliases.resolve(module.removeprefix(f"{ROOT}.")))
        key = next((k for k in (module, key_of(module), own) if k in known), None)
        if key is None:
            raise UnknownAddress(f"no module {module!r} in this model; {nearest(key_of(module), known) or ROOT}")
        return key.removeprefix(ROOT).removeprefix(".")
    address = getattr(module, "address", None)
    if not isinstance(address, Address) or address.steps:
        raise TraceError(f"a cache keeps modules, given as views or paths, and {module!r} is none")
    if known.get(key_of(address.module)) is not getattr(module, "_module", None):
        raise TraceError(f"{address} is a module of another model")
    return address.module


def _saved(leaf: Any) -> str | Fixed:
    return leaf.name if isinstance(leaf, fx.Node) else fixed(leaf)
