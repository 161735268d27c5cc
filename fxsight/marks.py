"""Which operator of a program each node of a traced graph comes from, in its forward and in its backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.tree import flatten

Mark = tuple[fx.Node, bool]  # an operator of the program, and whether its gradient is being computed


class Marks:
    """Told what runs now; what is written down from then on belongs to it.

    Hooks on autograd's functions say whose gradient is computed; they are gone with the trace.
    """

    def __init__(self) -> None:
        self.origins: dict[fx.Node, Mark] = {}
        self._now: Mark | None = None
        self._last: fx.Node | None = None
        self._known: dict[Any, None] = {}  # autograd's functions whose operator is known

    def switch(self, now: Mark | None) -> Mark | None:
        """Something else runs from here on.  Returns: what has run until now."""
        graph = _torch.export_graph()
        for node in _after(graph, self._last):
            self._last = node
            if self._now is not None:
                self.origins.setdefault(node, self._now)
        before, self._now = self._now, now
        return before

    def own(self, node: fx.Node, result: Any) -> None:
        """The functions of autograd that an operator has made."""
        waiting = [t.grad_fn for t in flatten(result)[0] if isinstance(t, torch.Tensor) and t.grad_fn is not None]
        while waiting:
            function = waiting.pop()
            if function not in self._known:
                self._known[function] = None
                function.register_prehook(lambda _: self._enter((node, True)))
                waiting += [f for f, _ in function.next_functions if f is not None and "AccumulateGrad" not in f.name()]

    def _enter(self, now: Mark) -> None:
        self.switch(now)


def _after(graph: fx.Graph | None, last: fx.Node | None) -> Iterator[fx.Node]:
    """The nodes of a graph after one of them."""
    assert graph is not None, "a program is run on shapes while it is traced"
    node = next(iter(graph.nodes), None) if last is None else last.next
    while node is not None and node.op != "root":
        yield node
        node = node.next
