"""What a generation runs: its steps, made as they are named, and the calls that they are.

``Generation`` adds what may be said in the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxsight.address import Address
from fxsight.auto import Backend
from fxsight.captures import Captures
from fxsight.cursor import Cursor
from fxsight.edit import Edit
from fxsight.encoder import BEFORE, step_title
from fxsight.errors import TraceError
from fxsight.known import Step as Way
from fxsight.lines import user_line
from fxsight.past import pasts_in
from fxsight.performance import Performance
from fxsight.prompted import NO_PROMPT, Prompted
from fxsight.rehearsal import Known
from fxsight.repertoire import Score
from fxsight.rows import Call
from fxsight.run import Executable
from fxsight.step import Step
from fxsight.twin import encoder_path
from fxsight.value import Value


class Generating:
    """The steps of one generation, from what is known of them to what the method returns.

    prompts: what is generated from.  edits: of the model, said in each step.  method: of the module.
    """

    _is_result = False  # whether anything is said of the ids

    def __init__(
        self, captures: Captures, prompts: Prompted, backend: Backend, edits: Sequence[Edit], method: str
    ) -> None:
        self.captures, self.edits, self.method = captures, edits, method
        self.backend: Backend = "inductor" if backend == "inductor" else "eager"
        self.cursor = Cursor()
        self._prompts = prompts
        self._known: Score | None = None
        self._steps: dict[int, Step] = {}
        self._performance: Performance | None = None
        self._ran: set[int] = set()
        self._held_at = (0, "")  # the step of which a number was asked for, and where
        self._is_held = False  # whether steps run that values may be held of
        self._wanted: dict[int, list[Value]] | None = None
        self._stop: tuple[int, str] | None = None
        self._prepared: dict[int, list[Any]] = {}
        self._has_ended = False

    def touch(self) -> None:
        """Something is read or written."""
        self._prompts.touch()

    @property
    def _score(self) -> Score:
        if self._known is None:
            raise TraceError(NO_PROMPT)
        return self._known

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
                f"{step_title(number)} has run already, because a number of {step_title(self._held_at[0])} "
                f"was needed ({self._held_at[1]}): say before that line what is to be read or "
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


def ids_in(returned: Any) -> torch.Tensor:
    """The ids in what a method returns."""
    found: torch.Tensor = returned if isinstance(returned, torch.Tensor) else returned.sequences
    return found
