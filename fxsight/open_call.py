"""A call while it is being made, and what the frames of Python say of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from fxsight.book import Call, Const, Kind, Structure
from fxsight.source import Source, unwrapped
from fxsight.tree import LEAF

INNER_CODE = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<lambda>")
_EMPTY = Structure(LEAF, (Const(None),))


@dataclass(eq=False)
class OpenCall:
    """A call that is being made; becomes a ``Call`` when the model has returned."""

    id: int
    parent: OpenCall | None
    kind: Kind
    name: str
    n: int
    module: str
    module_call: int
    title: str
    line: str
    start: int
    code: CodeType | None = None
    source: Source | None = None
    frame: FrameType | None = None
    inputs: Structure = _EMPTY
    output: Structure = _EMPTY
    end: int = -1
    counts: dict[str, int] = field(default_factory=dict[str, int])
    ran: dict[str, None] = field(default_factory=dict[str, None])

    def close(self) -> Call:
        """The finished call."""
        body = None if self.code is None else (self.code.co_filename, self.code.co_name, self.code.co_firstlineno)
        ran = tuple(name for name in self.ran if name not in self.counts)
        parent = None if self.parent is None else self.parent.id
        return Call(
            self.id, parent, self.kind, self.name, self.n, self.module, self.module_call, self.title, self.line,
            body, self.inputs, self.output, self.start, self.end if self.end >= 0 else self.start, ran,
        )  # fmt: skip


def body_code(forward: Any) -> CodeType | None:
    """The code of a module's forward, below its decorators."""
    code = getattr(unwrapped(forward), "__code__", None)
    return code if isinstance(code, CodeType) else None


def is_part_of(code: CodeType, call: OpenCall) -> bool:
    """Whether the code is a comprehension, or a lambda that stands in the call's own source."""
    if code.co_name != "<lambda>":
        return code.co_name in INNER_CODE
    todo = [call.code]
    while todo:
        found = todo.pop()
        inner = () if found is None else [const for const in found.co_consts if isinstance(const, CodeType)]
        if any(const is code for const in inner):
            return True
        todo += inner
    return False


def is_wrapped_by(frame: FrameType, call: OpenCall) -> bool:
    """Whether ``call`` is a decorator's ``wrapper(*args, **kwargs)`` and ``frame`` the function it wraps."""
    code, flags = call.code, inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    if call.kind != "function" or code is None or call.frame is None or code.co_flags & flags != flags:
        return False
    closed = (call.frame.f_locals.get(name) for name in code.co_freevars)
    return any(getattr(value, "__code__", None) is frame.f_code for value in closed)


def arguments_of(frame: FrameType) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments a function was entered with."""
    info = inspect.getargvalues(frame)
    code = frame.f_code
    keyword_only = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    args = [info.locals[name] for name in info.args if name in info.locals and name not in keyword_only]
    kwargs = {name: info.locals[name] for name in keyword_only if name in info.locals}
    args += info.locals.get(info.varargs, ()) if info.varargs else ()
    kwargs.update(info.locals.get(info.keywords, {}) if info.keywords else {})
    return tuple(args), kwargs
