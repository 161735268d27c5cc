"""The programs of one module: captured once per signature, kept in memory and on disk, and what was compiled of them.

A signature is everything but sizes that can change what a call does: the method, the structure of the inputs, what is
not a tensor in them, dtypes and devices, the module's own settings, autocast. Within one signature programs are told
apart by the sizes they hold for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fxsight.address import Address
from fxsight.attached import AttachedCalls
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
from fxsight.run import Executable, Weights
from fxsight.sizes import bind_sizes
from fxsight.source import SourceReader
from fxsight.state import settings
from fxsight.store import Store
from fxsight.tree import Tree, flatten

KEPT = 256  # finished programs kept per model


class Open(Protocol):
    """A trace whose block is being written."""


@dataclass
class Now:
    """What is true of a model at this moment: the trace that is open on it, and how many captures were made here."""

    open: Any = None
    made: int = 0


class Captures:
    """All programs of one module, called by one of its methods, and the trace that is open on it."""

    def __init__(self, module: nn.Module, store: Store | None) -> None:
        self.module = module
        self.method = "forward"
        self.reader = SourceReader()
        self.latest: Program | None = None  # the program asked for last: what browsing outside a trace shows
        self.attached_calls = AttachedCalls()
        self._now = Now()
        self._store = store
        self._unseen: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # attached, unknown to every program
        self._programs: dict[Any, list[Program]] = {}
        self._executables: OrderedDict[Any, Executable] = OrderedDict()
        self._places: dict[int, Places] = {}
        self._opened: dict[tuple[int, Address], tuple[Program, Program]] = {}

    def of(self, method: str) -> Captures:
        """Those of another method of the module; kept in the same tables, under other keys."""
        other = copy.copy(self)
        other.method, other.latest = method, None
        return other

    @property
    def open(self) -> Any:
        """The trace whose block is being written, by whatever method; or None."""
        return self._now.open

    @property
    def made(self) -> int:
        """Captures made here, found neither in memory nor on disk."""
        return self._now.made

    # -- the open trace ----------------------------------------------------------------------------------------------

    def enter(self, trace: Open) -> None:
        """A block begins.

        Raises: TraceError inside another block on the same model.
        """
        if self.open is not None:
            raise TraceError("a trace inside a trace of the same model: end the first block, or use model.session()")
        self._now.open = trace

    def leave(self, trace: Open) -> None:
        """A block ends."""
        self._now.open = None
        self.attached_calls.forget(trace)

    # -- programs ----------------------------------------------------------------------------------------------------

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, dict[str, int]]:
        """The program for these inputs, captured now if need be, and their named sizes.

        Raises: CaptureError; TraceError for inputs that are values of another trace.
        """
        leaves, tree = flatten((args, dict(kwargs)))
        key = self._key(tree, leaves)
        known = self._programs.setdefault(key, [])
        for program in known:
            try:
                sizes = bind_sizes(program, leaves)
            except InputError:
                continue
            self.latest = program
            return program, sizes
        loaded = self._load(key, leaves)
        found = [loaded] if loaded is not None else self._capture(key, args, kwargs)
        if self._shows_unseen(found):
            known = self._programs.setdefault(self._key(tree, leaves), [])
        known += found
        self.latest = known[-1]
        return self.latest, bind_sizes(self.latest, leaves)

    def _key(self, tree: Tree, leaves: Sequence[Any]) -> Any:
        """All that can change what the call does, but sizes."""
        return (tree, tuple(map(_signature, leaves)), settings(self.module, self._unseen), _ambient(self.method))

    def attach(self, parent: nn.Module, name: str, before: nn.Module | None) -> None:
        """A module has become a child: programs that cannot know of it stay.  before: the child it replaces."""
        programs = [program for known in self._programs.values() for program in known]
        is_new = before is None or before in self._unseen
        if programs and is_new and not any(program.book.may_see(parent, name) for program in programs):
            self._unseen[parent._modules[name]] = name  # type: ignore[index]

    def _shows_unseen(self, programs: Sequence[Program]) -> bool:
        """Whether new programs know of attached modules that the earlier ones did not; if so these count from now."""
        shown = [m for m, name in self._unseen.items() if any(p.book.may_see(None, name) for p in programs)]
        for module in shown:
            del self._unseen[module]
        return bool(shown)

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
            programs = capture_all(self.module, args, kwargs, self.reader, progress, self.method)
        self._now.made += 1
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
            return Executable(pipeline_for(asked, known)(program), self.module, constants, tier, dict(asked.sizes))
        key = (id(program), asked.key, tier)
        found = self._executables.get(key)
        if found is None:
            finished = pipeline_for(asked)(program)
            found = Executable(finished, self.module, constants, tier, dict(asked.sizes))
            self._executables[key] = found
            if len(self._executables) > KEPT:
                self._executables.popitem(last=False)
        self._executables.move_to_end(key)
        return found

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
        return Weights(self.module, [name])()[0]

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


def _ambient(method: str) -> tuple[Any, ...]:
    """What beside inputs and module changes what a call does."""
    casts = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    return casts if method == "forward" else (("method", method), *casts)
