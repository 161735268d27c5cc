"""A block in which shapes are looked at, and nothing is run: ``with model.scan(...)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxsight.asked import asked_in_all, results_of
from fxsight.become import become
from fxsight.errors import NeedsValueError
from fxsight.lines import user_line
from fxsight.lost import warn_of_lost_edits
from fxsight.tracer import Tracer
from fxsight.value import Value
from fxsight.walk import Walk


class Scan(Tracer):
    """A block in which shapes are looked at, and nothing is run: ``with model.scan(...)``.

    Saved values become tensors without data (device "meta"). What needs a number is an error.
    """

    def _end(self, walk: Walk) -> None:
        self._finish(self.recorder)
        self.run([])

    def run(self, wanted: Sequence[Value]) -> None:
        """Nothing is computed: shapes and dtypes alone."""
        recorder = self.recorder
        warn_of_lost_edits(recorder.body, asked_in_all(recorder, wanted, self._kept))
        for keeper in self._keepers:
            keeper.fill(recorder.empty(node) for node in keeper.nodes)
        for value in dict.fromkeys(results_of(recorder, wanted)):
            become(value, recorder.empty(recorder.body.node_of(value)))
        recorder.phase = "done"

    def _demand(self, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
        raise NeedsValueError(
            f"{user_line()}: a number is needed, and a scan runs nothing; use torch.where, or model.trace(...)"
        )
