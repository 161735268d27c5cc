"""``with model.edit() as edited:`` a body that is kept, and made again in every forward of the edited model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import fx

from fxsight.asked import asked_so_far
from fxsight.captures import Captures
from fxsight.edit import Edit
from fxsight.errors import EditError, FirstCallWarning, NeedsValueError
from fxsight.inputs import Inputs
from fxsight.intervention import Intervention
from fxsight.lines import user_line
from fxsight.looked import looked_sizes
from fxsight.lost import warn_of_lost_edits, warn_of_unused_results
from fxsight.record import Recorder
from fxsight.rows import Call
from fxsight.tracer import Tracer
from fxsight.walk import Walk

_RUNS_NOTHING = (
    "an edit runs nothing, so there is nothing to save in it; save in a trace of the edited model: "
    "with edited.trace(x): ..."
)


class EditTrace(Tracer):
    """The trace of an edit's body: over a program, at the sizes of an example; nothing is run.

    call: the example; None for the program that was captured last.  parameters: names for tensors of the user's.
    edit: what the body has asked for, when it has ended.
    """

    edit: Edit | None = None

    def __init__(
        self, captures: Captures, call: Call | None, inputs: Inputs, parameters: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(captures, call, "eager", inputs)
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._line = user_line()

    def __enter__(self) -> EditTrace:
        if not self._batch.calls:
            self._begin()
        super().__enter__()
        return self

    def _begin(self) -> None:
        if self._batch.calls:
            super()._begin()
        else:
            self._begin_on_latest()
        self.recorder  # noqa: B018 - an edit is recorded, not remembered

    def begin_recorder(self) -> Recorder:
        """The recorder, which saves nothing."""
        recorder = super().begin_recorder()
        recorder.why_no_save = _RUNS_NOTHING
        return recorder

    def _demand(self, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
        raise NeedsValueError(
            f"{user_line()}: a number is needed, and an edit runs nothing; use torch.where, or fxsight.apply in a trace"
        )

    def _end(self, walk: Walk) -> None:
        recorder = self._written
        recorder.finish()
        asked = asked_so_far(recorder, ())
        warn_of_lost_edits(recorder.body, asked)
        warn_of_unused_results(recorder.body, asked)
        if asked.backwards:
            raise EditError(f"{self._line}: an edit has no backward pass; ask for gradients in a trace")
        if asked.updates:
            raise EditError(
                f"{self._line}: an edit cannot change a tensor of yours in place; compute the value from the model's"
            )
        if not asked.writes:
            raise EditError(
                f"{self._line}: this edit changes nothing in the model; write a value "
                "(model.layer.output = ...) or change one in place (model.layer.output[:] = 0)"
            )
        self._warn_of_other_calls(asked)
        looked = tuple((n.name, looked_sizes(n, dims)) for n, dims in recorder.body.shapes.items() if dims)
        skipped = tuple((address, line) for address, _, line in self._skipped)
        self.edit = pruned(Edit(replace(asked, sizes=()), tuple(recorder.constants), (), skipped, looked, self._line))
        self.edit = replace(self.edit, names=named(self.edit, self._names))

    def _warn_of_other_calls(self, asked: Intervention) -> None:
        """A module that is called several times, of which only the first call is edited."""
        book = self.captures.places(self._captured).program.book
        written = {(w.location.address.module, w.location.address.call): w for w in asked.writes}
        for (path, call), write in written.items():
            if call == 0 and (path, 1) in book.modules and (path, 1) not in written:
                file, _, number = write.line.rpartition(":")
                times = sum(other == path for other, _ in book.modules)
                warnings.warn_explicit(
                    f"{write.line}: this forward calls {path!r} {times} times, and the edit is of the first call; "
                    f"the others are model.{path}.call(1) and so on",
                    FirstCallWarning,
                    file or "<body>",
                    int(number or 0),
                )


def pruned(edit: Edit) -> Edit:
    """The same without what no write needs."""
    asked = edit.asked
    needed = {write.value for write in asked.writes} | {name for name, _ in edit.looked}
    for node in reversed(list(asked.graph.nodes)):
        if node.name in needed or node.users:
            continue
        asked.graph.erase_node(node)
    left = {node.name for node in asked.graph.nodes}
    kept = [i for i, (name, _) in enumerate(asked.constants) if name in left]
    less = replace(
        asked,
        reads=tuple(read for read in asked.reads if read.name in left),
        constants=tuple(asked.constants[i] for i in kept),
        weights=tuple(pair for pair in asked.weights if pair[0] in left),
    )
    return replace(edit, asked=less, tensors=tuple(edit.tensors[i] for i in kept))


def named(edit: Edit, given: Mapping[int, str]) -> tuple[str, ...]:
    """A name for each tensor: the user's, or the first place it is written to and a number."""
    names: list[str] = []
    for tensor, (node, _) in zip(edit.tensors, edit.asked.constants, strict=True):
        stem = _first_place(edit.asked, node)
        number = sum(name.rpartition(".")[0] == stem for name in names)
        names.append(given.get(id(tensor), f"{stem}.{number}"))
    return tuple(names)


def _first_place(asked: Intervention, name: str) -> str:
    """The place of the first write that needs a node, as a dotted name."""
    needing = {name}
    for node in asked.graph.nodes:
        if any(a.name in needing for a in node.all_input_nodes):
            needing.add(node.name)
    address = next((w.location.address for w in asked.writes if w.value in needing), None)
    if address is None:
        return "edit"
    steps = (str(step).replace("#", "_") for step in address.steps)
    return ".".join([address.module or "model", *steps, address.port])


class Editing:
    """The block: ``as`` gives the edited model, or the part of it that ``edit`` was asked of.

    part: gives what the block yields, for the edited model.
    """

    def __init__(self, trace: EditTrace, edited: Any, part: Any) -> None:
        self._trace, self._edited, self._part = trace, edited, part

    def __enter__(self) -> Any:
        self._trace.__enter__()
        return self._part

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        result = self._trace.__exit__(kind, error, trace)
        if self._trace.edit is not None:
            self._edited.edits.add(self._trace.edit)
        return result
