"""Captured against eager, and traced edits against hooks, bit for bit, on small random models of many architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxsight.model import Model
from fxsight.tree import flatten
from tests.oracle import Edit, Read, calls, run
from tests.zoo import ENTRIES, Entry

NAMES = [entry.name for entry in ENTRIES]


def _entry(name: str) -> Entry:
    return next(entry for entry in ENTRIES if entry.name == name)


def _view(model: Model, path: str) -> Any:
    path, _, call = path.partition("#")
    found: Any = model
    for part in path.split(".") if path else ():
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found.call(int(call)) if call else found


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _first(value: Any) -> Any:
    return next(leaf for leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor))


def _equal(found: Any, expected: Any) -> bool:
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _scale(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5


def _zero(x: torch.Tensor) -> None:
    x[:, 0] = 0


@pytest.mark.parametrize("name", NAMES)
def test_captured_and_edited_models_equal_hooks(name: str) -> None:
    """One read, one assignment and one in-place edit at a module and at an operation, at several sizes."""
    entry = _entry(name)
    net = entry.make()
    model = Model(net, cache=False)
    for batch, length in entry.sizes():
        args, kwargs = entry.inputs(batch, length)
        with torch.no_grad():
            _check_unedited(model, net, args, kwargs)
            _check_module(model, net, entry, args, kwargs)
            _check_operation(model, net, entry, args, kwargs)


def _check_unedited(model: Model, net: Any, args: Any, kwargs: Any) -> None:
    with model.trace(*args, backend="eager", **kwargs):
        out = model.output.save()
    assert _equal(out, net(*args, **kwargs))


def _check_module(model: Model, net: Any, entry: Entry, args: Any, kwargs: Any) -> None:
    steps: list[Edit | Read] = [
        Read(entry.module, "output"),
        Edit(entry.inner, "output", "assign", _scale),
        Edit(entry.module, "output", "inplace", _zero),
    ]
    expected, (read,) = run(net, args, kwargs, [steps[1], steps[0], steps[2]])
    with model.trace(*args, backend="eager", **kwargs):
        kept = _first(_view(model, entry.module).output).save()
        _write(_view(model, entry.inner), _scale)
        _zero(_first(_view(model, entry.module).output))
        out = model.output.save()
    assert torch.equal(kept, read) and _equal(out, expected)


def _write(view: Any, fn: Any) -> None:
    value = view.output
    if isinstance(value, tuple):
        members: Any = value
        members[0] = fn(value[0])
    else:
        view.output = fn(value)


def _check_operation(model: Model, net: Any, entry: Entry, args: Any, kwargs: Any) -> None:
    module, name, hooked = entry.op
    expected, (read,) = run(net, args, kwargs, [Read(hooked, "output"), Edit(hooked, "output", "assign", _scale)])
    with model.trace(*args, backend="eager", **kwargs) as tracer:
        operation = tracer.at(f"{module}/{name}")
        kept = _first(operation.output).save()
        _write(operation, _scale)
        out = model.output.save()
    assert torch.equal(kept, read) and _equal(out, expected)
    _check_function(model, net, entry, args, kwargs)


def _check_function(model: Model, net: Any, entry: Entry, args: Any, kwargs: Any) -> None:
    function = entry.function
    path = calls("function", function.call)
    edit = Edit(path, "output", "inplace", _zero)
    expected, (read,) = run(net, args, kwargs, [Read(path, "output"), edit], {"function": function.place()})
    with model.trace(*args, backend="eager", **kwargs) as tracer:
        operation = tracer.at(f"{function.module}/{function.name}")
        kept = _first(operation.output).save()
        _zero(_first(operation.output))
        out = model.output.save()
    assert torch.equal(kept, read) and _equal(out, expected)
