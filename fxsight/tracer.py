"""One trace: ``with model.trace(...) as tracer``.

Entering finds the program (captured once), the body records, leaving compiles the intervention in, runs it, and turns
what was saved into plain tensors: in place, for every variable that holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch
from torch import fx

from fxsight.address import Address
from fxsight.captures import Captures
from fxsight.causality import check_causal, check_edit
from fxsight.errors import NeedsValueError, TraceError, UnknownAddress
from fxsight.intervention import Intervention
from fxsight.lines import user_line
from fxsight.passes.use_known import UseKnown, fingerprints
from fxsight.place import Location, Place
from fxsight.program import Program
from fxsight.record import Recorder
from fxsight.run import Executable
from fxsight.tree import flatten
from fxsight.value import Value, not_saved, values_in
from fxsight.write import check_write, present

Backend = Literal["auto", "eager", "inductor"]
BACKENDS: tuple[Backend, ...] = ("auto", "eager", "inductor")


class Tracer:
    """The trace of one body over one call of a model.

    program: after the block, the finished program: printable, callable on new inputs (returns the saves in order).
    tier: how the values were computed: "eager" (bitwise the model's own) or "inductor" (``lower.TOLERANCE``).
    """

    def __init__(self, captures: Captures, args: tuple[Any, ...], kwargs: Mapping[str, Any], backend: Backend) -> None:
        self._captures, self._args, self._kwargs = captures, args, dict(kwargs)
        self._backend: Backend = backend
        self._leaves = flatten((args, self._kwargs))[0]
        self._known: dict[str, torch.Tensor] = {}
        self._executable: Executable | None = None

    # -- the block ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Tracer:
        self._captured, self._sizes = self._captures.find(self._args, self._kwargs)
        self._places = self._captures.places(self._captured)
        self._recorder = Recorder(
            self._places, self._sizes, self._captures.weight_names, self._demand, self._captures.weight
        )
        self._recorder.on_edit = partial(check_edit, self._recorder)
        self._captures.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._captures.leave(self)
        stopped = isinstance(error, Stopped) and error.trace is self
        self._recorder.is_open = error is None or stopped
        try:
            if self._recorder.is_open:
                self._finish()
        finally:
            self._recorder.is_open = False
        return stopped or None

    @property
    def program(self) -> Executable:
        """The finished program.

        Raises: TraceError before the block has ended.
        """
        if self._executable is None:
            raise TraceError("the program is finished when the block ends: use tracer.program after it")
        return self._executable

    @property
    def captured(self) -> Program:
        """The captured program that the block is about, with what it has opened so far; there from its begin on."""
        return self._captured

    @property
    def sizes(self) -> Mapping[str, int]:
        """The named sizes of this call's inputs; there from the begin of the block on."""
        return self._sizes

    @property
    def tier(self) -> str:
        """How the values were computed: "eager" or "inductor"."""
        return self.program.tier

    @property
    def result(self) -> Any:
        """What the whole call returns: the root module's output."""
        return self.read(self.place(Address("")), "output")

    def stop(self) -> NoReturn:
        """End the block here: what comes after it in the block is not done, and nothing only it needs is run."""
        raise Stopped(self)

    # -- what views ask ----------------------------------------------------------------------------------------------

    def place(self, address: Address) -> Place:
        """The place of an address in this trace's program; what is fused above it is opened first.

        Raises: UnknownAddress, NotExecuted.
        """
        try:
            return self._places.find(address)
        except UnknownAddress:
            self._open(address)
            return self._places.find(address)

    def _open(self, address: Address) -> None:
        """Go on with the program in which what is fused above the address is opened.

        Raises: UnknownAddress when opening does not help.
        """
        self._captured = self._captures.opened(self._captured, address)
        self._places = self._captures.places(self._captured)
        self._recorder.move(self._places)

    def at(self, address: str | Address) -> At:
        """The place of an address, with ``output``, ``input`` and ``inputs`` to read and write."""
        return At(self, self.place(Address.parse(address) if isinstance(address, str) else address))

    def read(self, place: Place, port: str) -> Any:
        """The value at a port: values, in the structure that the model has there.

        Raises: TraceError when the block has ended.
        """
        if not self._recorder.is_open:
            raise TraceError(f"{place.address.at(port)} has a value only inside a trace: with model.trace(...):")
        return present(self._recorder, place, port, self._write_leaf)

    def write(self, place: Place, port: str, value: Any) -> None:
        """Let a port have another value.

        Raises: WriteError, CausalityError at the user's line.
        """
        for leaf in values_in(value):
            if not leaf.cell.recorder.is_open:
                raise not_saved(leaf.cell)
            if leaf.cell.recorder is not self._recorder:
                raise TraceError(
                    f"{place.address.at(port)} is written {leaf.cell.what}, a value of another trace; "
                    "save it there and write it after that block"
                )
        for location, leaf in check_write(self._recorder, place, port, value):
            self._write_leaf(location, leaf)

    def _write_leaf(self, location: Location, leaf: Any) -> None:
        check_causal(self._recorder, location, leaf)
        self._recorder.assign(location, leaf)

    def save(self, value: Any) -> None:
        """Keep every value of a structure."""
        self._recorder.keep(value)

    # -- running -----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        asked, saved = self._recorder.finish()
        self._executable = self._captures.executable(
            self._captured, asked, self._recorder.constants, self._tier(), self._use_known()
        ).bound([*self._recorder.constants, *self._known.values()], bool(self._known))
        results = list(self._executable.run(self._leaves, [*self._recorder.constants, *self._known.values()]))
        self._fill(saved, results)
        for (number, _), value in zip(asked.updates, results[len(results) - len(asked.updates) :], strict=True):
            with torch.no_grad():
                self._recorder.constants[number].copy_(value)

    def _tier(self) -> Literal["eager", "inductor"]:
        return "inductor" if self._backend == "inductor" else "eager"

    def _fill(self, saved: Sequence[Any], results: Sequence[torch.Tensor]) -> None:
        """Each saved value becomes its tensor."""
        values = [leaf for value in saved for leaf in flatten(value)[0] if isinstance(leaf, Value)]
        pairs: dict[int, tuple[Value, torch.Tensor]] = {}
        for value, tensor in zip(values, results, strict=False):
            pairs.setdefault(id(value), (value, tensor))
        for value, tensor in pairs.values():
            become(value, tensor)

    def _demand(self, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
        """The numbers of some nodes, now."""
        asked: Intervention = self._recorder.intervention((self._recorder.save_of(nodes),))
        constants = self._recorder.constants
        known = self._use_known()
        program = self._captures.demanded(self._captured, asked, known)
        executable = Executable(program, self._captures.module, constants, "eager", {})
        values = executable.run_keeping(self._leaves, [*constants, *self._known.values()])
        results = [values[node.name] for node in program.results[: len(nodes)]]
        for name, mark in fingerprints(program.graph, known).items():
            if isinstance(values.get(name), torch.Tensor):
                self._known.setdefault(mark, values[name])
        return results

    def _use_known(self) -> UseKnown | None:
        """What has been computed for this body already, as constants after its own."""
        return UseKnown(tuple(self._known), len(self._recorder.constants)) if self._known else None


class Stopped(BaseException):
    """Ends the block of one trace; never seen outside it."""

    def __init__(self, trace: Tracer) -> None:
        super().__init__("the trace is stopped")
        self.trace = trace


class Scan(Tracer):
    """A block in which shapes are looked at, and nothing is run: ``with model.scan(...)``.

    Saved values become tensors without data (device "meta"). What needs a number is an error.
    """

    def _finish(self) -> None:
        for value in self._recorder.finish()[1]:
            for leaf in flatten(value)[0]:
                if isinstance(leaf, Value):
                    become(leaf, torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta"))

    def _demand(self, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
        raise NeedsValueError(
            f"{user_line()}: a number is needed, and a scan runs nothing; use torch.where, or model.trace(...)"
        )


class At:
    """The values of one place inside a trace."""

    def __init__(self, tracer: Tracer, place: Place) -> None:
        self._tracer, self._place = tracer, place

    @property
    def output(self) -> Any:
        """What it returns."""
        return self._tracer.read(self._place, "output")

    @output.setter
    def output(self, value: Any) -> None:
        self._tracer.write(self._place, "output", value)

    @property
    def input(self) -> Any:
        """Its first argument."""
        return self._tracer.read(self._place, "input")

    @input.setter
    def input(self, value: Any) -> None:
        self._tracer.write(self._place, "input", value)

    @property
    def inputs(self) -> Any:
        """All its arguments: ``(args, kwargs)``."""
        return self._tracer.read(self._place, "inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._tracer.write(self._place, "inputs", value)


def become(value: Value, tensor: torch.Tensor) -> None:
    """Turn a value into a plain tensor, for all who hold it; ``.value`` on it still works.

    Source: ``torch.utils.swap_tensors`` exchanges the two objects' contents and classes.
    """
    plain = tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor
    swap: Any = torch.utils.swap_tensors
    try:
        swap(value, plain)
    except RuntimeError:  # something else refers to this very tensor (a view of it): swap with a view, too
        swap(value, plain.view_as(plain))
    tensor_now: Any = value
    tensor_now.value = value.view_as(value)  # another tensor of the same memory: no cycle
