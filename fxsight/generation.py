"""``with model.generate(prompt, max_new_tokens=3) as tracer``: a block over all steps of a generation.

The body runs once, before anything is generated. Each step is a trace of its own (``step``), over the program of that
call of the module; which calls there will be is known from a rehearsal. When the block ends, the module's own method
generates, on a twin of the module whose forward hands each call to its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fxsight.address import Address
from fxsight.branch import Stopped
from fxsight.cache import Cache
from fxsight.cursor import Iterations, Steps
from fxsight.encoder import BEFORE, step_title
from fxsight.errors import TraceError
from fxsight.generation_block import GenerationBlock
from fxsight.invoke import Invoker
from fxsight.keep import paths_of
from fxsight.program import Program
from fxsight.record import Recorder
from fxsight.stepping import StepEdit
from fxsight.tracer import Tracer


class Generation(GenerationBlock):
    """The block of one generation.

    result: in the block the ids that are generated, i64[batch, length]; after it what the method has returned.
    """

    # -- steps -------------------------------------------------------------------------------------------------------

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
                f"an invoke with a prompt, and steps have run already, because a number of "
                f"{step_title(self._held_at[0])} was needed ({self._held_at[1]}): write the invoke before that line"
            )

    def _take_rows(self) -> None:
        if self._prompts.grows:
            for number, step in self._steps.items():
                if number in self._ran:
                    continue
                step.take_rows(self._prompts.rows_at(step.known))
