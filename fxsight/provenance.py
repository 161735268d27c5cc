"""Where every value of a forward comes from: the scribe that writes the address book while ``torch.export`` traces.

Three public hooks of Python and torch, active only inside this one call of the model:

- forward pre-hooks and hooks pass each tensor that crosses a module's border through ``aten.alias``, so that every
  module input and output is a node of its own (removed again by ``erase_boundaries``);
- a ``TorchFunctionMode`` sees every torch call of the model's Python, infix operators included;
- ``sys.setprofile`` sees every Python call and return, hence the arguments and results of each function.

Together with the source (``source.Source``) they give each call its operation name. Nothing of this remains in the
program: the book is data.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from operator import attrgetter
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxsight import _torch
from fxsight.book import LISTS, CustomFunction
from fxsight.clock import TAG, Clock
from fxsight.mentions import LISTING, Mentions
from fxsight.open_call import INNER_CODE, OpenCall, arguments_of, body_code, is_part_of, is_wrapped_by
from fxsight.source import SourceReader

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_NO_CALLS = ("__get__", "_set_grad_enabled")  # an attribute is no call; what ``no_grad`` switches has no value


class Scribe(Clock):
    """Writes down the calls of one forward of ``root``; use as ``with scribe.watching(): root(...)``."""

    def __init__(self, root: nn.Module, reader: SourceReader, on_tick: Callable[[], None] | None = None) -> None:
        super().__init__(on_tick)
        self.root = root
        self.reader = reader
        self.returned: tuple[Any, Any] = (None, None)  # structure and fixed leaves of the model's output
        self._frames: dict[FrameType, OpenCall] = {}
        # By the attributes: export calls a module with several names through stand-ins that share them.
        self._paths = {id(vars(m)): path for path, m in root.named_modules()}
        self.mentions = Mentions()
        self.functions: list[CustomFunction] = []  # see ``Book.functions``
        self._applied: dict[FrameType, int] = {}  # when each of them began

    @contextmanager
    def watching(self) -> Generator[None]:
        """Active inside: hooks on the modules, torch calls, Python calls. All removed on the way out."""
        tensors = [
            *self.root.named_parameters(remove_duplicate=False),
            *self.root.named_buffers(remove_duplicate=False),
        ]
        self._weights = {id(t): name for name, t in reversed(tensors)}
        handles = [h for m in self.root.modules() for h in self._hook(m)]
        before, tracing = sys.getprofile(), sys.gettrace()
        try:
            with _TorchCalls(self):
                sys.setprofile(self._profile)
                sys.settrace(self._trace)
                yield
        finally:
            sys.settrace(tracing)
            sys.setprofile(before)
            for handle in handles:
                handle.remove()

    def _hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter_module, with_kwargs=True),
            module.register_forward_hook(self._leave_module),
        ]

    # -- modules -----------------------------------------------------------------------------------------------------

    def call_method(self, name: str, args: Any, kwargs: Any) -> Any:
        """``root.name(*args, **kwargs)``, written down as the call of the root that the forward otherwise is.

        name: of a method, or the path of a part of the root.
        """
        method = attrgetter(name)(self.root)
        args, kwargs = self._enter_module(self.root, args, kwargs, method)
        return self._leave_module(self.root, args, method(*args, **kwargs))

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any, method: Any = None) -> Any:
        with self._not_watching():
            path = self._paths[id(vars(module))]
            site, line = self._site(self._stack[-1] if self._stack else None, inspect.currentframe())
            name = site.name if site is not None else path.rpartition(".")[2] or "root"
            call = self._begin("module", type(module).__name__, name, line)
            call.module, call.module_call = (
                path,
                sum(c.kind == "module" and c.module == path for c in self.calls[:-1]),
            )
            call.code = body_code(module.forward if method is None else method)
            call.source = self.reader.of(call.code) if call.code is not None else None
            args, kwargs = _border((args, kwargs))
            call.start = self.tick()
            call.inputs = self._structure((args, kwargs))
            return args, kwargs

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        with self._not_watching():
            output = _border(output)
            self._end(next(c for c in reversed(self._stack) if c.module == self._paths[id(vars(module))]), output)
            return output

    # -- Python functions --------------------------------------------------------------------------------------------

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and self._is_own(frame.f_code):
            self.mentions.note(frame)
            self._enter_function(frame)
        elif event == "call" and frame.f_code in LISTING:
            self.mentions.names.add(LISTS)
        elif frame.f_code is _APPLY:
            self._apply_function(frame, event)
        elif event == "return" and frame in self._frames:
            self._leave_function(frame, arg)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        """Write down which places of a source are reached: those of every instruction in the model's own frames."""
        if event == "call" and self._stack and self._is_own(frame.f_code):
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            return self._trace
        if event == "opcode" and self._stack:
            top, found = self._stack[-1], self._table(frame.f_code).get(frame.f_lasti)
            inside = frame is top.frame or frame.f_code.co_name in INNER_CODE
            site = top.source.at(*found) if found is not None and inside and top.source is not None else None
            if site is not None:
                top.ran[site.name] = None
        return self._trace

    def _enter_function(self, frame: FrameType) -> None:
        with self._not_watching():
            top = self._stack[-1] if self._stack else None
            if top is None or is_part_of(frame.f_code, top) or frame.f_code.co_flags & inspect.CO_GENERATOR:
                return
            if top.frame is None:
                if top.code is frame.f_code:  # the module's own forward: its body begins
                    top.frame = frame
                return  # else a decorator between the module's call and its forward
            if is_wrapped_by(frame, top):  # the function inside a decorator: the body of the call already open
                top.code, top.source, top.frame = frame.f_code, self.reader.of(frame.f_code), frame
                return
            site, line = self._site(top, frame.f_back)
            if site is None or site.kind != "call" or frame.f_code.co_name.startswith("__"):
                return  # an attribute's getter, an operator, a constructor: part of the line that uses it
            call = self._begin("function", frame.f_code.co_name, site.name, line)
            call.code, call.source, call.frame = frame.f_code, self.reader.of(frame.f_code), frame
            call.inputs = self._structure(arguments_of(frame))
            self._frames[frame] = call

    def _leave_function(self, frame: FrameType, value: Any) -> None:
        with self._not_watching():
            call = self._frames.pop(frame)
            if call in self._stack:
                self._end(call, value)
            call.frame = None

    def _apply_function(self, frame: FrameType, event: str) -> None:
        """A ``torch.autograd.Function`` is called, or has returned; torch's own differentiate what they compute."""
        cls = frame.f_locals["cls"]
        if cls.__module__.partition(".")[0] == "torch":
            return
        with self._not_watching():
            if event == "call":
                self._applied[frame] = self.tick()
            elif event == "return" and frame in self._applied:
                start, end = self._applied.pop(frame), self.tick()
                above = frame.f_back
                line = self._site(self._stack[-1] if self._stack else None, above)[1]
                if not line and above is not None:
                    line = f"{self._libraries.short(above.f_code.co_filename)}:{above.f_lineno}"
                self.functions.append(CustomFunction(cls.__qualname__, line, start, end))

    # -- torch calls -------------------------------------------------------------------------------------------------

    def torch_call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make one torch call and write it down."""
        with self._not_watching():
            name = getattr(func, "__name__", type(func).__name__)
            if name == "__get__" and _of(func) in ("T", "mT", "H", "mH", "real", "imag", "data"):
                name = _of(func)
            if (
                name in _NO_CALLS
                or func is torch.ops.aten.alias.default
                or not self._stack
                or self._stack[-1].frame is None
            ):
                return func(*args, **kwargs)
            site, line = self._site(self._stack[-1], inspect.currentframe())
            label = site.name if site is not None else "torch_" + re.sub(r"\W", "_", name.strip("_"))
            call = self._begin("torch", name, label, line)
            call.inputs = self._structure((args, kwargs))
            output = func(*args, **kwargs)
            if not _is_in_place(name, kwargs):
                output = self._own_node(output, call.start)
            self._end(call, output)
            return output

    def _own_node(self, output: Any, start: int) -> Any:
        """A result that is one of the arguments (``contiguous()`` of a contiguous tensor) gets a node of its own."""
        if not isinstance(output, torch.Tensor):
            return output
        node = _torch.export_node(output)
        tag = None if node is None else (node.meta.get("custom") or {}).get(TAG)
        return torch.ops.aten.alias.default(output) if tag is not None and tag[0] < start else output


class _TorchCalls(TorchFunctionMode):
    """Hands every torch call of the model's Python to the scribe."""

    def __init__(self, scribe: Scribe) -> None:
        super().__init__()
        self._scribe = scribe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._scribe.torch_call(func, args, kwargs or {})


def _border(value: Any) -> Any:
    """Each tensor of plain containers through ``alias``; lists and dicts keep their identity, objects are left."""
    if isinstance(value, torch.Tensor):
        return torch.ops.aten.alias.default(value)
    if type(value) is tuple:
        return tuple(map(_border, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_border, value))
    if isinstance(value, (list, dict)):  # a ModelOutput is a dict
        items = enumerate(value) if isinstance(value, list) else list(value.items())
        for key, member in items:
            value[key] = _border(member)
    return value


def _of(getter: Any) -> str:
    """The attribute a getter gets."""
    return str(getter.__self__.__name__)


def _is_in_place(name: str, kwargs: Any) -> bool:
    return "out" in kwargs or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
