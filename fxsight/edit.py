"""One edit: what a body has asked for, kept as data, and said again at the start of each trace.

Replaying an edit is like writing its statements down once more, on the program and the sizes of that trace: its torch
calls are tried on shapes, its writes are checked, and its tensors become constants of the trace. So an edit holds for
every size that its operations hold for, and its tensors can be replaced without compiling anything again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxsight.address import Address
from fxsight.arguments import QUIET
from fxsight.causality import check_causal
from fxsight.errors import EditError, FxsightError, InputError, NotExecuted, UnknownAddress
from fxsight.intervention import Intervention
from fxsight.looked import sizes_text
from fxsight.node import origin_of
from fxsight.place import Location, Place
from fxsight.record import Recorder
from fxsight.targets import target_name
from fxsight.text import spec_text
from fxsight.value import Value
from fxsight.write import fit

Looked = tuple[tuple[str, tuple[int | None, ...]], ...]


@dataclass(frozen=True, eq=False)
class Edit:
    """The body of one ``with model.edit():`` as data; printable.

    asked: its reads, operations and writes; no saves.  tensors: its constants by number, the user's own tensors, which
    are bound at each run.  names: of these tensors.  skipped: calls that do not run, with the lines that say so.
    looked: nodes whose sizes the body has looked at, with these sizes (None for those not looked at).
    line: where it was written.  versions: of one from a file, the libraries it was written with, where these differ
    from those that are here: for messages.
    """

    asked: Intervention
    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    skipped: tuple[tuple[Address, str], ...] = ()
    looked: Looked = ()
    line: str = ""
    versions: str = ""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The written places, in the order in which they were first used."""
        return tuple(dict.fromkeys(write.location.address for write in self.asked.writes))

    @cached_property
    def used(self) -> tuple[Address, ...]:
        """The places that it reads or writes."""
        reads = [read.location.address for read in self.asked.reads]
        return tuple(dict.fromkeys([*reads, *(write.location.address for write in self.asked.writes)]))

    @property
    def title(self) -> str:
        """What it changes, and where it was written: for messages."""
        return f"the edit of {', '.join(map(str, self.addresses))} ({self.line})"

    def __str__(self) -> str:
        given = [f"{n}: {spec_text(spec)}" for n, (_, spec) in zip(self.names, self.asked.constants, strict=True)]
        lines = [f"# {self.line}", *str(self.asked).splitlines()]
        lines += [f"# constant {number} is {text}" for number, text in enumerate(given)]
        return "\n".join([*lines, *(f"skip {address}" for address, _ in self.skipped)])

    __repr__ = __str__


Find = Callable[[Address], tuple[Place, Sequence[Location | None]]]


def replay(edit: Edit, recorder: Recorder, find: Find, others: Sequence[Edit] = ()) -> None:
    """Write the statements of an edit down in a trace.

    find: the place of an address and the locations at its port.  others: edits of the same forward, for messages.

    Raises: EditError naming every address or weight that this forward does not have, of the other edits, too, or a size
    that differs from one that the body looked at, or what torch says of these shapes; WriteError, CausalityError.
    """
    locations, missing = _locate(edit, recorder, find)
    if missing:
        after = [other for other in others if other is not edit]
        raise _missing([(edit, missing), *((other, _locate(other, recorder, find)[1]) for other in after)])
    line = recorder.line
    try:
        _Replay(edit, recorder, locations).run()
    finally:
        recorder.line = line


def _missing(found: Sequence[tuple[Edit, Iterable[str]]]) -> EditError:
    """The error that names all that a forward does not have."""
    texts = [
        f"{edit.title} cannot be made in this forward:" + "".join(f"\n  {text}" for text in missing)
        for edit, missing in found
        if missing
    ]
    return EditError("\n".join([*texts, *dict.fromkeys(edit.versions for edit, _ in found if edit.versions)]))


def _locate(edit: Edit, recorder: Recorder, find: Find) -> tuple[Mapping[Address, Location], Sequence[str]]:
    """The locations of an edit's addresses in this program, and what is missing."""
    asked, found, missing = edit.asked, dict[Address, Location](), dict[str, None]()
    named = [r.location.address for r in asked.reads] + [w.location.address for w in asked.writes]
    for address in dict.fromkeys(named):
        try:
            found[address] = next(x for x in find(address)[1] if x is not None and x.address == address)
        except (NotExecuted, UnknownAddress) as error:
            missing[str(error)] = None
        except StopIteration:
            missing[f"{address}: there is no tensor at this place in this forward"] = None
    for _, name in asked.weights:
        try:
            recorder.lookup(name)
        except InputError as error:
            missing[str(error)] = None
    return found, list(missing)


class _Replay:
    """One edit on its way into one recorder."""

    def __init__(self, edit: Edit, recorder: Recorder, locations: Mapping[Address, Location]) -> None:
        self.edit, self.recorder, self.locations = edit, recorder, locations
        self.reads = {read.name: read.location.address for read in edit.asked.reads}
        names = (name for name, _ in edit.asked.constants)
        self.constants = dict(zip(names, edit.tensors, strict=True))
        self.weights = dict(edit.asked.weights)
        self.looked = dict(edit.looked)
        self.made: dict[str, Any] = {}

    def run(self) -> None:
        """Reads and operations, then the writes."""
        before = set(self.recorder.body.graph.nodes)
        for node in self.edit.asked.graph.nodes:
            self._at(origin_of(node).user)
            self.made[node.name] = self._value(node)
            if node.name in self.looked:
                self._check_size(node.name)
        for node in self.recorder.body.graph.nodes:
            if node not in before:
                node.meta[QUIET] = True
        for write in self.edit.asked.writes:
            self._at(write.line)
            location, value = self.locations[write.location.address], self.made[write.value]
            if write.in_place:
                self.recorder.change(location, value)
            else:
                self._assign(location, value)

    def _at(self, line: str) -> None:
        self.recorder.line = lambda: line

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if node.name in self.reads:
                return self.recorder.read(self.locations[self.reads[node.name]])
            weight = self.weights.get(node.name)
            return self.recorder.lookup(weight) if weight is not None else self.constants[node.name]
        given: Any = fx.map_arg((node.args, node.kwargs), lambda n: self.made[n.name])
        args, kwargs = given
        if node.target is operator.getitem:
            return args[0][args[1]]
        try:
            return self.recorder.body.operation(node.target, args, kwargs)
        except FxsightError:
            raise
        except Exception as error:  # what torch says of these shapes
            name = target_name(node.target)
            raise EditError(f"{self.edit.title} cannot be made in this forward: {name}: {error}") from error

    def _assign(self, location: Location, value: Any) -> None:
        fitting = fit(self.recorder, location, value)
        check_causal(self.recorder, location, fitting)
        self.recorder.assign(location, fitting)

    def _check_size(self, name: str) -> None:
        """A number that the body has taken from a shape is the same here."""
        value, then = self.made[name], self.looked[name]
        now = value.cell.spec.numbers if isinstance(value, Value) else tuple(value.shape)
        if len(now) != len(then) or any(a is not None and a != b for a, b in zip(then, now, strict=True)):
            shown = [sizes_text(then), str(list(now))]
            raise EditError(
                f"{self.edit.title} has looked at a shape, which was {shown[0]} and is {shown[1]} here; write the body "
                "so that it holds for every size: h.size(-1) looks at one dimension alone, h[:, -1] and "
                "torch.zeros_like(h) at none"
            )
        self.recorder.body.looked |= set(self.recorder.sizes)
