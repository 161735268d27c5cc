"""The edits of one model, in order, and its plain call with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxsight.address import Address
from fxsight.asked import asked_in_all
from fxsight.auto import Backend
from fxsight.captures import Captures
from fxsight.edit import Edit
from fxsight.errors import EditError, nearest
from fxsight.intervention import Intervention
from fxsight.parameters import EditParameters
from fxsight.program import Program
from fxsight.run import Executable
from fxsight.tracer import Tracer
from fxsight.tree import flatten

KEPT = 256  # finished programs of plain calls, one for each set of sizes


class Edits(Sequence[Edit]):
    """In the order in which they are made in a forward; printable. Made and filled by ``model.edit()``."""

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._edits = tuple(edits)
        self._calls: OrderedDict[Any, PlainCall] = OrderedDict()
        self.placed: set[Intervention] = set()  # those that are made in graphs of torch.compile's

    def __getitem__(self, number: Any) -> Any:
        return self._edits[number]

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def __repr__(self) -> str:
        return "\n\n".join(map(str, self._edits)) or "no edits"

    @property
    def parameters(self) -> EditParameters:
        """The tensors of all of them, by name."""
        return EditParameters(self)

    def add(self, edit: Edit) -> None:
        """One more, made after the others; names that are taken get a number."""
        taken = {name for each in self._edits for name in each.names}
        names: list[str] = []
        for name in edit.names:
            free = (f"{name}_{i}" if i else name for i in range(len(taken) + len(names) + 1))
            names.append(next(n for n in free if n not in taken and n not in names))
        self._edits = (*self._edits, replace(edit, names=tuple(names)))

    def put(self, number: int, edit: Edit) -> None:
        """Another in the place of one."""
        self._edits = (*self._edits[:number], edit, *self._edits[number + 1 :])

    def load(self, edits: Iterable[Edit], module: nn.Module) -> None:
        """Edits of a file, made after the others; their tensors are moved to the module.

        Raises: EditError naming all modules and weights that the module does not have.
        """
        edits = list(edits)
        check_places(edits, module)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        moved = [replace(edit, tensors=tuple(t.to(device) for t in edit.tensors)) for edit in edits]
        for edit in moved:
            self.add(edit)

    def clear(self) -> None:
        """None from here on."""
        self._edits = ()
        self._calls.clear()
        self.placed.clear()

    # -- the plain call ----------------------------------------------------------------------------------------------

    def call(
        self, captures: Captures, call: tuple[tuple[Any, ...], Mapping[str, Any]], backend: Backend = "eager"
    ) -> Any:
        """What the module returns with these edits, in the module's own structure.

        Raises: EditError where this forward does not have the places; CaptureError.
        """
        return self.prepared(captures, call, backend).run(flatten(call)[0], self._edits)

    def prepared(
        self, captures: Captures, call: tuple[tuple[Any, ...], Mapping[str, Any]], backend: Backend
    ) -> PlainCall:
        """The finished program of such a call.

        Raises: as ``call``.
        """
        found = captures.quick(*call)
        key = (id(found.program), *found.sizes.items(), backend, *self._key(captures))
        made = self._calls.get(key)
        if made is None:
            made = self._calls[key] = _plain_call(captures, call, backend, self)
            if len(self._calls) > KEPT:
                self._calls.popitem(last=False)
        return made

    def _key(self, captures: Captures) -> Iterator[Any]:
        """What a finished program depends on of the edits: all but the numbers of their tensors."""
        names, seen = captures.weight_names(), dict[int, int]()
        for edit in self._edits:
            yield edit.asked
            for t in edit.tensors:
                same = seen.setdefault(id(t), len(seen))
                yield names.get(id(t)) or (same, t.dtype, t.shape, t.stride(), t.device)


def check_places(edits: Iterable[Edit], module: nn.Module) -> None:
    """Whether a model has the modules and weights that edits name; operations are known when it is traced.

    Raises: EditError naming all that are missing.
    """
    modules = {name for name, _ in module.named_modules(remove_duplicate=False)}
    weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    weights |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    edits, missing = list(edits), dict[str, None]()
    for edit in edits:
        asked = edit.asked
        for address in [r.location.address for r in asked.reads] + [w.location.address for w in asked.writes]:
            if address.module not in modules:
                missing[f"{address}: {nearest(address.module, modules) or 'it has no such module'}"] = None
        for _, name in edit.asked.weights:
            if name not in weights:
                missing[f"the weight {name}: {nearest(name, weights) or 'attach its module before'}"] = None
    if missing:
        listed = "".join(f"\n  {text}" for text in missing)
        listed += "".join(f"\n{text}" for text in dict.fromkeys(edit.versions for edit in edits) if text)
        raise EditError(f"{type(module).__name__} does not have what these edits name:{listed}")


@dataclass(frozen=True, eq=False)
class PlainCall:
    """A finished program that returns the module's output.

    base: the program without the edits.  places: per constant of the program, which tensor of which edit it is.
    """

    base: Program
    executable: Executable
    places: tuple[tuple[int, int], ...]

    def run(self, leaves: Sequence[Any], edits: Sequence[Edit]) -> Any:
        """The module's output for inputs that fit."""
        results = self.executable.run(leaves, [edits[i].tensors[j] for i, j in self.places])
        return self.executable.build(results)[0]


def _plain_call(captures: Captures, call: Any, backend: Backend, edits: Sequence[Edit]) -> PlainCall:
    """Record the edits and nothing else, and finish the program."""
    trace = PlainTrace(captures, call, backend, edits=edits)
    executable = trace.finish()
    table: dict[int, tuple[int, int]] = {}
    for i, edit in enumerate(edits):
        for j, tensor in enumerate(edit.tensors):
            table.setdefault(id(tensor), (i, j))
    return PlainCall(trace.base, executable, tuple(table[id(tensor)] for tensor in trace.constants))


class PlainTrace(Tracer):
    """A trace whose body is: keep the output. Without inputs it is one of the last forward, and cannot be run."""

    base: Program
    constants: list[torch.Tensor]
    asked: Intervention

    def finish(self) -> Executable:
        """The finished program; nothing is run."""
        self.say()
        return self.captures.executable(self.captured, self.asked, self.constants, self._backend, self._sizes)

    def say(self) -> Intervention:
        """What is asked for, said and not finished."""
        if self._batch.calls:
            self._begin()
        else:
            self._begin_on_latest()
        self.base, recorder = self._base, self.recorder
        recorder.keep(self.do_read(Address(""), "output"))
        recorder.finish()
        self.constants = recorder.constants
        self.asked = asked_in_all(recorder, [])
        recorder.phase = "done"
        return self.asked
