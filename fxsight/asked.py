"""What a recorded body asks for, as an ``Intervention``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxsight.intervention import Intervention, Save, Write
from fxsight.node import Binding, Fixed
from fxsight.record import Recorder
from fxsight.tree import LEAF, Tree, flatten
from fxsight.value import Value


def asked_in_all(recorder: Recorder, wanted: Iterable[Value], kept: Sequence[Save] = ()) -> Intervention:
    """The whole intervention: what was saved, some values besides, and what caches keep."""
    extra = [_save_of([recorder.body.node_of(value)]) for value in wanted]
    return asked_so_far(recorder, (*(_save(recorder, value) for value in recorder.saved), *extra, *kept))


def demanded(recorder: Recorder, nodes: Sequence[fx.Node]) -> Intervention:
    """What is asked for so far, for the values of some nodes: no tensor gets a ``.grad`` yet."""
    asked = asked_so_far(recorder, (_save_of(nodes),))
    return replace(asked, backwards=tuple(replace(one, leaves=()) for one in asked.backwards))


def results_of(recorder: Recorder, wanted: Iterable[Value]) -> list[Value]:
    """The values that the results of ``asked_in_all`` belong to, in order."""
    leaves = [leaf for value in recorder.saved for leaf in flatten(value)[0]]
    return [*(x for x in leaves if recorder.is_result(x)), *wanted]


def asked_so_far(recorder: Recorder, saves: tuple[Save, ...]) -> Intervention:
    """What has been asked for so far."""
    body = recorder.body
    reads = recorder.locations.reads()
    looked = tuple((s, recorder.sizes[s]) for s in sorted(body.looked | body.fitted) if s in recorder.sizes)
    weights = tuple(body.weight_names.items())
    updates = tuple((number, node.name) for number, node in body.updates.items())
    constants = body.constant_specs()
    asked = Intervention(body.graph, reads, constants, weights, recorder.locations.writes(), saves, updates, looked)
    if body.gradients.is_empty:
        return asked
    given = _given(recorder)
    learned = tuple(name for name, tensor in given.items() if tensor.requires_grad)
    first = {id(tensor): name for name, tensor in reversed(given.items())}
    shared = tuple((name, first[id(tensor)]) for name, tensor in given.items() if first[id(tensor)] != name)
    passes, marked = body.gradients.passes(), body.gradients.marked
    return replace(asked, backwards=passes, learned=learned, shared=shared, marked=marked)


def trial(recorder: Recorder, write: Write) -> Intervention:
    """What has been asked for so far, and one more write."""
    asked = asked_so_far(recorder, ())
    others = tuple(w for w in asked.writes if w.location.key != write.location.key or w.in_place)
    if all(r.location.key != write.location.key for r in asked.reads):
        recorder.node_at(write.location, recorder.line())
        asked = asked_so_far(recorder, ())
    return replace(asked, writes=(*others, write))


def teaches(recorder: Recorder) -> bool:
    """Whether its run gives tensors a ``.grad``."""
    given = _given(recorder).values() if not recorder.body.gradients.is_empty else ()
    return any(one.leaves != () for one in recorder.body.gradients.passes()) and any(x.requires_grad for x in given)


def _given(recorder: Recorder) -> dict[str, torch.Tensor]:
    """The tensors that a program of this body is given, by what they are bound to."""
    weights = [str(b.key) for b in recorder.program.bindings.values() if b.kind == "weight"]
    given: list[tuple[Binding, Any]] = [(Binding("input", i), x) for i, x in enumerate(recorder.given())]
    given += [(Binding("weight", w), recorder.lookup(w)) for w in (*weights, *recorder.body.weight_names.values())]
    given += [(Binding("constant", i), x) for i, x in enumerate(recorder.body.constants)]
    return {str(b): x for b, x in given if isinstance(x, torch.Tensor) and type(x) is not Value}


def _save(recorder: Recorder, value: Any) -> Save:
    leaves, tree = flatten(value)
    return Save(tree, tuple(recorder.body.node_of(x).name if recorder.is_result(x) else fixed(x) for x in leaves))


def _save_of(nodes: Sequence[fx.Node]) -> Save:
    """A save of some nodes, as a tuple."""
    return Save(Tree("tuple", "", tuple(range(len(nodes))), (LEAF,) * len(nodes)), tuple(n.name for n in nodes))


def fixed(value: Any) -> Fixed:
    """A leaf of a save that is not computed."""
    return Fixed(
        value if value is None or isinstance(value, (bool, int, float, str)) else f"<{type(value).__qualname__}>"
    )
