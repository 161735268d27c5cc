"""One trace: ``with model.trace(...) as tracer``, and what may be said inside.

Entering finds the program (captured once), the body records, leaving compiles the intervention in, runs it, and turns
what was saved into plain tensors: in place, for every variable that holds them. Inside a session the running waits for
the session's end.

    Tracer        what may be said in the block    (this file)
    Block         enter and leave                  (``block``)
    Statements    reads and writes, written down   (``statements``)
    Running       program, inputs and results      (``running``)
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NoReturn

import torch

from fxsight.address import Address
from fxsight.at import At
from fxsight.block import Block
from fxsight.branch import Branch, Stopped
from fxsight.cache import Cache
from fxsight.errors import TraceError
from fxsight.inputs import check_inputs
from fxsight.invoke import Invoker
from fxsight.keep import Asked, Keeper, paths_of
from fxsight.lines import user_line
from fxsight.record import Recorder
from fxsight.statements import is_inside
from fxsight.value import values_in


class Tracer(Block):
    """The trace of one body over one call of a model.

    call: positional and keyword arguments, as given; None where each ``invoke`` brings its own.
    program: after the block, the finished program: printable, callable on new inputs (returns the saves in order).
    tier: how the values were computed: "eager" (bitwise the model's own) or "inductor" (``lower.TOLERANCE``).
    """

    @property
    def now(self) -> Tracer:
        """What reads and writes go to: the trace itself, or a step of it."""
        return self

    @property
    def tokens(self) -> Any:
        """The tokens of the prompts of this block, or of this invoke: ``tracer.tokens("Eiffel Tower").last``.

        Raises: TraceError for a model that is no LanguageModel, and before the first invoke.
        """
        open_ = self._batch.open
        if not self._batch.calls:
            raise TraceError("this trace has no input yet: its tokens are there inside `with tracer.invoke(x):`")
        return self._inputs.tokens(open_.call if open_ is not None and open_.has_input else self._batch.joined)

    @property
    def result(self) -> Any:
        """What the whole call returns: the root module's output."""
        return self.read(Address(""), "output")

    def stop(self) -> NoReturn:
        """End the block here: what comes after it in the block is not done, and nothing only it needs is run."""
        self.check_alive()
        raise Stopped(self)

    def to_next(self, path: str) -> None:
        """Raises: TraceError: a trace has one step."""
        raise TraceError(f"{path or 'the model'}.next(): a trace has one step; steps are model.generate(...)'s")

    def check_alive(self) -> None:
        """In a branch not taken: end the branch, where something asks for the end of the block or of the session."""
        if self._recorder is not None and self._recorder.in_dead_branch:
            raise Stopped(self._recorder)

    def log(self, *values: Any) -> None:
        """Print values, now; numbers that are needed for it are computed now."""
        if not self.recorder.in_dead_branch:
            print(*values)

    def cache(
        self,
        modules: Iterable[Any] | Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
    ) -> Cache:
        """Keep what modules return, as it is after all edits of this block; there when the block ends, without saving.

        It may stand anywhere in the block; inside an invoke it keeps the rows of this invoke.
        modules: views or paths; None for all that the forward calls.  device, dtype: of the kept tensors (dtype: of
        the floating-point ones); None for those of the model.  detach: without their history of gradients.

        Raises: UnknownAddress for a path that the model does not have.
        """
        root, ports = self.captures.module, (("output", include_output), ("inputs", include_inputs))
        if self._walk is not None:
            self._walk.leave()  # what a cache keeps is not remembered
        rows = None if self._recorder is None else self._recorder.rows
        where = None if device is None else torch.empty(0, device=device).device  # "cuda" is the present "cuda:n"
        kept = tuple(port for port, wanted in ports if wanted)
        aliases = self.captures.shared.aliases
        asked = Asked(paths_of(modules, root, aliases), kept, where, dtype, detach, rows, user_line())
        cache = Cache(aliases)
        if self._recorder is not None and self._recorder.in_dead_branch:
            cache.void("it belongs to a branch whose condition was false")
        else:
            self._keepers.append(Keeper(cache, asked, root, self.captures.weight))
        return cache

    def cond(self, condition: Any) -> AbstractContextManager[None]:
        """A block whose edits and saves count only if the condition holds: ``with tracer.cond(h.sum() > 0):``.

        condition: a plain value, or a value of the trace, whose number is computed now. Plain ``if`` does the same
        and runs nothing of the other branch; here the block itself is run by Python in any case.
        """
        return Branch(self.recorder, condition)

    # -- invokes -----------------------------------------------------------------------------------------------------

    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """A block for rows of its own: several inputs run as one batch, and each block sees and edits its rows.

        Without input: a block that sees the whole batch.
        """
        check_inputs((args, kwargs))
        for value in values_in((args, kwargs)):  # rows are joined now
            value.cell.recorder.force()
        return Invoker(self, self._inputs.prepare(args, kwargs) if args or kwargs else ((), {}))

    def barrier(self, count: int = 0) -> Any:
        """Accepted, and not needed: values flow between invokes as data.  Returns: a function that does nothing."""
        return lambda: None

    def enter_invoke(self, invoker: Invoker) -> None:
        """The rows of an invoke are read and written from now on.

        Raises: TraceError inside another invoke, or where its input cannot join the batch.
        """
        self._batch.enter(invoker)
        self._invoker = invoker
        if not invoker.has_input:
            self.recorder.rows = None
            return
        if self._walk is None:
            self._begin()
        else:
            self._grow(self.recorder)
        rows = self._batch.rows_of(self._captured, self._sizes)
        self.recorder.body.looked |= rows.names
        self.recorder.rows = rows

    def leave_invoke(self) -> None:
        """All rows are read and written from now on."""
        self._batch.leave()
        if self._walk is not None:
            self.recorder.rows = None

    def _grow(self, recorder: Recorder) -> None:
        """More rows: the program for all of them, which may be another than for the rows before.

        Raises: TraceError where the body has looked at a shape that longer rows change.
        """
        captured, sizes = self.captures.find(*self._batch.joined)
        self._inputs.check(captured, self._batch.joined)
        self._resize(recorder, captured, sizes)

    # -- what views ask ----------------------------------------------------------------------------------------------

    def meant(self, address: Address) -> Tracer:
        """Where reads and writes of a place go: the trace itself, or a step of a generation."""
        return self

    def at(self, address: str | Address) -> At:
        """The place of an address, with ``output``, ``input`` and ``inputs`` to read and write.

        Raises: AddressError, UnknownAddress, NotExecuted.
        """
        asked = Address.parse(address) if isinstance(address, str) else address
        own = replace(asked, module=self.captures.shared.aliases.resolve(asked.module))
        return At(self, self.meant(own).place(own).address)

    def read(self, address: Address, port: str) -> Any:
        """The value at a port of a place: values, in the structure that the model has there.

        Raises: UnknownAddress, NotExecuted; TraceError when the block has ended.
        """
        self._batch.touch()
        walk = self._walk
        if walk is not None and walk.live:
            return walk.read(address, port)
        if walk is not None and walk.ended:
            raise TraceError(f"{address.at(port)} has a value only inside a trace: with model.trace(...):")
        return self.do_read(address, port)

    def write(self, address: Address, port: str, value: Any) -> None:
        """Let a port of a place have another value.

        Raises: WriteError, CausalityError at the user's line.
        """
        self._batch.touch()
        walk = self._walk
        if walk is not None and walk.live:
            walk.write(address, port, value)
        else:
            self.do_write(address, port, value)

    def skip(self, address: Address, value: Any) -> None:
        """Let a call return a value without running; its inner values are gone.

        Raises: WriteError where the structure differs; TraceError when something inside has been used already.
        """
        used = next((x for x in self.recorder.used if is_inside(x.address, address)), None)
        if used is not None:
            raise TraceError(
                f"{address} cannot be skipped: {used.address} inside it is used in this trace, and would not run"
            )
        self.write(address, "output", value)
        if not self.recorder.in_dead_branch:
            self._skipped.append((address, self.recorder.rows, user_line()))

    def save(self, value: Any) -> None:
        """Keep every value of a structure."""
        self.recorder.keep(value)
