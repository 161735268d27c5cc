"""``torch.compile(model, backend="fxsight", options={"edits": edited})``: edits made inside Dynamo's graphs.

Each graph that Dynamo hands over is read (``dynamo``), laid beside the captured program (``beside``), and given the
edits whose places are in it, by the passes that weave any body in. What comes of it goes to another backend, Inductor
unless told otherwise. A graph that no edit concerns goes there as it is.

An edit that cannot be made is never left out: the graph becomes one that raises when it is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.address import Address
from fxsight.asked import asked_so_far
from fxsight.beside import Beside, Unfit
from fxsight.captures import Captures
from fxsight.dynamo import Graph, read_graph
from fxsight.edit import Edit
from fxsight.edits import PlainTrace
from fxsight.errors import EditError, FxsightError
from fxsight.frame import Frame, first_names, frame_of
from fxsight.graph_run import GraphRun, Source, plain_graph
from fxsight.intervention import Intervention
from fxsight.model import Model
from fxsight.node import Fixed
from fxsight.pipeline import pipeline_for
from fxsight.program import Program
from fxsight.spec import TensorSpec

Compiler = Callable[..., Any]
_INSTEAD = "edited.compile() makes every edit, in a model without graph breaks"


def backend(gm: fx.GraphModule, example_inputs: list[Any], **settings: Any) -> Compiler:
    """What torch calls for each graph; ``options``: "edits", an edited model; "inner", the backend behind this one.

    Further options are the inner backend's. What is wrong with the edits is raised when the graph is run: at this
    moment Dynamo could take it for a reason to run the frame without edits.
    """
    try:
        options = dict(settings.get("options") or {})
        edited, inner = _edited(options.pop("edits", None)), options.pop("inner", "inductor")
        compiler = _torch.inner_backend(inner, settings.get("mode"), options)
        return _Weaver(edited, gm).compiled(example_inputs, compiler)
    except FxsightError as error:
        return partial(_refuse, type(error), str(error))


def _refuse(kind: type[FxsightError], text: str, *args: Any) -> Any:
    raise kind(text)


def _edited(given: Any) -> Model:
    if isinstance(given, Model):
        return given
    raise EditError(
        'torch.compile(model, backend="fxsight") takes the edited model, options={"edits": edited}, and is given '
        f"{'none' if given is None else f'a {type(given).__name__}'}; a file of edits is read by a Model: "
        "edited = fxsight.Model(net); edited.load_edits(path)"
    )


@dataclass
class _Sorted:
    """The edits, by what this graph is to them: where they are made, and why others are not."""

    here: list[Edit]
    waiting: list[tuple[Edit, str]]


class _Weaver:
    """The edits of one model, on their way into one graph."""

    def __init__(self, edited: Model, gm: fx.GraphModule) -> None:
        self.captures: Captures = vars(edited)["_captures"]
        self.edits, self.gm = edited.edits, gm
        self.frame: Frame = frame_of(gm, self.captures.module)

    def compiled(self, inputs: list[Any], compiler: Compiler) -> Compiler:
        """What runs instead of the graph.

        Raises: EditError.
        """
        if not self.frame.modules:
            made: Compiler = compiler(self.gm, inputs)
            return made
        if self.edits and _torch.is_last_recompile():
            raise EditError(
                "Dynamo has compiled this code as often as it may, and would run it without edits from the next time "
                "on; compile with dynamic=True, or raise torch._dynamo.config.recompile_limit"
            )
        if not any(self._is_near(edit) for edit in self.edits):
            self._check_waiting([(edit, "") for edit in self.edits])
            return self._run(compiler(self.gm, inputs), None)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise EditError(f"a graph under autocast cannot be edited; {_INSTEAD}")
        graph = read_graph(self.gm, self.captures.module)
        beside = Beside(self._captured(), graph, first_names(self.captures.module))
        found = self._sort(graph, beside)
        self._check_waiting(found.waiting)
        if not found.here:
            return self._run(compiler(self.gm, inputs), None)
        program, asked, constants = self._woven(graph, beside, found.here)
        self._guard(graph, asked)
        plain, extras = plain_graph(graph, program, self._sources(constants))
        run = self._run(None, extras)
        given = [*inputs, *(_torch.fake_input(graph.values, tensor) for tensor in run.further())]
        run.compiled = compiler(plain, given)
        self.edits.placed.update(edit.asked for edit in found.here)
        return run

    def _run(self, compiled: Any, sources: list[Source] | None) -> GraphRun:
        return GraphRun(compiled, self.captures, self.edits, self.frame, sources)

    # -- which edits -------------------------------------------------------------------------------------------------

    def _is_near(self, edit: Edit) -> bool:
        return any(address.module in self.frame.modules for address in edit.used)

    def _sort(self, graph: Graph, beside: Beside) -> _Sorted:
        found = _Sorted([], [])
        for edit in self.edits:
            missing = {address: why for address in edit.used if (why := self._why_not(graph, beside, address))}
            if not missing:
                found.here.append(edit)
            elif len(missing) < len(edit.used):
                there = [str(a) for a in edit.used if a not in missing]
                raise EditError(
                    f"{edit.title} cannot be made in one graph of Dynamo's: {', '.join(there)} "
                    f"{'are' if len(there) > 1 else 'is'} in this one, and others are not:{_listed(missing)}\n"
                    f"  {self._end()}"
                )
            else:
                found.waiting.append((edit, _listed(missing)))
        return found

    def _why_not(self, graph: Graph, beside: Beside, address: Address) -> str:
        """Why an address is not in this graph; empty when it is.

        Raises: EditError where it is, but cannot be told.
        """
        if address.module not in self.frame.modules:
            return "not in this graph"
        try:
            beside.locate(address)
        except Unfit as unfit:
            if any(call.path == address.module for call in graph.whole):
                raise EditError(
                    f"{address} is in a graph of Dynamo's, but the value cannot be told for certain: {unfit}; edit the "
                    f"module around it or one inside it; {_INSTEAD}"
                ) from None
            return str(unfit)
        return ""

    def _check_waiting(self, waiting: list[tuple[Edit, str]]) -> None:
        """Whether edits that are not made here can be made in a graph that is still to come.

        Raises: EditError.
        """
        lost = [(edit, why) for edit, why in waiting if edit.asked not in self.edits.placed]
        if not lost:
            return
        edit, why = lost[0]
        if self.frame.is_last:
            raise EditError(
                f"{edit.title} falls in no graph of Dynamo's:{why or _listed(dict.fromkeys(edit.used, 'in none'))}\n"
                f"  {self._end()}"
            )
        for address in edit.used:
            if _torch.is_disabled(self.captures.module, address.module):
                raise EditError(
                    f"{edit.title} falls in no graph of Dynamo's: {address.module} is kept from it by "
                    f"torch.compiler.disable; {_INSTEAD}"
                )

    def _end(self) -> str:
        named = ", ".join(sorted(self.frame.modules - {""})[:6]) or "the model itself"
        more = ", …" if len(self.frame.modules - {""}) > 6 else ""
        return f"this graph has {named}{more}; {_INSTEAD}"

    # -- the program -------------------------------------------------------------------------------------------------

    def _captured(self) -> Program:
        """The program of such a forward as was captured last, in the present mode of the model."""
        latest = self.captures.latest
        if latest is None:
            raise EditError(
                "the edits were loaded, and the model was never captured: give it one forward with example inputs "
                "before torch.compile: edited.scan(x), or call edited(x)"
            )
        with _torch.outside_dynamo():
            args, kwargs = latest.inputs.build([_example(x, self.captures.latest_sizes) for x in latest.input_leaves])
            return self.captures.find(args, kwargs)[0]

    def _woven(
        self, graph: Graph, beside: Beside, edits: list[Edit]
    ) -> tuple[Program, Intervention, list[torch.Tensor]]:
        captures = Captures(self.captures.module, None)
        captures.reader = self.captures.reader
        captures.latest, captures.latest_sizes = beside.program(), dict(graph.sizes)
        try:
            with _torch.outside_dynamo():
                trace = _GraphTrace(captures, None, "eager", edits=edits)
                asked = trace.said()
                return pipeline_for(asked)(trace.base), asked, trace.constants
        except FxsightError:
            for name, symbol in graph.symbols.items():
                bool(symbol == graph.sizes[name])  # what is refused at these sizes may be right at others
            raise

    def _guard(self, graph: Graph, asked: Intervention) -> None:
        """What the edits assume of sizes becomes a guard of Dynamo's, which compiles again for others."""
        for name, value in asked.sizes:
            if name not in graph.symbols or not bool(graph.symbols[name] == value):
                raise EditError(f"the edits hold for {name} = {value} alone, which is not known before the model runs")

    def _sources(self, constants: list[torch.Tensor]) -> list[Source]:
        """Per constant of the program, which tensor of which edit it is."""
        table = {id(t): (i, j) for i, edit in enumerate(self.edits) for j, t in enumerate(edit.tensors)}
        return [table[id(tensor)] for tensor in constants]


class _GraphTrace(PlainTrace):
    """A trace over a graph, in which the edits are said and nothing else."""

    def said(self) -> Intervention:
        """What they ask for; nothing is run."""
        self._begin_on_latest()
        self.base, recorder = self._base, self.recorder
        recorder.finish()
        self.constants = recorder.constants
        asked = asked_so_far(recorder, ())
        recorder.phase = "done"
        return asked


def _example(leaf: Any, sizes: Any) -> Any:
    """A leaf of a call like one that was captured.

    Raises: EditError for caches and objects, of which there is no example.
    """
    if isinstance(leaf, TensorSpec):
        spec = leaf.at(sizes)
        return torch.zeros(spec.numbers, dtype=spec.dtype, device=spec.device)
    if isinstance(leaf, Fixed) and not (isinstance(leaf.value, str) and leaf.value.startswith("<")):
        return leaf.value
    raise EditError(
        "the last forward of the edited model was given a cache or an object; trace, scan or call it once with tensors "
        "alone before torch.compile: edited.scan(x)"
    )


def _listed(missing: dict[Address, str]) -> str:
    return "".join(f"\n  {address}: {why}" for address, why in missing.items())
