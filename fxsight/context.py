"""Which blocks are being written here: the open traces, innermost last, and the session around them.

A context variable: every thread and every asyncio task of the user's has its own, and nothing else is shared.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from fxsight.errors import TraceError


@dataclass(frozen=True)
class Here:
    """What is open: traces (outermost first), and the session, if there is one."""

    traces: tuple[Any, ...] = ()
    session: Any = None


_HERE: ContextVar[Here] = ContextVar("fxsight", default=Here())  # noqa: B039 - Here is immutable


def here() -> Here:
    """What is open now, in this thread."""
    return _HERE.get()


def open_trace(model: object) -> Any:
    """The open trace of a model (told by what its captures share), of a generation the present step; None outside."""
    block = open_block(model)
    return None if block is None else block.now


def open_block(model: object) -> Any:
    """The open trace of a model, or its open generation; None outside."""
    for trace in _HERE.get().traces:
        if trace.captures.shared is model:
            return trace
    return None


def enter_trace(trace: Any) -> None:
    """A block begins.

    Raises: TraceError inside another block on the same model.
    """
    now = _HERE.get()
    if now.traces and any(other.captures.shared is trace.captures.shared for other in now.traces):
        raise TraceError("a trace inside a trace of the same model: end the first block, or use model.session()")
    _HERE.set(Here((*now.traces, trace), now.session))


def leave_trace(trace: Any) -> None:
    """A block ends."""
    now = _HERE.get()
    _HERE.set(Here(tuple([other for other in now.traces if other is not trace]), now.session))


def enter_session(session: Any) -> None:
    """A session begins.

    Raises: TraceError inside a trace or another session.
    """
    now = _HERE.get()
    if now.traces:
        raise TraceError("a session inside a trace: open the session first, and the traces in it")
    if now.session is not None:
        raise TraceError("a session inside a session: its traces can simply stand in the first")
    _HERE.set(replace(now, session=session))


def leave_session() -> None:
    """A session ends."""
    _HERE.set(replace(_HERE.get(), session=None))
