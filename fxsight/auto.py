"""``backend="auto"``: a program runs op by op, is compiled in another process when it has run for long, and from then
on runs compiled.

    op by op ──after seconds──▶ a process compiles ──▶ both run once and are compared ──▶ compiled, by regions
                                     compiled ──whole_after seconds──▶ … in one piece, if that is faster

Each size that comes is run both ways once; what is not compiled yet, or differs by more than ``TOLERANCE``, runs op by
op. What draws random numbers or changes what it is given cannot be run twice, and is not compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from threading import local
from typing import Any, Literal

import torch

from fxsight.ahead import Ahead, Failed, first_line
from fxsight.artifacts import Artifacts
from fxsight.background import Workers
from fxsight.compiled import Lowered
from fxsight.effects import is_random, mutated_storages, storages
from fxsight.errors import TraceError
from fxsight.program import Program
from fxsight.straight import straight
from fxsight.tolerance import Difference, difference
from fxsight.varying import Varying, number_places

Backend = Literal["auto", "eager", "inductor"]
Tier = Literal["eager", "inductor"]
_BACKENDS: tuple[Backend, ...] = ("auto", "eager", "inductor")
Exact = Callable[[], Sequence[Any] | None]
GAIN = 0.98  # of the time that regions take, at most, for which one piece is worth other last bits
ROUNDS = 3  # runs of each when two ways to run are measured against each other
REMEMBERED = 4096  # sizes for which it is known how they run
_NEVER = float("inf")


def check_backend(backend: Any) -> None:
    """Raises: TraceError for what is no backend."""
    if backend not in _BACKENDS:
        raise TraceError(f"no backend {backend!r}; one of {', '.join(_BACKENDS)}")


class Use:
    """How much a program has run in one tier: runs, and seconds.  due: seconds after which more is done about it."""

    def __init__(self) -> None:
        self.runs, self.seconds, self.due = 0, 0.0, _NEVER

    def add(self, seconds: float) -> bool:
        """One run.  Returns: whether more is to be done."""
        self.runs += 1
        self.seconds += seconds
        return self.seconds >= self.due

    def __str__(self) -> str:
        return f"{self.runs} runs, {self.seconds:.3g} s"


class Auto:
    """One program that is compiled when that pays.

    program: runs op by op.  fixed: sizes that it holds for alone.  workers: None where nothing is to be compiled.
    compiles: makes the program that is compiled, of the same placeholders and results.
    tier: of the last run, in this thread.  difference: the largest that was found; None before.
    why: what keeps it from being compiled.  is_whole: whether it is compiled in one piece.
    raced: what came of one piece against regions.
    """

    def __init__(
        self,
        program: Program,
        fixed: Mapping[str, int],
        artifacts: Artifacts,
        workers: Workers | None,
        compiles: Callable[[], Program],
    ) -> None:
        self._told = local()  # how this thread has run it the last time
        self.difference: Difference | None = None
        self.is_whole, self.raced = False, ""
        self._program, self._compiles = program, compiles
        self._eager = straight(program.graph, program.name)
        self._inputs = [i for i, binding in enumerate(program.bindings.values()) if binding.kind == "input"]
        self._numbers = number_places(program)
        self._use: dict[Tier, Use] = {"eager": Use(), "inductor": Use()}
        self._compiled: Lowered | None = None
        self._known: dict[Any, bool] = {}  # sizes, and whether they run compiled
        self.why = _obstacle(program, artifacts, workers)
        if workers is not None and not self.why:
            self._rule, self._ahead = workers.rule, Ahead(self._twin, fixed, artifacts, workers)
            self._use["eager"].due = self._rule.after

    @property
    def tier(self) -> Tier:
        """How it has run the last time."""
        found: Tier = getattr(self._told, "tier", "eager")
        return found

    def __call__(self, arguments: Sequence[Any], exact: Exact | None = None) -> Sequence[Any]:
        """The results of one run.  exact: the same op by op, sooner; None where nothing does that."""
        if self._compiled is not None:
            found = self._run_compiled(self._compiled, arguments)
            if found is not None:
                return found
        start = time.perf_counter()
        sooner = None if exact is None else exact()
        results = self._eager(*arguments) if sooner is None else sooner
        self._told.tier = "eager"
        if self._use["eager"].add(time.perf_counter() - start):
            self._look(arguments, results)
        return results

    def explain(self) -> str:
        """How often it has run in which tier, and why not compiled; the difference; one piece against regions."""
        lines = [f"{tier}: {use}" for tier, use in self._use.items()]
        how = "in one piece" if self.is_whole else "by regions"
        lines += [f"compiled {how}"] if self._compiled is not None else []
        lines += [f"op by op: {self.why}"] if self.why else []
        lines += [f"largest difference: {self.difference}"] if self.difference is not None else []
        lines += [f"in one piece: {self.raced}"] if self.raced else []
        return "\n".join(lines)

    # -- by regions --------------------------------------------------------------------------------------------------

    def _run_compiled(self, compiled: Lowered, arguments: Sequence[Any]) -> Sequence[Any] | None:
        """The results; None where these arguments run op by op."""
        if not self._known.get(self._key(arguments)) or _has_history(arguments):
            return None
        start = time.perf_counter()
        try:
            results = compiled(*arguments)
        except Exception as error:
            self._eager(*arguments)  # where this raises, too, that is the error
            self._stop(f"what is compiled has failed: {first_line(error)}")
            return None
        self._told.tier = "inductor"
        if self._use["inductor"].add(time.perf_counter() - start):
            self._look_whole(compiled, arguments)
        return results

    def _look(self, arguments: Sequence[Any], exact: Sequence[Any]) -> None:
        """After a run op by op: run it compiled, too, where that can be, and compare."""
        use, key = self._use["eager"], self._key(arguments)
        use.due = use.seconds + self._rule.look
        if key in self._known:
            return
        if _has_history(arguments):
            self.why = "its results have a history of gradients: trace it under torch.no_grad()"
            use.due = use.seconds + self._rule.after
            return
        try:
            self.is_whole = self.is_whole or (self._compiled is None and self._ahead.is_one())
            found = self._ahead.run(key, arguments, self.is_whole, self._compiled)
        except Failed as failed:
            self._lack(key, str(failed))
            return
        if found is None:
            self.why = "it is being compiled, or waits for another program"
        elif self._agrees(exact, found[1]):
            self._serve(found[0], arguments)

    def _serve(self, compiled: Lowered, arguments: Sequence[Any]) -> None:
        if self._compiled is None and not self.is_whole and self._rule.whole_after is not None:
            self._use["inductor"].due = self._rule.whole_after
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self.why, self._compiled, self._use["eager"].due = "", compiled, 0.0
        self._known[self._key(arguments)] = True

    def _lack(self, key: Any, why: str) -> None:
        """These sizes run op by op from now on; all do, where nothing has been compiled yet."""
        self.why, self._known[key] = why, False
        if self._compiled is None:
            self._stop(why)

    def _agrees(self, exact: Sequence[Any], found: Sequence[Any]) -> bool:
        now = difference(exact, found)
        self.difference = now if self.difference is None else self.difference | now
        if not now.is_within:
            self._stop(f"compiled results differ by more than lower.TOLERANCE: {now}")
        return now.is_within

    def _stop(self, why: str) -> None:
        """Op by op from now on."""
        self.why, self._compiled = why, None
        self._use["eager"].due = self._use["inductor"].due = _NEVER

    def _twin(self) -> Program:
        """What is compiled: fewer rows may be computed in it, for as many results."""
        made = self._compiles()
        is_same = list(made.bindings.items()) == list(self._program.bindings.items())
        return made if is_same else self._program

    def _key(self, arguments: Sequence[Any]) -> Any:
        """The sizes of a run, and the numbers that what is compiled has written into it."""
        given = [arguments[i] for i in self._inputs]
        shapes = tuple([x.shape if isinstance(x, torch.Tensor) else x for x in given])
        if not self._numbers:
            return shapes
        seen = self._compiled.seen if isinstance(self._compiled, Varying) else ()
        return (shapes, tuple([repr(arguments[i]) for i in self._numbers if i in seen]))

    # -- in one piece ------------------------------------------------------------------------------------------------

    def _look_whole(self, regions: Lowered, arguments: Sequence[Any]) -> None:
        """After a compiled run: run it compiled in one piece, too, where that can be, and keep the faster."""
        use = self._use["inductor"]
        use.due = use.seconds + self._rule.look
        try:
            found = self._ahead.run("whole", arguments, True)
        except Failed as failed:
            self.raced, use.due = str(failed), _NEVER
            return
        if found is None:
            return
        use.due, now = _NEVER, difference(self._eager(*arguments), found[1])
        if not now.is_within:
            self.raced = f"results differ by more than lower.TOLERANCE: {now}"
            return
        slow, fast = _race(regions, found[0], arguments)
        is_worth_it = fast < GAIN * slow
        kept = "one piece" if is_worth_it else "regions"
        self.raced = f"{fast * 1e3:.3g} ms, by regions {slow * 1e3:.3g} ms: {kept} kept"
        if is_worth_it:
            self.difference, self.is_whole, self._compiled = now, True, found[0]
            self._known = {self._key(arguments): True}


def _obstacle(program: Program, artifacts: Artifacts, workers: Workers | None) -> str:
    """What keeps a program from ever being compiled, if anything is known to."""
    if workers is None:
        return "the model has background=None"
    if artifacts.folder is None:
        return "there is no folder for what is compiled: the model has cache=False"
    if any(map(is_random, program.graph.nodes)):
        return "it draws random numbers"
    changed = mutated_storages(program.graph.nodes)
    if any(storages(node) & changed for node in program.graph.nodes if node.op == "placeholder"):
        return "it changes what it is given"
    return ""


def _has_history(arguments: Sequence[Any]) -> bool:
    """Whether results are to have a history of gradients, which nothing that is compiled gives."""
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)


def _race(one: Lowered, other: Lowered, arguments: Sequence[Any]) -> tuple[float, float]:
    """The fastest run of each, in seconds; they take turns."""
    pairs = [(_seconds(one, arguments), _seconds(other, arguments)) for _ in range(ROUNDS)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)


def _seconds(run: Lowered, arguments: Sequence[Any]) -> float:
    is_on_gpu = torch.cuda.is_available()
    if is_on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(*arguments)
    if is_on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
