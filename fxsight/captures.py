"""The programs of one module: captured once per signature, kept in memory and on disk, and what was compiled of them.

A signature is everything but sizes that can change what a call does: the method, the structure of the inputs, what is
not a tensor in them, dtypes and devices, how those of floating-point numbers lie in memory, the module's own settings,
autocast. Within one signature programs are told apart by the sizes they hold for.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fxsight.address import Address
from fxsight.artifacts import Artifacts
from fxsight.attached import AttachedCalls
from fxsight.auto import Auto, Backend, Tier
from fxsight.background import Workers
from fxsight.bits import Known, narrowing
from fxsight.capture import capture_all
from fxsight.collector import waiting
from fxsight.context import open_trace
from fxsight.errors import InputError
from fxsight.fewer import Fewer
from fxsight.intervention import Intervention
from fxsight.known import Step
from fxsight.narrowed import Narrowed
from fxsight.passes.joint_gradient import JointGradient
from fxsight.passes.open_fused import open_above, open_place
from fxsight.passes.use_known import UseKnown
from fxsight.past import Count, pasts_in
from fxsight.pipeline import LESS, demand_pipeline, joint_for, pipeline_for, woven_pass
from fxsight.place import Places
from fxsight.program import Program
from fxsight.progress import Progress
from fxsight.refit import check_writes
from fxsight.rename import Aliases
from fxsight.run import Executable, Weights
from fxsight.served import Served
from fxsight.sizes import bind_sizes, holds
from fxsight.source import SourceReader
from fxsight.state import settings
from fxsight.store import Store
from fxsight.tree import Tree, flatten
from fxsight.watch import Watch, kinds

KEPT = 256  # finished programs kept per model


@dataclass(eq=False)
class Found:
    """The program for some inputs, their sizes, and the ways that bodies have gone in it, by the line they begin at."""

    program: Program
    sizes: dict[str, int]
    watch: Watch
    roots: dict[Any, Step] = field(default_factory=dict[Any, Step])

    def root(self, line: str, backend: Backend, differentiates: bool) -> Step:
        """Where a body begins that begins at a line and is run by a backend, with gradients enabled or not."""
        return self.roots.setdefault((line, backend, differentiates), Step())


@dataclass
class Now:
    """What all methods of a model share.

    made: captures made here.  aliases: further names of its modules.  narrow: whether rows that nobody reads are left
    out.
    """

    made: int = 0
    narrow: bool = True
    aliases: Aliases = field(default_factory=Aliases)


class Captures:
    """All programs of one module, called by one of its methods, and the trace that is open on it."""

    def __init__(
        self,
        module: nn.Module,
        store: Store | None,
        artifacts: Artifacts | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.module = module
        self.method = "forward"
        self.reader = SourceReader()
        self.lock = threading.RLock()  # while it is captured, a module has no weights of its own
        self.latest: Program | None = None  # the program asked for last: what browsing outside a trace shows
        self.latest_sizes: dict[str, int] = {}  # of the inputs it was asked for with
        self.artifacts = artifacts or Artifacts()  # compiled regions, for all programs of the module
        self.workers = workers  # compile in the background; None: nothing is compiled there
        self.attached_calls = AttachedCalls()
        self.shared = Now()
        self.told: dict[Any, Any] = {}  # the warnings that are given once for each line
        self.plans: OrderedDict[Any, Any] = OrderedDict()  # of traces that have run together
        self._store = store
        self._unseen: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # attached, unknown to every program
        self._programs: dict[Any, list[Program]] = {}
        self._executables: OrderedDict[Any, Executable] = OrderedDict()
        self._served = Served(KEPT)
        self.tried: Known = {}  # operators on fewer rows and columns: whether the bits are the same
        self._places: dict[int, Places] = {}
        self._watch: Watch | None = None
        self._found: dict[Any, Found] = {}
        self._opened: dict[tuple[int, Address], tuple[Program, Program]] = {}
        self._inside: dict[tuple[int, Address], tuple[Program, Program]] = {}

    def of(self, method: str) -> Captures:
        """Those of another method of the module, or of a part by its path; in the same tables, under other keys."""
        other = copy.copy(self)
        other.method, other.latest, other._found = method, None, {}
        return other

    @property
    def open(self) -> Any:
        """The trace whose block is being written, by whatever method; or None."""
        return open_trace(self.shared)

    @property
    def made(self) -> int:
        """Captures made here, found neither in memory nor on disk."""
        return self.shared.made

    # -- programs ----------------------------------------------------------------------------------------------------

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, dict[str, int]]:
        """The program for these inputs, captured now if need be, and their named sizes.

        Raises: CaptureError; TraceError for inputs that are values of another trace.
        """
        with self.lock:
            return self._find(args, kwargs)

    def _find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Program, dict[str, int]]:
        leaves, tree = flatten((args, dict(kwargs)))
        by_layout = not any(pasts_in((args, kwargs)))
        key = self._key(tree, leaves, by_layout)
        known = self._programs.setdefault(key, [])
        for program in known:
            try:
                sizes = bind_sizes(program, leaves)
            except InputError:
                continue
            self.latest, self.latest_sizes = program, sizes
            return program, sizes
        with waiting():
            loaded = self._load(key, leaves)
            found = [loaded] if loaded is not None else self._capture(key, args, kwargs)
        if self._shows_unseen(found):
            known = self._programs.setdefault(self._key(tree, leaves, by_layout), [])
        known += found
        self.latest = known[-1]
        self.latest_sizes = bind_sizes(self.latest, leaves)
        return self.latest, self.latest_sizes

    def _key(self, tree: Tree, leaves: Sequence[Any], by_layout: bool) -> Any:
        """All that can change what the call does, but sizes.

        by_layout: whether how inputs lie in memory counts; tensors of a cache lie in another way at each call.
        """
        signatures = tuple((*_signature(leaf), *(_layout(leaf) if by_layout else ())) for leaf in leaves)
        return (tree, signatures, settings(self.module, self._unseen), _ambient(self.method))

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
        self.shared.made += 1
        for program in programs if self._store is not None else ():
            self._store.keep(self.module, key, program)  # type: ignore[union-attr]
        return programs

    def quick(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Found:
        """The same as ``find``, in microseconds where nothing has changed since the last time.

        Raises: as ``find``.
        """
        with self.lock:
            return self._quick(args, kwargs)

    def _quick(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Found:
        leaves = [*args, *kwargs.values()]
        same = kinds(leaves)
        if same is None:
            return Found(*self.find(args, kwargs), self.watched())
        key = (len(args), tuple(kwargs), same, _ambient(self.method))
        watch = self.watched()
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = Found(*self.find(args, kwargs), watch)
        self.latest, self.latest_sizes = found.program, found.sizes
        return found

    def watched(self) -> Watch:
        """The module as it is now; what was found before a change is forgotten."""
        if self._watch is None or not self._watch.same():
            self._watch = Watch(self.module)
            self._found.clear()
        return self._watch

    # -- finished programs -------------------------------------------------------------------------------------------

    def executable(
        self,
        program: Program,
        asked: Intervention,
        constants: Sequence[torch.Tensor],
        backend: Backend,
        sizes: Mapping[str, int],
        known: UseKnown | None = None,
    ) -> Executable:
        """The finished program of an intervention: woven, run through the pipeline and lowered once.

        sizes: of the inputs. One that has gradients is made again for sizes that it does not hold for.

        Raises: CausalityError; with gradients TraceError and RuntimeError.
        """
        joint = joint_for(asked, sizes)
        if known is not None and joint is None:  # values of this very trace: nothing to keep
            return self._executable(pipeline_for(asked, known)(program), asked, constants, backend)
        key = (id(program), asked.key, backend, 0)
        while key in self._executables and joint is not None and not holds(self._executables[key].program, sizes):
            key = (*key[:3], key[3] + 1)
        found = self._executables.get(key)
        if found is None:

            def finish(wanted: Intervention) -> Executable:
                if joint is not None and backend != "inductor":
                    return self._with_gradients(program, wanted, constants, joint)
                narrow = LESS if backend == "inductor" else None
                finished = pipeline_for(wanted, joint=joint, narrow=narrow)(program)
                if backend == "auto":
                    return self._automatic(program, finished, wanted, constants, sizes)
                fewer = self._fewer(finished, wanted, sizes) if backend == "eager" else None
                return self._executable(finished, wanted, constants, backend, fewer=fewer)

            def make(wanted: Intervention) -> Executable:
                return finish(wanted).checking(partial(check_writes, wanted, program, self.places(program).rules))

            with waiting():
                found = self._served.find((id(program), backend), asked, make) if joint is None else make(asked)
            self._executables[key] = found
            if len(self._executables) > KEPT:
                self._executables.popitem(last=False)
        self._executables.move_to_end(key)
        return found

    def _automatic(
        self,
        program: Program,
        finished: Program,
        asked: Intervention,
        constants: Sequence[torch.Tensor],
        sizes: Mapping[str, int],
    ) -> Executable:
        """What runs op by op, and compiled when that pays."""
        auto = Auto(
            finished,
            dict(asked.sizes),
            self.artifacts,
            self.workers,
            lambda: pipeline_for(asked, narrow=LESS)(program),
        )
        return self._executable(
            finished, asked, constants, "auto", fewer=self._fewer(finished, asked, sizes), auto=auto
        )

    def _with_gradients(
        self, program: Program, asked: Intervention, constants: Sequence[torch.Tensor], joint: JointGradient
    ) -> Executable:
        """Bit for bit, and only what is read: tried for the present sizes, and again for others."""

        def whole(sizes: Mapping[str, int]) -> Executable:
            finished = pipeline_for(asked, joint=joint_for(asked, sizes))(program)
            return self._executable(finished, asked, constants, "eager")

        woven = woven_pass(asked)(program)
        narrow = narrowing(woven, joint.sizes, self.weight, self.tried) if self.shared.narrow else None
        if narrow is None:
            return whole(joint.sizes)
        finished = pipeline_for(asked, joint=joint, narrow=narrow)(program)
        narrowed = Narrowed(woven, narrow, joint.sizes, partial(bind_sizes, program), self.weight, whole, self.tried)
        return self._executable(finished, asked, constants, "eager", narrowed=narrowed)

    def _fewer(self, finished: Program, asked: Intervention, sizes: Mapping[str, int]) -> Fewer | None:
        """How a finished program without gradients computes what is read op by op, from its second run on."""
        if not self.shared.narrow:
            return None

        def make(program: Program) -> Executable:
            return self._executable(program, asked, [], "eager")

        return Fewer(finished, sizes, partial(bind_sizes, finished), self.weight, make, self.tried)

    def _executable(
        self,
        finished: Program,
        asked: Intervention,
        constants: Sequence[torch.Tensor],
        backend: Backend,
        keeps: bool = True,
        narrowed: Narrowed | None = None,
        fewer: Fewer | None = None,
        auto: Auto | None = None,
    ) -> Executable:
        tier: Tier = "inductor" if backend == "inductor" else "eager"
        fixed, is_joint, module = dict(asked.sizes), bool(asked.backwards), self.module
        return Executable(
            finished, module, constants, tier, fixed, self.artifacts, self.lock, is_joint, keeps, narrowed, fewer, auto
        )

    def opened(self, program: Program, address: Address) -> Program:
        """The program with what is fused above the address opened; remembered.

        Raises: UnknownAddress, NotExecuted.
        """
        key = (id(program), address.place)
        if key not in self._opened:
            self._opened[key] = (program, open_above(program, address, self.reader, self._open_place))
        return self._opened[key][1]

    def _open_place(self, program: Program, address: Address, reader: SourceReader) -> Program:
        """One operator opened, for all addresses inside of it."""
        key = (id(program), address.place)
        if key not in self._inside:
            self._inside[key] = (program, open_place(program, address, reader))
        return self._inside[key][1]

    def places(self, program: Program) -> Places:
        """The places of one of these programs."""
        found = self._places.get(id(program))
        if found is None:
            found = self._places[id(program)] = Places(program, self.reader)
        return found

    def demanded(
        self,
        program: Program,
        asked: Intervention,
        constants: Sequence[torch.Tensor],
        sizes: Mapping[str, int],
        known: UseKnown | None,
    ) -> Executable:
        """The program of an intervention that needs numbers at once; in-place calls still written as values.

        Gradients flow through no known value: with them all is computed again.
        """
        joint = joint_for(asked, sizes)
        finished = demand_pipeline(asked, known if joint is None else None, joint)(program)
        return self._executable(finished, asked, constants, "eager", False)

    def weight(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the module by name."""
        return Weights(self.module, [name])()[0]

    def weight_names(self) -> Mapping[int, str]:
        """Names of the module's parameters and buffers by ``id``."""
        with self.lock:
            return self.watched().names


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.ndim, str(leaf.device))
    if type(leaf) is Count:
        return ("Count",)
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return (type(leaf).__name__, leaf)
    return (type(leaf).__name__, id(leaf))


def _layout(leaf: Any) -> tuple[Any, ...]:
    """How a tensor of floating-point numbers lies in memory, if not row by row: kernels choose by it, and views.

    The order of its dimensions, and which of them are repeated; its gaps do not count.
    """
    if not isinstance(leaf, torch.Tensor) or not leaf.dtype.is_floating_point or leaf.layout is not torch.strided:
        return ()
    if leaf.is_contiguous():
        return ()
    steps = [(-step, dim) for dim, (size, step) in enumerate(zip(leaf.shape, leaf.stride(), strict=True)) if size > 1]
    return (tuple((dim, step == 0) for step, dim in sorted(steps)),)


def _ambient(method: str) -> tuple[Any, ...]:
    """What beside inputs and module changes what a call does."""
    casts = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    return casts if method == "forward" else (("method", method), *casts)
