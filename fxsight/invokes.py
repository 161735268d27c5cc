"""``model.trace(mode="exact")``: invokes that are traces of their own and share what they have in common.

    with model.trace(mode="exact") as tracer:
        with tracer.invoke(x):
            clean = model.output.save()
        for layer in range(12):
            with tracer.invoke(x):                   the forward up to the edit is computed once
                model.h[layer].output[:] = 0

Without a mode the invokes of a trace are one batch (``invoke``). With one, each is a trace that waits until the block
ends, as those of a session do, at the shapes that it has alone: nothing is padded, and rows are never joined.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import fx, nn

from fxsight.address import Address
from fxsight.alike import check_options
from fxsight.at import At
from fxsight.branch import Stopped
from fxsight.cache import Cache
from fxsight.captures import Captures
from fxsight.context import here
from fxsight.edit import Edit
from fxsight.errors import TraceError
from fxsight.inputs import Inputs
from fxsight.rows import Call
from fxsight.run import Executable
from fxsight.sessions import Session
from fxsight.shared import Terms, wants_graph
from fxsight.text import Text
from fxsight.together import BUDGET
from fxsight.tracer import Tracer


class Invokes:
    """One such block.

    mode: "exact": each invoke bitwise as if traced alone; "fast": computed together, within ``lower.TOLERANCE``.
    budget: bytes that invokes which are computed together may hold at once, besides weights and what they share.

    Raises: TraceError for what is no mode or no budget, and for a compiled block.
    """

    def __init__(
        self,
        captures: Captures,
        backend: str,
        inputs: Inputs,
        edits: Sequence[Edit],
        mode: Any = "exact",
        budget: Any = None,
    ) -> None:
        check_options(mode, budget)
        if backend == "inductor":
            raise TraceError(
                f'mode={mode!r} runs op by op: leave backend="inductor" out, or the mode: then the invokes are one '
                "batch, which is compiled"
            )
        self.mode: str = mode
        self.invoker: Invoked | None = None  # the last
        self._captures, self._inputs, self._edits = captures, inputs, edits
        terms = Terms(mode, BUDGET if budget is None else budget, "invoke", keeps_graph=False)
        self._session = Session(terms)
        self._open: Tracer | None = None
        self._is_inside = False

    def __enter__(self) -> Invokes:
        now = here()
        if now.session is not None:
            raise TraceError(
                f"trace(mode={self.mode!r}) inside a session: its traces share what they have in common; write each "
                "invoke as a trace, with model.trace(x):"
            )
        if now.traces:
            raise TraceError(f"trace(mode={self.mode!r}) inside a trace: end that block first")
        self._session.__enter__()
        self._is_inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._is_inside = False
        stopped = isinstance(error, Stopped) and error.block is self
        self._session.__exit__(None if stopped else kind, None if stopped else error, trace)
        if error is None and self.invoker is None:
            raise TraceError("trace() needs an input, or at least one `with tracer.invoke(...)` block")
        return stopped or None

    # -- invokes -----------------------------------------------------------------------------------------------------

    def invoke(self, *args: Any, **kwargs: Any) -> Invoked:
        """A block for an input of its own; the values of earlier ones are used in it as data.

        Raises: TraceError without input: there is no batch.
        """
        if not args and not kwargs:
            raise TraceError(
                f"an invoke without input sees the whole batch, and with mode={self.mode!r} there is none: save in "
                "each invoke and torch.cat after the block, or leave the mode out"
            )
        return Invoked(self, args, kwargs)

    def barrier(self, count: int = 0) -> Any:
        """Accepted, and not needed: values flow between invokes as data.  Returns: a function that does nothing."""
        return lambda: None

    def begin(self, call: Call) -> Tracer:
        """The trace of an invoke.

        Raises: TraceError outside the block, and inside another invoke.
        """
        if not self._is_inside:
            raise TraceError("an invoke outside its trace: with model.trace(...) as tracer: with tracer.invoke(x):")
        if self._open is not None:
            raise TraceError("an invoke inside an invoke: end the first block")
        self._open = InvokeTrace(self._captures, call, "eager", self._inputs, self._edits)
        return self._open

    def end(self) -> None:
        """The block of the open invoke has ended."""
        self._open = None

    @property
    def _now(self) -> Tracer:
        if self._open is None:
            raise TraceError(
                f"with mode={self.mode!r} each invoke is a trace of its own: say this inside `with tracer.invoke(x):`"
            )
        return self._open

    # -- what is said in an invoke -----------------------------------------------------------------------------------

    @property
    def tokens(self) -> Any:
        """As of a trace, of the open invoke."""
        return self._now.tokens

    @property
    def result(self) -> Any:
        """What the whole call of the open invoke returns."""
        return self._now.result

    def at(self, address: str | Address) -> At:
        """The place of an address in the open invoke: see ``Tracer.at``."""
        return self._now.at(address)

    def cache(self, modules: Iterable[Any] | Any = None, **options: Any) -> Cache:
        """Keep what modules return in the open invoke.  Arguments: of ``Tracer.cache``."""
        return self._now.cache(modules, **options)

    def cond(self, condition: Any) -> AbstractContextManager[None]:
        """A block of the open invoke that counts only if the condition holds: see ``Tracer.cond``."""
        return self._now.cond(condition)

    def log(self, *values: Any) -> None:
        """Print values, now; numbers that are needed for it are computed now."""
        if self._open is None:
            print(*values)
        else:
            self._open.log(*values)

    def save(self, value: Any) -> None:
        """Keep every value of a structure, of the open invoke or of earlier ones."""
        self._session.save(value)

    def stop(self) -> NoReturn:
        """End the block here: what comes after it, other invokes included, is not done."""
        if self._open is not None:
            self._open.check_alive()
        raise Stopped(self)

    # -- what has run ------------------------------------------------------------------------------------------------

    @property
    def program(self) -> Executable:
        """Raises: TraceError: each invoke has its own."""
        raise TraceError(
            f"with mode={self.mode!r} each invoke has a program of its own: with tracer.invoke(x) as invoker: "
            "..., and after the block invoker.program"
        )

    @property
    def tier(self) -> str:
        """How the values were computed: op by op."""
        return "eager"

    def explain(self) -> Text:
        """What the invokes that have run by now have shared: what ran once, what for each, and which ran alone, why."""
        return self._session.explain()


class InvokeTrace(Tracer):
    """The trace of one invoke; its numbers, too, have no graph where nothing of the user's asks for one."""

    def _demand(self, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
        with nullcontext() if wants_graph(self) else torch.no_grad():
            return super()._demand(nodes)


class Invoked:
    """One block: ``with tracer.invoke(x) as invoker:``, a trace of its own."""

    def __init__(self, block: Invokes, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._block, self._given = block, (args, kwargs)
        self._trace: Tracer | None = None
        self._call: Call | None = None

    @property
    def inputs(self) -> Call:
        """``(args, kwargs)`` of the module for this block: the tokens of a text."""
        if self._call is None:
            raise TraceError("the inputs of an invoke are there when its block has begun")
        return self._call

    @property
    def program(self) -> Executable:
        """The finished program of this invoke alone.

        Raises: TraceError before the block around the invokes has ended.
        """
        if self._trace is None:
            raise TraceError("the program is finished when the trace ends: use it then")
        return self._trace.program

    def __enter__(self) -> Invoked:
        self._trace = trace = self._block.begin(self._given)
        try:
            trace.__enter__()
            self._call = trace.given
        except BaseException:
            self._block.end()
            raise
        self._block.invoker = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._block.end()
        assert self._trace is not None
        if isinstance(error, Stopped) and error.block is self._block:  # this invoke is done as far as it is written
            self._trace.__exit__(None, None, None)
            return None
        return self._trace.__exit__(kind, error, trace)


def own_arguments(module: nn.Module, method: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """``mode`` and ``budget`` of a trace with an input: the model's own arguments.

    Raises: TraceError for a model that does not have them.
    """
    known = inspect.signature(getattr(module, method)).parameters if options else {}
    for name, value in options.items():
        if name not in known:
            raise TraceError(
                f"{name}={value!r} is for a trace of invokes: write `with model.trace({name}={value!r}) as tracer:` "
                "and `with tracer.invoke(x):`"
            )
    return options
