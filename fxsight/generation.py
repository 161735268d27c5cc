"""``with model.generate(prompt, max_new_tokens=3) as tracer``: a block over all steps of a generation.

The body runs once, before anything is generated. Each step is a trace of its own (``step``), over the program of that
call of the module; which calls there will be is known from a rehearsal. When the block ends, the module's own method
generates, on a twin of the module whose forward hands each call to its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch

from fxsight.address import Address
from fxsight.branch import Stopped
from fxsight.cache import Cache
from fxsight.captures import Captures
from fxsight.containers import list as SavedList
from fxsight.containers import thaw
from fxsight.context import enter_trace, here, leave_trace
from fxsight.cursor import Cursor, Iterations, Steps
from fxsight.edit import Edit
from fxsight.encoder import BEFORE
from fxsight.errors import TraceError
from fxsight.invoke import Invoker
from fxsight.keep import paths_of
from fxsight.lines import user_line
from fxsight.past import pasts_in
from fxsight.performance import Performance
from fxsight.program import Program
from fxsight.prompted import NO_PROMPT, Prompted
from fxsight.record import Recorder
from fxsight.rehearsal import Known
from fxsight.repertoire import Repertoire, Score
from fxsight.rows import Call
from fxsight.run import Executable
from fxsight.running import Backend
from fxsight.step import Step
from fxsight.stepping import StepEdit
from fxsight.tracer import Tracer
from fxsight.twin import encoder_path
from fxsight.value import Value, values_in
from fxsight.walk import Step as Way


class Generation:
    """The block of one generation.

    prompts: what is generated from, which invokes may bring.  method: of the module, ``generate``.
    result: in the block the ids that are generated, i64[batch, length]; after it what the method has returned.
    """

    def __init__(
        self,
        captures: Captures,
        prompts: Prompted,
        backend: Backend,
        edits: Sequence[Edit],
        repertoire: Repertoire,
        method: str = "generate",
    ) -> None:
        self.captures, self.edits, self.method = captures, edits, method
        self.backend: Backend = backend
        self.cursor = Cursor()
        self.position = 0
        self._prompts, self._repertoire = prompts, repertoire
        self._known: Score | None = None
        self._outside: Any = None
        self._performance: Performance | None = None
        self._ran: set[int] = set()
        self._held_at = (0, "")
        self._is_held = False
        self._wanted: dict[int, list[Value]] | None = None
        self._stop: tuple[int, str] | None = None
        self._caches: list[tuple[Cache, dict[int, Cache]]] = []
        self._steps: dict[int, Step] = {}
        self._template: Tracer | None = None
        self._saved: list[Any] = []
        self._prepared: dict[int, list[Any]] = {}
        self._returned: Any = None
        self._has_ended = False

    # -- the block ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Generation:
        session = here().session
        if session is not None and session.is_written_down:
            raise TraceError(
                "generate in a block that is written once for all elements: write `for item in session.iter(...):`"
            )
        if self._prompts.calls:
            self._known = self._rehearsed()
        enter_trace(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        leave_trace(self)
        stopped = isinstance(error, Stopped) and error.block is self
        try:
            if error is None or stopped:
                self._end()
        finally:
            for step in self._steps.values():
                step.end()
            self._steps.clear()
            self._saved.clear()
            self._prepared.clear()
            self._caches.clear()
            self._has_ended, self._performance = True, None
        return stopped or None

    def _rehearsed(self) -> Score:
        score = self._repertoire.of(self.captures, self.method, self._prompts.call)
        self._prompts.check(score.steps[0])
        return score

    @property
    def _score(self) -> Score:
        if self._known is None:
            raise TraceError(NO_PROMPT)
        return self._known

    def _end(self) -> None:
        if self._known is None:
            raise TraceError("generate() needs a prompt, or at least one `with tracer.invoke(prompt):` block")
        self._keep_containers()
        session = here().session
        if session is not None:
            session.force()
        self._is_held = session is not None  # values of it may be used in the session
        for number, step in self._steps.items():
            if number not in self._ran and not self._is_held:
                step.close()
        self._returned = self.run()
        for cache, steps in self._caches:
            cache.join(steps)
        self._drop_unreached()

    def alone(self) -> Any:
        """Without a block: what the method returns, with the edits of the model."""
        with self:
            pass
        return self._returned

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """Let the module's method generate, each step with what was said of it.  Returns: what the method returns."""
        returned = self._performing().finish()
        self._wanted = self._needed()
        made, stop = self._performing().made, self._stop
        why = f"ended after {made} steps, the last of which is {made - 1}: every row had come to its end"
        if stop is not None and made == stop[0] + 1:
            why = f"was stopped at step {stop[0]} ({stop[1]})"
        for number, step in self._steps.items():
            if made <= number < self.count:
                step.unreached(f"belongs to step {number}, and this generation {why}")
        if self.count in self._steps and self.count not in self._ran:
            self._drive(self.count, ((ids_in(returned),), {}))
        return returned

    def _performing(self) -> Performance:
        if self._performance is None:
            self._performance = Performance(self.captures.module, self.method, self._prompts.call, self._drive)
        self._performance.last = None if self._stop is None else self._stop[0]
        return self._performance

    def _needed(self) -> dict[int, list[Value]]:
        """The values of each step that later ones use."""
        found: dict[int, list[Value]] = {}
        for step in self._steps.values():
            for value in step.foreign:
                series = value.cell.recorder.series
                if series is not None:
                    found.setdefault(series[1], []).append(value)
        return found

    def _drive(self, number: int, call: Call) -> Any:
        """One call, with what was said of its step; of the step that comes after all, the ids."""
        step, is_known = self._steps.get(number), number <= self.count
        if step is None and is_known and (self._edits_of(number) or (self.backend == "inductor" and number != BEFORE)):
            step = self.step(number)
        self._ran.add(number)
        if step is None or not is_known:
            path = encoder_path(self.captures.module) if number == BEFORE else ""
            return self.captures.module.get_submodule(path)(*call[0], **call[1])
        if self._is_held:
            wanted: Sequence[Value] = step.held()
        else:
            if self._wanted is None:
                self._wanted = self._needed()
            wanted = self._wanted.get(number, ())
        step.close()
        return step.drive(call, wanted)

    def call_of(self, number: int) -> Call | None:
        """The call of a step, before it is made; those before it are made now, with what has been said of them so far.

        None where it cannot be known before the block ends: with a cache of the user's, and with beams.
        """
        if next(pasts_in(self._prompts.call), None) is not None or (
            number > 0 and self._prompts.beams(self.captures.module) > 1
        ):
            return None
        self._is_held, performing = True, self._performing()
        self._held_at = (number, user_line())
        try:
            call = performing.until(number)
        finally:
            self._is_held = False
        if call is None and number == self.count:
            call = ((ids_in(performing.returned),), {})
        return call

    def reaches(self, step: int) -> bool:
        """Whether the generation comes to a step, as far as it is known: where steps have run, those before are run."""
        performing = self._performance
        if performing is None or not performing.made or step < performing.made:
            return True
        return self.call_of(step) is not None

    # -- steps -------------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many steps there are at most."""
        return len(self._score.steps)

    def step(self, number: int) -> Step:
        """One of the steps.

        Raises: TraceError for one that this generation cannot have.
        """
        if number in self._ran and not self._has_ended:
            raise TraceError(
                f"{'the encoder' if number == BEFORE else f'step {number}'} has run already, because a number of step "
                f"{self._held_at[0]} was needed ({self._held_at[1]}): say before that line what is to be read or "
                "changed in it"
            )
        return self._step(number)

    def _step(self, number: int) -> Step:
        found = self._steps.get(number)
        if found is None:
            known, encoder = self._known_of(number), self._score.encoder
            captures = encoder.captures if encoder is not None and number == BEFORE else self.captures
            found = self._steps[number] = Step(self, number, known, captures, self._edits_of(number))
            if self._prompts.grows:
                found.take_rows(self._prompts.rows_at(known))
        return found

    def meant(self, address: Address) -> Step:
        """The step that is meant for a place: at step 0 there is the encoder, too, which runs before it.

        Raises: TraceError as ``step``, and for a module that the encoder and the decoder call.
        """
        number = self.cursor.at(address.module)
        if number == 0 and self._is_encoded(address):
            number = BEFORE
        elif number > 0:
            self.check_repeats(address)
        return self.step(number)

    def _is_encoded(self, address: Address) -> bool:
        encoder = self._score.encoder
        return encoder is not None and encoder.is_meant(address, self._score.steps[0].program)

    def check_repeats(self, address: Address) -> None:
        """Raises: TraceError for a module of the encoder alone, which has no further steps."""
        encoder = self._score.encoder
        if encoder is not None and encoder.has(address) and encoder.is_alone(address, self._score.steps[0].program):
            raise TraceError(
                f"{address.place}: the encoder runs once, before step 0: read and write it outside the loop over steps"
            )

    def _known_of(self, number: int) -> Known:
        score = self._score
        if number == BEFORE and score.encoder is not None:
            return score.encoder.known
        known = [*score.steps, *([score.result] if self._is_result and score.result else [])]
        if number >= len(known):
            raise TraceError(
                f"step {number}: this generation has {self.count} steps at most, 0 to {self.count - 1}; ask for "
                "more with max_new_tokens"
            )
        return known[number]

    def _edits_of(self, number: int) -> Sequence[Edit]:
        """The edits of the model that are made at one step."""
        encoder = self._score.encoder
        own = [] if encoder is None else encoder.own(self.edits, self._score.steps[0].program)
        if number == BEFORE:
            return own
        return [edit for edit in self.edits if edit not in own] if number < self.count else ()

    _is_result = False

    def root(self, known: Known, line: str) -> Way:
        """Where bodies begin that begin at a line, over a program."""
        return self._score.roots.setdefault((id(known.program), line, self.backend == "inductor"), Way())

    @property
    def names(self) -> Mapping[int, str]:
        """Names of the module's weights by ``id``."""
        return self._score.watch.names

    def prepared(self, executable: Executable) -> list[Any]:
        """The arguments of a program with the weights among them, looked up once in a generation."""
        found = self._prepared.get(id(executable))
        if found is None:
            found = self._prepared[id(executable)] = executable.prepared()
        return found

    @property
    def now(self) -> Tracer:
        """The step that is meant now, or what stands for several."""
        return self._template or self._step(self.cursor.at(""))

    @property
    def iter(self) -> Iterations:
        """Steps by number: ``for step in tracer.iter[1:3]:``; ``[2]``, ``[[0, 2]]`` and ``[:]`` as well."""
        return Iterations(self)

    def all(self) -> Steps:
        """All steps: ``for step in tracer.all():``."""
        return Steps(self, slice(None))

    def next(self) -> Generation:
        """From here on the step after the present one is meant.  Returns: itself."""
        self.cursor.move("")
        return self

    def open_template(self, steps: Sequence[int]) -> Callable[[bool], None]:
        """What is said from now on is an edit of all these steps.  Returns: ends that.

        Raises: TraceError inside an invoke with a prompt.
        """
        if self._prompts.open is not None and self._prompts.open.has_input:
            raise TraceError("`with` over steps inside an invoke: write a loop, `for step in tracer.all():`")
        known = self._score.steps[steps[0]] if steps else self._score.steps[0]
        template = self._template = StepEdit(self, steps[0] if steps else 0, known)

        def leave(is_done: bool) -> None:
            self._template = None
            if is_done and steps:
                for edit in template.made():
                    for number in steps:
                        self.step(number).replay(edit)

        return leave

    # -- what users ask ----------------------------------------------------------------------------------------------

    @property
    def result(self) -> Any:
        """In the block the ids that are generated, prompt included, i64[batch, length]; after it what was returned.

        Raises: TraceError in the block when more than ids is returned.
        """
        if self._has_ended:
            return self._returned
        if self._score.result is None:
            raise TraceError(
                "this generation returns more than ids (return_dict_in_generate): read tracer.result after the block"
            )
        self._is_result = True
        return Tracer.read(self.step(self.count), Address(""), "output")

    @property
    def recorder(self) -> Recorder:
        """What the body is written down in."""
        return self.now.recorder

    @property
    def captured(self) -> Program:
        """The program of the present step."""
        return self.now.captured

    def at(self, address: str | Address) -> Any:
        """The place of an address, at the present step."""
        return self.now.at(address)

    def save(self, value: Any) -> None:
        """Keep every value of a structure, those put into it later, too."""
        self._saved.append(value)

    def log(self, *values: Any) -> None:
        """Print values: those that are known now."""
        print(*values)

    def cond(self, condition: Any) -> Any:
        """A block that counts only if a condition holds: one on the step, which is known now."""
        return self.now.cond(condition)

    def barrier(self, count: int = 0) -> Any:
        """Accepted, and not needed: values flow between steps as data.  Returns: a function that does nothing."""
        return lambda: None

    def check_alive(self) -> None:
        """As in a trace."""
        self.now.check_alive()

    def stop(self) -> NoReturn:
        """End the block here, and the generation at this step; outside a loop, at the last that the block has named.

        That step is run as far as is asked, and makes no token: the result are the tokens before it.

        Raises: TraceError for beams.
        """
        self.check_alive()
        named = [number for number in self._steps if number < self.count]
        number = max([0, *named]) if self.cursor.is_plain else self.cursor.at("")
        self.stop_at(number)
        raise Stopped(self)

    def stop_at(self, number: int) -> None:
        """A step is the last.

        Raises: TraceError for beams.
        """
        number = max(number, 0)
        if self._prompts.beams(self.captures.module) > 1:
            raise TraceError("stopping a generation with beams: no row is a text before all have come to their end")
        if self._stop is None or number < self._stop[0]:
            self._stop = (number, user_line())

    def is_last(self, number: int) -> bool:
        """Whether the generation ends at a step."""
        return self._stop is not None and self._stop[0] == number

    def cache(self, modules: Any = None, **options: Any) -> Cache:
        """Keep what modules return, at every step; in a loop over steps at the present one.  Arguments: of a trace's.

        What is kept of a module is a list, with an entry for each of its calls, in the order of the steps;
        ``cache.step(n)`` are those of one step.

        Raises: UnknownAddress for a path that the model does not have; TraceError in ``with`` over steps.
        """
        if self._template is not None:
            raise TraceError("tracer.cache() in `with` over steps: write it before, or in a loop over steps")
        numbers = list(range(self.count)) if self.cursor.is_plain else [self.cursor.at("")]
        module, encoder = self.captures.module, self._score.encoder
        asked = paths_of(modules, module, self.captures.shared.aliases)
        steps: dict[int, Cache] = {}
        if encoder is not None and 0 in numbers:
            names = asked or {path for path, _ in module.named_modules()}
            own = sorted(path for path in names if encoder.has(Address(path)))
            if own:
                steps[BEFORE] = Tracer.cache(self.step(BEFORE), own, **options)
        for number in numbers:
            steps[number] = Tracer.cache(self.step(number), modules, **options)
        cache = Cache(self.captures.shared.aliases)
        self._caches.append((cache, steps))
        return cache

    # -- invokes -----------------------------------------------------------------------------------------------------

    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """A block for prompts of its own: all run as one batch, and each block sees and edits its rows, at each step.

        Without prompts: a block that sees all rows.  Raises: as ``Prompted.invoker``.
        """
        return self._prompts.invoker(self, args, kwargs)

    @property
    def tokens(self) -> Any:
        """The tokens of the prompts, of an invoke in its block: ``tracer.tokens("Eiffel Tower").last``."""
        return self._prompts.tokens

    def touch(self) -> None:
        """Something is read or written."""
        self._prompts.touch()

    def enter_invoke(self, invoker: Invoker) -> None:
        """The rows of an invoke are read and written from now on, at step 0 where no other is named.

        Raises: TraceError inside another invoke or a loop over steps, where its prompts cannot join the others, and for
        beams.
        """
        if invoker.has_input and (self.cursor.step is not None or self._template is not None):
            raise TraceError("an invoke with a prompt in a loop over steps: write the loop in the invoke")
        self._prompts.enter(invoker)
        if invoker.has_input:
            self._grow()
        self._outside = self.cursor.go(self.cursor.step, {})
        self._take_rows()

    def leave_invoke(self) -> None:
        """All rows are read and written from now on."""
        self._prompts.leave()
        self.cursor.go(*self._outside)
        self._take_rows()

    def _grow(self) -> None:
        """More rows: what is known of each step is another, and what has been said of it stays."""
        try:
            self._check_nothing_ran()
            self._prompts.check_order(self.captures.module)
            score = self._rehearsed()
            if self._steps and len(score.steps) != self.count:
                raise TraceError(
                    f"with the prompts of this invoke there are {len(score.steps)} steps, and without {self.count}: "
                    "prompts are padded to one length; say how many with max_new_tokens"
                )
        except BaseException:
            self._prompts.withdraw()
            raise
        self._known, self._performance = score, None
        for number, step in sorted(self._steps.items()):
            step.grow(self._known_of(number))

    def _check_nothing_ran(self) -> None:
        if self._ran:
            raise TraceError(
                f"an invoke with a prompt, and steps have run already, because a number of step {self._held_at[0]} was "
                f"needed ({self._held_at[1]}): write the invoke before that line"
            )

    def _take_rows(self) -> None:
        if self._prompts.grows:
            for number, step in self._steps.items():
                if number in self._ran:
                    continue
                step.take_rows(self._prompts.rows_at(step.known))

    # -- containers --------------------------------------------------------------------------------------------------

    def _keep_containers(self) -> None:
        for container in self._saved:
            for value in values_in(thaw(container)):
                value.save()

    def _drop_unreached(self) -> None:
        """What a kept list was given at steps that did not run is not in it."""
        for container in self._saved:
            if isinstance(container, SavedList):
                container[:] = [x for x in container if type(x) is not Value]


def ids_in(returned: Any) -> torch.Tensor:
    """The ids in what a method returns."""
    found: torch.Tensor = returned if isinstance(returned, torch.Tensor) else returned.sequences
    return found
