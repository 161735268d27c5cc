"""Is a write causal? Asked when it is written, answered at the user's line.

The model's graph only flows forward in time, so a value read before the written location cannot depend on it. Only a
value that has read something later needs a look: the intervention so far is woven, and must have an order.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxsight.asked import asked_so_far, trial
from fxsight.intervention import Write
from fxsight.place import Location
from fxsight.record import Recorder
from fxsight.value import Value


def check_causal(recorder: Recorder, location: Location, value: Any) -> None:
    """Nothing when the write can be woven in.

    Raises: CausalityError, with the way from the location to the value.
    """
    if not isinstance(value, Value):
        return
    node = recorder.body.node_of(value)
    if all(since <= location.since for since in recorder.locations.needed_times(node)):
        return
    from fxsight.passes.weave import Weave

    Weave(trial(recorder, Write(location, node.name, False, recorder.line())))(recorder.program)


def check_edit(recorder: Recorder, location: Location, node: fx.Node) -> None:
    """The same for an in-place edit, which is among the recorder's writes already.

    Raises: CausalityError.
    """
    if any(since > location.since for since in recorder.locations.needed_times(node)):
        from fxsight.passes.weave import Weave

        Weave(asked_so_far(recorder, ()))(recorder.program)
