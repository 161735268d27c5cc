"""The prompts of a generation: given at once, or brought by its invokes, each of which has rows of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fxsight.errors import TraceError
from fxsight.inputs import Inputs, check_inputs
from fxsight.invoke import Batch, Invoker
from fxsight.rehearsal import Known
from fxsight.rows import Call, Rows, batch_size
from fxsight.spec import number

NO_PROMPT = "this generation has no prompt yet: its values are there inside `with tracer.invoke(prompt):`"


class Prompted(Batch):
    """What one generation is given, as it comes.

    call: the prompts as arguments of the module; None where each invoke brings its own.
    options: the other arguments of ``generate``.  inputs: how several prompts become one batch.
    """

    def __init__(self, call: Call | None, options: Mapping[str, Any], inputs: Inputs) -> None:
        super().__init__([] if call is None else [call], call is None, inputs)
        self._options = options

    @property
    def call(self) -> Call:
        """The arguments of the method, prompts of all rows among them.

        Raises: TraceError before the first invoke of a generation without prompts.
        """
        if not self.calls:
            raise TraceError(NO_PROMPT)
        args, kwargs = self.joined
        return args, {**kwargs, **self._options}

    @property
    def tokens(self) -> Any:
        """The tokens of the open invoke, else of all prompts.

        Raises: TraceError before the first prompt.
        """
        if not self.calls:
            raise TraceError(NO_PROMPT)
        own = self.open is not None and self.open.has_input
        return self._inputs.tokens(self.open.call if own and self.open is not None else self.joined)

    def invoker(self, trace: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Invoker:
        """A block for some prompts; without, for all rows.

        Raises: InputError for what is no prompt; TraceError where the generation has prompts already.
        """
        check_inputs((args, kwargs))
        if not args and not kwargs:
            return Invoker(trace, ((), {}))
        if not self.grows:
            raise TraceError(
                "this generation has its prompts from generate(...): write model.generate(max_new_tokens=...) and an "
                "invoke for each prompt"
            )
        return Invoker(trace, self._inputs.prepare(args, kwargs))

    def check(self, known: Known) -> None:
        """Whether the module looks at the mask that hides padding.  known: its first step.

        Raises: TraceError.
        """
        self._inputs.check(known.program, self.joined)

    def beams(self, module: Any) -> int:
        """How many beams there are for each prompt."""
        given = self.call[1]
        places = (given, vars(given.get("generation_config") or object), vars(module.generation_config))
        return next((int(place["num_beams"]) for place in places if place.get("num_beams") is not None), 1)

    def check_order(self, module: Any) -> None:
        """Whether a row is of the same prompt at each step.

        Raises: TraceError for beams.
        """
        beams = self.beams(module)
        if beams > 1 or self.call[1].get("custom_generate") is not None:
            said = f"num_beams={beams}" if beams > 1 else "custom_generate"
            raise TraceError(
                f"an invoke with a prompt, and {said}: rows change their places from step to step, so none of them "
                "belongs to one prompt; give all prompts to generate(...) and edit all rows"
            )

    def rows_at(self, known: Known) -> Rows | None:
        """The rows of the open invoke at one step; None for all.

        Raises: TraceError where the module has no rows for each prompt there.
        """
        if self.open is None or not self.open.has_input:
            return None
        rows = self.rows_of(known.program, known.sizes)
        times, rest = divmod(number(batch_size(known.program), known.sizes), rows.total)
        if rest or not times:
            raise TraceError(
                f"{known.program.name} has {times * rows.total + rest} rows at this step for {rows.total} prompts: "
                "they belong to no invoke"
            )
        return replace(rows, start=rows.start * times, stop=rows.stop * times, total=rows.total * times)

    def withdraw(self) -> None:
        """The prompts that came last do not join after all."""
        self.calls.pop()
        self.leave()
        if self.calls:
            self.joined = self._inputs.join(self.calls)
