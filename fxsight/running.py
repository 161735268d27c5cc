"""What a block runs: its program, its inputs, what has been computed for it, and the values it fills.

``Tracer`` adds what may be said in the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.address import Address
from fxsight.asked import asked_in_all, demanded, results_of
from fxsight.auto import Backend, Tier
from fxsight.become import become
from fxsight.captures import Captures
from fxsight.context import here
from fxsight.edit import Edit
from fxsight.effects import is_random
from fxsight.errors import TraceError
from fxsight.inputs import PLAIN, Inputs, check_inputs
from fxsight.intervention import Intervention, Save
from fxsight.invoke import Batch, Invoker
from fxsight.keep import Keeper
from fxsight.known import Finish
from fxsight.lent import AS_INPUT, check_unchanged, sealed
from fxsight.lost import warn_of_lost_edits, warn_of_unused_results
from fxsight.passes.use_known import UseKnown, fingerprints
from fxsight.place import Places
from fxsight.program import Program
from fxsight.record import Recorder
from fxsight.rows import Call, Rows
from fxsight.run import Executable
from fxsight.sizes import holds
from fxsight.tree import flatten, plain_leaves
from fxsight.value import Value, values_in
from fxsight.walk import Walk


class Running:
    """One body over one call of a model, from its program to its numbers.

    call: positional and keyword arguments, as given; None where each ``invoke`` brings its own.
    inputs: what makes the call of the module of them.  edits: of the model, said before the body.
    """

    _captured: Program  # what is recorded on, with what has been opened
    _base: Program  # the same as it was captured
    _sizes: Mapping[str, int]
    _constants: Sequence[torch.Tensor]
    _asked: Intervention
    _results: list[Value]

    def __init__(
        self,
        captures: Captures,
        call: Call | None,
        backend: Backend,
        inputs: Inputs = PLAIN,
        edits: Sequence[Edit] = (),
    ) -> None:
        self.captures, self._inputs, self.edits = captures, inputs, edits
        self._invoker: Invoker | None = None  # the last
        self.asked_call = call  # in a loop of a session it may hold items, which are known when the loop runs
        check_inputs(call)
        session = here().session
        given: Call | None = session.example(call) if session and call is not None else call
        self._batch = Batch([] if given is None else [inputs.prepare(*given)], given is None, inputs)
        # what a session computes together runs op by op
        self._backend: Backend = "eager" if backend == "auto" and session is not None else backend
        self._ran: Tier | None = None  # how the values were computed
        self._known: dict[str, torch.Tensor] = {}
        self._differentiates = torch.is_grad_enabled()
        self._executable: Executable | None = None
        self._unmade: Callable[[], Executable] | None = None  # makes it, where others' programs have computed it
        self._recorder: Recorder | None = None
        self._walk: Walk | None = None
        self._finished: Finish | None = None
        self.position = session.position if session else 0
        self._skipped: list[tuple[Address, Rows | None, str]] = []
        self._keepers: list[Keeper] = []
        self._kept: list[Save] = []
        self._lent: list[torch.Tensor] = []  # the inputs, while a session waits
        self._lent_versions: list[int | None] = []

    @property
    def invoker(self) -> Invoker | None:
        """The last invoke; of a trace with an input, one that has it, while the block is open."""
        tracer: Any = self
        calls = self._batch.calls
        return Invoker(tracer, calls[0]) if self._invoker is None and calls else self._invoker

    @property
    def given(self) -> Call:
        """The call of the module, of all rows."""
        return self._batch.joined

    def forget(self) -> None:
        """Nothing of the run is kept alive by values that were not saved, nor by the tracer."""
        self._batch, self.asked_call = Batch([], False, self._inputs), None
        self._lent, self._lent_versions = [], []
        if self._known:
            self._executable = self.program.bound([], True) if self._executable is not None else None
        self._known.clear()
        if self._recorder is not None:
            self._results = []
            self._recorder.saved.clear()
            self._recorder.body.forget()

    def lend(self) -> None:
        """The inputs are the user's again, who may not change them before the session runs this."""
        leaves = flatten(self._batch.joined)[0]
        self._lent = [x for x in leaves if isinstance(x, torch.Tensor) and type(x) is not Value]
        self._lent_versions = [_torch.version(x) for x in self._lent]

    def seal(self) -> None:
        """The session runs now: what changes tensors of the user's from here on are the blocks before this one."""
        self._lent_versions = sealed(self._lent, self._lent_versions)
        self._written.body.seal()

    @property
    def _places(self) -> Places:
        return self.captures.places(self._captured)

    @property
    def _written(self) -> Recorder:
        """The recorder; what has been said so far is written down in it."""
        if self._walk is not None:
            self._walk.settle()
        if self._recorder is None:
            raise TraceError("this trace has no input yet: its values are there inside `with tracer.invoke(x):`")
        return self._recorder

    @property
    def inputs(self) -> list[Any]:
        """The leaves of all inputs, as they are given to the program; values of earlier blocks are computed for it."""
        plain = plain_leaves(*self._batch.joined)
        if plain is not None:
            return plain
        leaves: list[Any] = flatten(self._batch.joined)[0]
        for value in values_in(leaves):
            value.cell.recorder.force()
        return leaves

    @property
    def program(self) -> Executable:
        """The finished program.

        Raises: TraceError before the block has ended.
        """
        if self._finished is not None and self._executable is None:
            self._executable = self._finished.executable.bound(self._constants, False)
        if self._unmade is not None and self._executable is None:
            self._executable = self._unmade()
        if self._executable is None:
            raise TraceError("the program is finished when the block ends (in a session, when that ends): use it then")
        return self._executable

    @property
    def tier(self) -> str:
        """How the values were computed: "eager" or "inductor"."""
        program = self.program
        return self._ran or program.tier

    def _compute(
        self, executable: Executable, leaves: Sequence[Any], constants: Sequence[torch.Tensor], call: Any
    ) -> Sequence[Any]:
        """The results of a program of this block."""
        results = executable.run(leaves, constants, call)
        self._ran = executable.tier
        return results

    def run(self, wanted: Sequence[Value]) -> None:
        """Compute what was saved, and some values besides; they become plain tensors."""
        self.ask(wanted)
        self.run_asked()

    def ask(self, wanted: Sequence[Value]) -> Intervention:
        """What is to be computed: what was saved, and some values besides.  It warns of what is lost; nothing runs.

        Raises: InputError where a tensor of the user's was changed since it was used.
        """
        check_unchanged(self._lent, self._lent_versions, AS_INPUT)
        recorder = self._written
        recorder.constants  # noqa: B018 - values of earlier blocks are computed for it
        self._asked = asked = asked_in_all(recorder, wanted, self._kept)
        self._check_draws(asked)
        said = [warn_of_lost_edits(recorder.body, asked), warn_of_unused_results(recorder.body, asked)]
        recorder.has_warned |= any(said)
        self._results, self._updates = results_of(recorder, wanted), [number for number, _ in asked.updates]
        self._numbers = [v.number if v.walk is self._walk else -1 for v in self._results]
        return asked

    def run_asked(self) -> None:
        """Compute what ``ask`` has found."""
        known = [*self._written.constants, *self._known.values()]
        shared = self.captures.executable(
            self._captured, self._asked, [], self._backend, self._sizes, self._use_known()
        )
        self._executable = shared.bound(known, bool(self._known))
        self._recorder_done()
        self._made(self._executable)
        self._fill(self._compute(self._executable, self.inputs, known, self._batch.joined))

    def _made(self, executable: Executable) -> None:
        """A program is there, and about to run for the first time."""

    def take(self, results: Sequence[torch.Tensor]) -> None:
        """What ``ask`` has found, computed elsewhere: tensors of their own."""
        program, asked, sizes, constants = self._captured, self._asked, self._sizes, self._written.constants

        def made() -> Executable:
            return self.captures.executable(program, asked, [], "eager", sizes).bound(constants, False)

        self._unmade = made
        self._recorder_done()
        self._fill(results)

    def _recorder_done(self) -> None:
        self._written.phase, self._written.alive = "done", None

    def run_again(self, call: Call, wanted: Sequence[Value]) -> None:
        """The same block on another input, in a loop of a session; the first time as ``run``.

        Raises: TraceError where the input takes another way through the model.
        """
        call = self._inputs.prepare(*call)
        if self._executable is None:
            self._batch = Batch([call], False, self._inputs)
        captured, sizes = self.captures.find(*call)
        if self._executable is None and captured is self._base:
            self._sizes = sizes
            self._written.move(self._places, sizes)
            return self.run(wanted)
        fixed = self.program.fixed if self._executable is not None else {}
        if captured is not self._base or self._known or any(sizes[s] != n for s, n in fixed.items()):
            raise TraceError(
                "the elements of this loop take different ways through the model, or the block looks at sizes or "
                "numbers; write `for item in session.iter(...):`"
            )
        constants = self._written.constants
        self.program.check(sizes)
        if not holds(self.program.program, sizes):  # gradients are written out for some sizes
            shared = self.captures.executable(self._captured, self._asked, [], self._backend, sizes)
            self._executable = shared.bound(constants, False)
        return self._fill(self._compute(self.program, flatten(call)[0], constants, call))

    def _fill(self, results: Sequence[torch.Tensor]) -> None:
        """Each saved value becomes its tensor, each tensor of the user's that was changed its new value."""
        pairs: dict[int, tuple[Value, torch.Tensor]] = {}
        for value, tensor in zip(self._results, results, strict=False):
            pairs.setdefault(id(value), (value, tensor))
        for value, tensor in pairs.values():
            become(value, tensor)
        computed = iter(results[len(self._results) :])
        for keeper in self._keepers:
            keeper.fill(computed)
        constants = self._written.constants
        for number, new in zip(self._updates, results[len(results) - len(self._updates) :], strict=True):
            with torch.no_grad():
                constants[number].copy_(new)

    def _demand(self, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
        """The numbers of some nodes, now."""
        recorder, constants = self._written, self._written.constants
        asked, known = demanded(recorder, nodes), self._use_known()
        self._check_draws(asked)
        executable = self.captures.demanded(self._captured, asked, constants, self._sizes, known)
        program = executable.program
        values = executable.run_keeping(self.inputs, [*constants, *self._known.values()])
        results = [values[node.name] for node in program.results[: len(nodes)]]
        for name, mark in fingerprints(program.graph, known).items():
            if isinstance(values.get(name), torch.Tensor):
                self._known.setdefault(mark, values[name])
        return results

    def _check_draws(self, asked: Intervention) -> None:
        """Gradients flow through no known value, so that what is known is computed again.

        Raises: TraceError where random numbers would be drawn again.
        """
        if asked.backwards and self._known and any(map(is_random, self._captured.graph.nodes)):
            raise TraceError(
                "this block has a backward pass and has asked for numbers before its end, and the model draws random "
                "numbers, which would be others the second time; ask for numbers after the block"
            )

    def _use_known(self) -> UseKnown | None:
        """What has been computed for this body already, as constants after its own."""
        return UseKnown(tuple(self._known), len(self._written.constants)) if self._known else None
