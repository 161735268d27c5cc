"""The programs of one module: captured once per signature, kept in memory and on disk, and what was compiled of them.

A signature is everything but sizes that can change what a forward does: the structure of the inputs, what is not a
tensor in them, dtypes and devices, the module's own settings, autocast. Within one signature programs are told apart by
the sizes they hold for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxsight.address import Address
from fxsight.capture import capture_all
from fxsight.context import open_trace
from fxsight.errors import InputError
from fxsight.intervention import Intervention
from fxsight.lower import Tier
from fxsight.passes.open_fused import open_above
from fxsight.passes.use_known import UseKnown
from fxsight.pipeline import demand_pipeline, pipeline_for
from fxsight.place import Places
from fxsight.program import Program
from fxsight.progress import Progress
from fxsight.run import Executable, weight_fetcher
from fxsight.sizes import bind_sizes
from fxsight.source import SourceReader
from fxsight.state import settings
from fxsight.store import Store
from fxsight.tree import flatten

KEPT = 256  # finished programs kept per model


class Captures:
    """All programs of one module, and the trace that is open on it."""

    def __init__(self, module: nn.Module, store: Store | None) -> None:
        self.module = module
        self.reader = SourceReader()
        self.lock = threading.RLock()  # while it is captured, a module has no weights of its own
        self.made = 0  # captures made here, neither found in memory nor on disk
        self.latest: Program | None = None  # the program asked for last: what browsing outside a trace shows
        self._store = store
        self._programs: dict[Any, list[Program]] = {}
        self._executables: OrderedDict[Any, Executable] = OrderedDict()
        self._places: dict[int, Places] = {}
        self._opened: dict[tuple[int, Address], tuple[Program, Program]] = {}

    @property
    def open(self) -> Any:
        """The trace on this model whose block is being written; None outside."""
        return open_trace(self)

    # -- programs ----------------------------------------------------------------------------------------------------

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, dict[str, int]]:
        """The program for these inputs, captured now if need be, and their named sizes.

        Raises: CaptureError; TraceError for inputs that are values of another trace.
        """
        with self.lock:
            return self._find(args, kwargs)

    def _find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, dict[str, int]]:
        leaves, tree = flatten((args, dict(kwargs)))
        key = (tree, tuple(map(_signature, leaves)), settings(self.module), _ambient())
        known = self._programs.setdefault(key, [])
        for program in known:
            try:
                sizes = bind_sizes(program, leaves)
            except InputError:
                continue
            self.latest = program
            return program, sizes
        loaded = self._load(key, leaves)
        known += [loaded] if loaded is not None else self._capture(key, args, kwargs)
        self.latest = known[-1]
        return self.latest, bind_sizes(self.latest, leaves)

    def _load(self, key: Any, leaves: Sequence[Any]) -> Program | None:
        if self._store is None:
            return None
        for program in self._store.programs(self.module, key):
            try:
                bind_sizes(program, leaves)
                return program
            except InputError:
                continue
        return None

    def _capture(self, key: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Program]:
        with Progress(f"capturing {type(self.module).__name__}") as progress:
            programs = capture_all(self.module, args, kwargs, self.reader, progress)
        self.made += 1
        for program in programs if self._store is not None else ():
            self._store.keep(self.module, key, program)  # type: ignore[union-attr]
        return programs

    # -- finished programs -------------------------------------------------------------------------------------------

    def executable(
        self,
        program: Program,
        asked: Intervention,
        constants: Sequence[torch.Tensor],
        tier: Tier,
        known: UseKnown | None = None,
    ) -> Executable:
        """The finished program of an intervention: woven, run through the pipeline and lowered once.

        Raises: CausalityError.
        """
        if known is not None:  # values of this very trace: nothing to keep
            return self._bound(pipeline_for(asked, known)(program), constants, tier, asked)
        key = (id(program), asked.key, tier)
        found = self._executables.get(key)
        if found is None:
            finished = pipeline_for(asked)(program)
            found = self._bound(finished, constants, tier, asked)
            self._executables[key] = found
            if len(self._executables) > KEPT:
                self._executables.popitem(last=False)
        self._executables.move_to_end(key)
        return found

    def _bound(
        self, program: Program, constants: Sequence[torch.Tensor], tier: Tier, asked: Intervention
    ) -> Executable:
        return Executable(program, self.module, constants, tier, dict(asked.sizes), self.lock)

    def opened(self, program: Program, address: Address) -> Program:
        """The program with what is fused above the address opened; remembered.

        Raises: UnknownAddress, NotExecuted.
        """
        key = (id(program), address.place)
        if key not in self._opened:
            self._opened[key] = (program, open_above(program, address, self.reader))
        return self._opened[key][1]

    def places(self, program: Program) -> Places:
        """The places of one of these programs."""
        found = self._places.get(id(program))
        if found is None:
            found = self._places[id(program)] = Places(program, self.reader)
        return found

    def demanded(
        self, program: Program, asked: Intervention, constants: Sequence[torch.Tensor], known: UseKnown | None
    ) -> Executable:
        """The program of an intervention that needs numbers at once; in-place calls still written as values."""
        return self._bound(demand_pipeline(asked, known)(program), constants, "eager", asked)

    def weight(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the module by name."""
        return weight_fetcher(self.module, name)()

    def weight_names(self) -> Mapping[int, str]:
        """Names of the module's parameters and buffers by ``id``."""
        with self.lock:
            pairs = self._weights()
        return {id(tensor): name for name, tensor in reversed(pairs)}

    def _weights(self) -> list[tuple[str, torch.Tensor]]:
        return [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.ndim, str(leaf.device))
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return (type(leaf).__name__, leaf)
    return (type(leaf).__name__, id(leaf))


def _ambient() -> tuple[Any, ...]:
    """What around a call changes what it does."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
