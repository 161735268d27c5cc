"""Traces of a session on the same inputs, run as one plan: what they have in common is computed once.

    with model.session():
        for layer in range(12):
            with model.trace(x):                     the forward up to the edit is the same in all twelve
                model.h[layer].output[:, 3] = 0

Every operator stays what it was, on the values it had, so each trace has the bits of its own run. A trace waits for
those whose values it uses; traces that change something run in the order in which they are written, each by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fxsight.alike import planned
from fxsight.effects import is_random
from fxsight.errors import FxsightError
from fxsight.estimate import Estimate, total_line
from fxsight.intervention import Intervention
from fxsight.lift import Outline, outline
from fxsight.numbering import has_effects
from fxsight.own_memory import own_memory
from fxsight.parts import Group, identity, run_groups
from fxsight.program import Program
from fxsight.text import Text
from fxsight.together import BUDGET
from fxsight.tracer import Tracer
from fxsight.tree import flatten
from fxsight.value import Value

_LARGE = 2**16  # inputs with more numbers are the same only where they are one tensor
_NOTHING = "they have nothing to share"
_OFF = "share=False"


@dataclass(frozen=True)
class Terms:
    """How traces share.

    mode: "exact" or "fast", as of a sweep; "" where each runs alone.  budget: bytes that those which are computed
    together may hold at once.  word: what a trace is called.
    keeps_graph: whether what is computed has its graph where weights require gradients, so that nothing is shared.
    """

    mode: str = "exact"
    budget: int = BUDGET
    word: str = "trace"
    keeps_graph: bool = True

    @property
    def one(self) -> str:
        """Why it is alone."""
        return f"no other {self.word} has the same inputs" if self.mode else _OFF

    @property
    def gradients(self) -> str:
        """Why it is alone."""
        what = "something" if self.keeps_graph else "a tensor of yours"
        return f"gradients are enabled and {what} requires them; use torch.no_grad()"


SHARED, ALONE = Terms(), Terms(mode="")


@dataclass(eq=False)
class Ready:
    """A trace that has ended, and what is asked of it."""

    tracer: Tracer
    asked: Intervention

    @property
    def captured(self) -> Program:
        """What it was recorded on."""
        return self.tracer.captured

    @property
    def sizes(self) -> Any:
        """Of its inputs."""
        return self.tracer.sizes

    @property
    def constants(self) -> Sequence[Any]:
        """The user's tensors."""
        return self.tracer.recorder.constants

    @property
    def leaves(self) -> Sequence[Any]:
        """Of the inputs."""
        return self.tracer.inputs

    @cached_property
    def outline(self) -> Outline:
        """The body without its numbers."""
        return outline(self.asked)


class Sharing:
    """Runs the traces of one session."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._shared: list[Estimate] = []
        self._alone: Counter[str] = Counter()

    def run(self, tracers: Sequence[Tracer], values: Callable[[Tracer], list[Value]]) -> None:
        """Run traces that have ended.  values: those of a trace that are wanted besides what it saves.

        Raises: what running a trace raises.
        """
        terms = self._terms
        for together in rounds(tracers) if terms.mode else ([tracer] for tracer in tracers):
            if len(together) == 1:
                self._run_alone([Ready(together[0], together[0].ask(values(together[0])))], terms.one)
                continue
            for ready, why in _sets([Ready(t, t.ask(values(t))) for t in together], terms):
                plan = None if why else _plan(ready, terms.mode)
                if plan is None:
                    self._run_alone(ready, why or _NOTHING)
                else:
                    self._run_shared(ready, plan)

    def _run_alone(self, ready: Sequence[Ready], why: str) -> None:
        self._alone[why] += len(ready)
        for one in ready:
            with nullcontext() if self._terms.keeps_graph or _needs_graph(one, self._terms) else torch.no_grad():
                one.tracer.run_asked()
            one.tracer.forget()

    def _run_shared(self, ready: Sequence[Ready], plan: Sequence[Group]) -> None:
        terms = self._terms
        self._shared.append(Estimate(plan, dict(ready[0].sizes), terms.budget))
        with torch.no_grad():
            for number, results in run_groups(plan, ready[0].tracer.inputs, terms.budget):
                ready[number].tracer.take(own_memory(results))
                ready[number].tracer.forget()

    def explain(self) -> Text:
        """What the traces that have run have shared, and which ran alone."""
        return Text("\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        word = self._terms.word
        count = sum(one.cells for one in self._shared) + sum(self._alone.values())
        yield f"{count} {word}s have run{'' if self._terms.keeps_graph else f'; {self._terms.mode}'}"
        for one in self._shared:
            yield from one.lines(word)
            yield total_line(word, one.naive, one.shared + one.own)
            yield one.memory_line(word)
        for why, number in self._alone.items():
            yield f"  {number} alone: {why}"


# -- the order -------------------------------------------------------------------------------------------------------


def rounds(tracers: Sequence[Tracer]) -> list[list[Tracer]]:
    """Traces in the order in which they run: those of one round need nothing of each other."""
    found: dict[Any, int] = {}
    order: dict[int, list[Tracer]] = {}
    known: dict[int, bool] = {}
    first = 0
    for tracer in tracers:
        if _keeps_order(tracer, known):
            at = max(found.values(), default=-1) + 1
            first = at + 1
        else:
            at = max([first, *(found[v.cell.recorder] + 1 for v in tracer.needed if v.cell.recorder in found)])
        found[tracer.recorder] = at
        order.setdefault(at, []).append(tracer)
    return [order[at] for at in sorted(order)]


def _keeps_order(tracer: Tracer, known: dict[int, bool]) -> bool:
    """Whether a trace runs where it stands: it changes something, draws random numbers, or is finished in part."""
    body, program = tracer.recorder.body, tracer.captured
    if id(program) not in known:
        known[id(program)] = has_effects(program.graph.nodes) or bool(program.book.left)
    special = bool(body.updates) or not body.gradients.is_empty or tracer.is_decided or not tracer.is_eager
    return known[id(program)] or special or any(is_random(node) for node in body.graph.nodes)


def _sets(ready: Sequence[Ready], terms: Terms) -> Iterator[tuple[list[Ready], str]]:
    """Traces with the same inputs; and why they cannot share, empty where they can."""
    found: dict[Hashable, list[Ready]] = {}
    for one in ready:
        found.setdefault((id(one.tracer.captures.module), _inputs_key(one.tracer.inputs)), []).append(one)
    for same in found.values():
        graphs = [one for one in same if _needs_graph(one, terms)]
        if graphs and (terms.keeps_graph or len(graphs) == len(same)):
            yield same, terms.one if len(same) == 1 else terms.gradients
            continue
        if graphs:
            yield graphs, terms.gradients
        others = [one for one in same if one not in graphs]
        yield others, terms.one if len(others) == 1 else ""


def _inputs_key(leaves: Sequence[Any]) -> Hashable:
    """Equal for inputs that are the same tensors, or have the same whole numbers."""
    return tuple(map(_leaf_key, leaves))


def _leaf_key(leaf: Any) -> Hashable:
    if not isinstance(leaf, torch.Tensor):
        return type(leaf).__name__, leaf if isinstance(leaf, (bool, int, float, str, type(None))) else id(leaf)
    if leaf.is_floating_point() or leaf.is_complex() or leaf.numel() > _LARGE or leaf.layout is not torch.strided:
        return identity(leaf)
    return str(leaf.dtype), str(leaf.device), tuple(leaf.shape), leaf.stride(), tuple(leaf.flatten().tolist())


def _needs_graph(one: Ready, terms: Terms) -> bool:
    """Whether what a trace computes is to have a graph."""
    weights = one.tracer.captures.module.parameters() if terms.keeps_graph else ()
    return wants_graph(one.tracer, weights)


def wants_graph(tracer: Tracer, weights: Iterable[torch.Tensor] = ()) -> bool:
    """Whether gradients are enabled, and wanted in the body, or of its inputs, its tensors of the user's or weights."""
    if not torch.is_grad_enabled():
        return False
    given = (*flatten(tracer.inputs)[0], *tracer.recorder.constants, *weights)
    wanted = not tracer.recorder.body.gradients.is_empty
    return wanted or any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)


# -- the plan --------------------------------------------------------------------------------------------------------


def _plan(ready: Sequence[Ready], mode: str) -> tuple[Group, ...] | None:
    """How they are computed; None where nothing is gained."""
    try:
        found = planned(ready[0].tracer.captures, dict(enumerate(ready)), mode).groups
    except FxsightError:  # said again, at its line, when the trace runs alone
        return None
    shares = any(part.executable.program.results for group in found for part in group.shared)
    return found if shares or any(group.together for group in found) else None
