"""The programs of one module: captured once per signature, kept in memory and on disk, and what was compiled of them.

A signature is everything but sizes that can change what a forward does: the structure of the inputs, what is not a
tensor in them, dtypes and devices, the module's own settings, autocast. Within one signature programs are told apart by
the sizes they hold for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fxsight.address import Address
from fxsight.artifacts import Artifacts
from fxsight.capture import capture_all
from fxsight.errors import InputError, TraceError
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


class Open(Protocol):
    """A trace whose block is being written."""


class Captures:
    """All programs of one module, and the trace that is open on it."""

    def __init__(self, module: nn.Module, store: Store | None, artifacts: Artifacts | None = None) -> None:
        self.module = module
        self.reader = SourceReader()
        self.open: Any = None
        self.made = 0  # captures made here, neither found in memory nor on disk
        self.latest: Program | None = None  # the program asked for last: what browsing outside a trace shows
        self.artifacts = artifacts or Artifacts()  # compiled regions, for all programs of the module
        self._store = store
        self._programs: dict[Any, list[Program]] = {}
        self._executables: OrderedDict[Any, Executable] = OrderedDict()
        self._places: dict[int, Places] = {}
        self._opened: dict[tuple[int, Address], tuple[Program, Program]] = {}

    # -- the open trace ----------------------------------------------------------------------------------------------

    def enter(self, trace: Open) -> None:
        """A block begins.

        Raises: TraceError inside another block on the same model.
        """
        if self.open is not None:
            raise TraceError("a trace inside a trace of the same model: end the first block, or use model.session()")
        self.open = trace

    def leave(self, trace: Open) -> None:
        """A block ends."""
        self.open = None

    # -- programs ----------------------------------------------------------------------------------------------------

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, dict[str, int]]:
        """The program for these inputs, captured now if need be, and their named sizes.

        Raises: CaptureError; TraceError for inputs that are values of another trace.
        """
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
            return self._executable(pipeline_for(asked, known)(program), asked, constants, tier)
        key = (id(program), asked.key, tier)
        found = self._executables.get(key)
        if found is None:
            found = self._executable(pipeline_for(asked)(program), asked, constants, tier)
            self._executables[key] = found
            if len(self._executables) > KEPT:
                self._executables.popitem(last=False)
        self._executables.move_to_end(key)
        return found

    def _executable(
        self, finished: Program, asked: Intervention, constants: Sequence[torch.Tensor], tier: Tier
    ) -> Executable:
        return Executable(finished, self.module, constants, tier, dict(asked.sizes), self.artifacts)

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

    def demanded(self, program: Program, asked: Intervention, known: UseKnown | None) -> Program:
        """The program of an intervention that needs numbers at once; in-place calls still written as values."""
        return demand_pipeline(asked, known)(program)

    def weight(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the module by name."""
        return weight_fetcher(self.module, name)()

    def weight_names(self) -> Mapping[int, str]:
        """Names of the module's parameters and buffers by ``id``."""
        pairs = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        return {id(tensor): name for name, tensor in reversed(pairs)}


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.ndim, str(leaf.device))
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return (type(leaf).__name__, leaf)
    return (type(leaf).__name__, id(leaf))


def _ambient() -> tuple[Any, ...]:
    """What around a call changes what it does."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
