"""Invokes: several inputs of one trace as one batch, each block with rows of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from fxsight.errors import TraceError
from fxsight.inputs import Inputs
from fxsight.program import Program
from fxsight.rows import Call, Rows, batch_sizes, row_count


class Batch:
    """The inputs of one trace, as they come: those of ``trace(x)``, or one for each invoke.

    grows: whether invokes may bring inputs.  inputs: how several calls become one.
    """

    def __init__(self, calls: list[Call], grows: bool, inputs: Inputs) -> None:
        self.calls, self.grows, self._inputs = calls, grows, inputs
        self.joined: Call = calls[0] if calls else ((), {})
        self.open: Invoker | None = None
        self._whole_seen = False

    def enter(self, invoker: Invoker) -> None:
        """The block of an invoke begins; its input joins the batch.

        Raises: TraceError inside another invoke, and where the inputs cannot be one batch.
        """
        if self.open is not None:
            raise TraceError("an invoke inside an invoke: end the first block")
        if invoker.has_input:
            self._join(invoker.call)
        elif not self.calls:
            raise TraceError("the first invoke of a trace needs an input: with tracer.invoke(x):")
        else:
            self._whole_seen = True
        self.open = invoker

    def leave(self) -> None:
        """The block ends."""
        self.open = None

    def touch(self) -> None:
        """Something is read or written: outside the invokes, of the whole batch, which must not grow any more."""
        self._whole_seen = self._whole_seen or (self.open is None and bool(self.calls))

    def _join(self, call: Call) -> None:
        if not self.grows:
            raise TraceError(
                "this trace has its input from trace(...): write model.trace() and an invoke for each input"
            )
        if self._whole_seen:
            raise TraceError(
                "an invoke with an input where the whole batch has been seen already, in an invoke without input or "
                "outside the invokes: write it before"
            )
        self.joined = self._inputs.join([*self.calls, call])
        self.calls.append(call)

    def rows_of(self, program: Program, sizes: Mapping[str, int]) -> Rows:
        """The rows of the call that came last.  sizes: of all rows."""
        counts = [row_count(call) for call in self.calls]
        return Rows(sum(counts[:-1]), sum(counts), sum(counts), batch_sizes(program, sizes))


class Invoking(Protocol):
    """What an invoke needs of its trace."""

    def enter_invoke(self, invoker: Invoker) -> None:
        """Its rows are read and written from now on."""
        ...

    def leave_invoke(self) -> None:
        """All rows are read and written from now on."""
        ...


class Invoker:
    """One block: ``with tracer.invoke(x) as invoker:``.

    call: positional and keyword arguments of the module, for this block.
    """

    def __init__(self, tracer: Invoking, call: Call) -> None:
        self._tracer, self.call = tracer, call

    @property
    def inputs(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """``(args, kwargs)`` of the module for this block: the tokens of a text."""
        return self.call

    @property
    def has_input(self) -> bool:
        """Whether it brings rows of its own."""
        return bool(self.call[0] or self.call[1])

    def __enter__(self) -> Invoker:
        self._tracer.enter_invoke(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracer.leave_invoke()
