"""The clock of a capture: nodes are tagged with their time and innermost call, calls have a place in the text.

What is seen of a forward, and when, is the scribe's (``provenance``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch

from fxsight import _torch
from fxsight.book import Const, Kind, Leaf, Opaque, Ref, SizeRef, Structure, Weight
from fxsight.instructions import Kind as SiteKind
from fxsight.instructions import Span, site_table
from fxsight.libraries import Libraries
from fxsight.open_call import INNER_CODE, OpenCall
from fxsight.sites import Site
from fxsight.tree import flatten

TAG = "fxsight"  # key of our tag in node.meta["custom"]: [time, call]


class Clock:
    """The calls that are open, and those that have been made.

    on_tick: called at each tick.
    """

    def __init__(self, on_tick: Callable[[], None] | None) -> None:
        self._on_tick = on_tick
        self.calls: list[OpenCall] = []
        self.after: Structure | None = None  # see ``Book.after``
        self._clock = 0
        self._stack: list[OpenCall] = []
        self._last_node: torch.fx.Node | None = None
        self._weights: dict[int, str] = {}
        self._own: dict[CodeType, bool] = {}
        self._tables: dict[int, tuple[CodeType, dict[int, tuple[Span, SiteKind]]]] = {}
        self._libraries = Libraries()

    def tick(self) -> int:
        """Tag the nodes made since the last tick with their time and innermost call; then the time now."""
        if self._on_tick is not None:
            self._on_tick()
        graph = _torch.export_graph()
        if graph is not None:
            node = self._last_node.next if self._last_node is not None else next(iter(graph.nodes), None)
            while node is not None and node.op != "root":
                self._clock += 1
                call = self._stack[-1].id if self._stack else -1
                node.meta["custom"] = {**(node.meta.get("custom") or {}), TAG: [self._clock, call]}
                self._last_node, node = node, node.next
        self._clock += 1
        return self._clock

    def _begin(self, kind: Kind, title: str, name: str, line: str) -> OpenCall:
        start = self.tick()
        parent = self._stack[-1] if self._stack else None
        n = parent.counts.get(name, 0) if parent is not None else 0
        if parent is not None:
            parent.counts[name] = n + 1
        module, number = (parent.module, parent.module_call) if parent is not None else ("", 0)
        call = OpenCall(len(self.calls), parent, kind, name, n, module, number, title, line, start)
        self.calls.append(call)
        self._stack.append(call)
        return call

    def _end(self, call: OpenCall, output: Any) -> None:
        call.end = self.tick()
        call.output = self._structure(output)
        self._stack.remove(call)

    def _site(self, parent: OpenCall | None, frame: FrameType | None) -> tuple[Site | None, str]:
        """The place in the parent's source that is being executed, and its ``file:line``.

        No place when the frame is deeper: in a constructor or getter that the source uses.
        """
        line = ""
        while frame is not None and parent is not None:
            if frame is parent.frame or (frame.f_code.co_name in INNER_CODE and self._is_own(frame.f_code)):
                line = line or f"{self._libraries.short(frame.f_code.co_filename)}:{frame.f_lineno}"
                found = self._table(frame.f_code).get(frame.f_lasti)
                site = parent.source.at(*found) if parent.source is not None and found is not None else None
                if site is not None or frame is parent.frame:
                    return site, line
            elif self._is_own(frame.f_code):
                return None, line
            frame = frame.f_back
        return None, line

    def _table(self, code: CodeType) -> dict[int, tuple[Span, SiteKind]]:
        if id(code) not in self._tables:  # by id: equal functions of two files are equal code objects
            self._tables[id(code)] = (code, site_table(code))
        return self._tables[id(code)][1]

    def _is_own(self, code: CodeType) -> bool:
        """Whether the code is the model's: neither torch's, Python's nor ours (forwards of torch's modules are)."""
        known = self._own.get(code)
        if known is None:
            known = self._own[code] = self._libraries.is_model_code(code.co_filename)
        return known or any(call.code is code for call in self._stack[-1:])

    def leave(self, pasts: tuple[Any, ...]) -> list[torch.Tensor]:
        """Write down the caches that were given, as they are now.  Returns: the tensors in them."""
        self.tick()
        leaves, tree = flatten(pasts)
        self.after = Structure(tree, tuple(map(self._leaf, leaves)))
        return [leaf for leaf, ref in zip(leaves, self.after.leaves, strict=True) if isinstance(ref, Ref)]

    def _structure(self, value: Any) -> Structure:
        leaves, tree = flatten(value)
        return Structure(tree, tuple(map(self._leaf, leaves)))

    def _leaf(self, value: Any) -> Leaf:
        if isinstance(value, torch.Tensor):
            if id(value) in self._weights:
                return Weight(self._weights[id(value)])
            node = _torch.export_node(value)
            tag = None if node is None else (node.meta.get("custom") or {}).get(TAG)
            return Opaque("tensor made before the forward") if tag is None else Ref(str(tag[0]))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return SizeRef(str(_torch.size_expr(value)))
        if value is None or isinstance(value, (bool, int, float, str)):
            return Const(value)
        return Opaque(type(value).__qualname__)

    @contextmanager
    def _not_watching(self) -> Generator[None]:
        """What is called inside is ours, not the model's; also inside another such block."""
        before, tracing = sys.getprofile(), sys.gettrace()
        sys.setprofile(None)
        sys.settrace(None)
        try:
            yield
        finally:
            sys.settrace(tracing)
            sys.setprofile(before)
