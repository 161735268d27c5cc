"""What may be said at one step of a generation, and how it is written down."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxsight.address import Address
from fxsight.around import Around
from fxsight.book import SizeRef
from fxsight.captures import Captures
from fxsight.edit import Edit
from fxsight.effects import changes_inputs
from fxsight.encoder import step_title
from fxsight.errors import CausalityError, FirstCallWarning, NeedsValueError, NotExecuted, TraceError, UnknownAddress
from fxsight.inputs import PLAIN
from fxsight.invoke import Batch
from fxsight.lines import user_line
from fxsight.place import Location
from fxsight.record import Recorder
from fxsight.rehearsal import Known
from fxsight.rows import Rows
from fxsight.spec import parse_dims
from fxsight.tracer import Tracer
from fxsight.value import Value
from fxsight.walk import Walk

if TYPE_CHECKING:
    from fxsight.step import Step


class StepBody(Tracer):
    """The body of step ``number`` of a generation, of which the program and the sizes are known before it runs.

    known: the same for all generations of this kind.  captures: of what is called.  edits: of the model, made in it.
    """

    def __init__(
        self, around: Around, number: int, known: Known, captures: Captures, edits: Sequence[Edit] = ()
    ) -> None:
        super().__init__(captures, None, around.backend, PLAIN, edits)
        self._around, self.number, self._step = around, number, known
        self._is_replaying = False
        self._returned = known.returned
        self._captured = self._base = known.program
        self._sizes = known.sizes
        self._walk: Walk = Walk(self, around.root(known, user_line()), around.names, self._mark)
        for edit in self.edits:
            self._say(edit)

    def read(self, address: Address, port: str) -> Any:
        """As in a trace; of the step that is meant for this module."""
        self._around.touch()
        return Tracer.read(self.meant(address), address, port)

    def write(self, address: Address, port: str, value: Any) -> None:
        """As in a trace; in the step that is meant for this module."""
        self._around.touch()
        Tracer.write(self.meant(address), address, port, value)

    def skip(self, address: Address, value: Any) -> None:
        """As in a trace; in the step that is meant for this module."""
        Tracer.skip(self._around.meant(address), address, value)

    def meant(self, address: Address) -> Step:
        """The step of this generation that is meant for a place."""
        return self._around.meant(address)

    @property
    def title(self) -> str:
        """For messages."""
        return step_title(self.number)

    def to_next(self, path: str) -> None:
        """From here on the next step is meant for a module."""
        self._around.cursor.move(path)

    def do_write(self, address: Address, port: str, value: Any) -> None:
        """A write, written down."""
        super().do_write(address, port, value)
        self._warn_of_first(address.at(port))

    def begin_recorder(self) -> Recorder:
        """The recorder, of a step of this generation."""
        recorder = super().begin_recorder()
        recorder.series = (self._around, self.number)
        recorder.alive = []
        recorder.on_stop = partial(self._around.stop_at, self.number)
        check = recorder.on_edit

        def on_edit(location: Location, node: fx.Node) -> None:
            check(location, node)
            self._warn_of_first(location.address)

        recorder.on_edit = on_edit
        recorder.body.gradients.on_loss = self._check_loss
        return recorder

    def _check_loss(self, loss: fx.Node) -> None:
        """Raises: TraceError for a loss that is made of values of earlier steps."""
        body = self._written.body
        names = (name for name, _ in body.constant_specs())
        foreign = {n: v for n, v in zip(names, body.constants, strict=True) if isinstance(v, Value)}
        for node in undetached(loss):
            value = foreign.get(node.name)
            if value is not None and any(undetached(value.cell.node)):
                raise TraceError(
                    f"{user_line()}: backward() of {self.title} goes through {value.cell.what} of an earlier step, and "
                    "no gradient flows from step to step; write backward() at each step, or .detach() where it is a "
                    "constant"
                )

    def replay(self, edit: Edit) -> None:
        """Say the statements of an edit here."""
        self._say(edit)

    def _say(self, edit: Edit) -> None:
        self._is_replaying = True
        try:
            super().replay(edit)
        finally:
            self._is_replaying = False

    def _warn_of_first(self, address: Address) -> None:
        if self.number or self._around.count == 1 or self._is_replaying or not self._around.cursor.is_plain:
            return
        line = user_line()
        file, _, number = line.rpartition(":")
        warnings.warn_explicit(
            f"{line}: {address} is changed at step 0 alone, where the prompt is read; for every step write "
            "`for step in tracer.all():` around it",
            FirstCallWarning,
            file or "<body>",
            int(number or 0),
            registry=self.captures.told,
        )

    def _check_foreign(self, value: Value, address: Address) -> None:
        series = value.cell.recorder.series
        if series is None or series[0] is not self._around:
            super()._check_foreign(value, address)
        elif series[1] > self.number:
            raise CausalityError(
                f"{user_line()}: {address} at {self.title} is written {value.cell.what} of step {series[1]}, "
                f"which comes later; generate once and keep it, and write it in a second generation"
            )

    def _mark(self, address: Address, port: str) -> tuple[int, ...]:
        """The sizes on which the values at a port depend."""
        names = self._step.marks.get((address, port))
        if names is None:
            names = self._step.marks[address, port] = self._sizes_at(address, port)
        return tuple(self._sizes[name] for name in names)

    def _sizes_at(self, address: Address, port: str) -> tuple[str, ...]:
        try:
            structure, found = self._places.locations(self.place(address), port)
        except (NotExecuted, UnknownAddress):
            return ()
        nodes = self.captures.places(self._captured).program.nodes
        dims: list[Any] = []
        for leaf, location in zip(structure.leaves, found, strict=True):
            if location is not None:
                spec = nodes[location.node].meta["spec"]
                dims += [*spec.shape, *spec.stride]
            elif isinstance(leaf, SizeRef):
                dims += parse_dims(leaf.expr)
        names = {s.name for dim in dims for s in getattr(dim, "free_symbols", ())}
        return tuple(sorted(names & set(self._sizes)))

    def _demand(self, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
        """The numbers of some nodes, now: the generation is held before this step."""
        call = self._around.call_of(self.number)
        leaves = None if call is None else self._step.leaves(call)
        if call is None or leaves is None:
            raise NeedsValueError(
                f"{user_line()}: a number of {self.title} is needed, and it is not known in the block: the generation "
                "has ended before, or has beams or a cache of yours; use torch.where, a condition on the step, or look "
                "at it after the block"
            )
        if changes_inputs(self._captured):
            call = self._step.tree.build([x.clone() if isinstance(x, torch.Tensor) else x for x in leaves])
        self._batch = Batch([call], False, PLAIN)
        with torch.no_grad():
            return super()._demand(nodes)

    def held(self) -> list[Value]:
        """The values of this step that somebody still holds; they are plain tensors when it has run."""
        recorder = self.recorder
        refs = [*self._walk.release(), *(recorder.alive or [])]
        if recorder.alive is not None:
            recorder.alive.clear()
        found = {id(value): value for value in (ref() for ref in refs) if value is not None}
        refs.clear()  # a tensor with weak references cannot become another
        return [value for value in found.values() if not recorder.why_unset(value.cell)]

    # -- invokes -----------------------------------------------------------------------------------------------------

    @property
    def known(self) -> Known:
        """What is known of this step."""
        return self._step

    def take_rows(self, rows: Rows | None) -> None:
        """Some rows are read and written from now on; None for all."""
        recorder = self.recorder
        recorder.body.looked |= rows.names if rows is not None else set()
        recorder.rows = rows

    def grow(self, known: Known) -> None:
        """More rows, perhaps longer ones: the same statements over what is known of this step now.

        Raises: TraceError where the body has looked at a shape that is another now, and for a value of an earlier step
        that has another shape now.
        """
        self._step, self._returned = known, known.returned
        recorder = self.recorder
        self._resize(recorder, known.program, known.sizes, f" of {self.title}")
        for value, (_, spec) in zip(recorder.body.constants, recorder.body.constant_specs(), strict=True):
            now = value.cell.node.meta["spec"].shape if isinstance(value, Value) else spec.shape
            if tuple(now) != tuple(spec.shape) and isinstance(value, Value):
                raise TraceError(
                    f"{value.cell.what} of an earlier step is used at {self.title}, and with the prompts of this "
                    f"invoke its shape is {list(now)}, not {list(spec.shape)}; write the invoke of the longest prompt "
                    "first"
                )


def undetached(node: fx.Node) -> list[fx.Node]:
    """What a value is made of, read or given, but for what has been detached."""
    found: list[fx.Node] = []
    seen, todo = set[fx.Node](), [node]
    while todo:
        at = todo.pop()
        if at in seen or getattr(at.target, "__name__", "") == "detach":
            continue
        seen.add(at)
        found += [at] if at.op == "placeholder" else []
        todo += at.all_input_nodes
    return found
