"""Programs called at other sizes than those of their trace: the numbers that a new trace gives, or a clear error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fxsight
from tests import oracle
from tests.test_session_sharing import deep
from tests.test_sweep import bitwise


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


Write = Callable[[Tensor, Tensor], Tensor]  # what becomes of the second layer's output, given the first's


def traced(write: Write, count: int) -> tuple[Any, Any]:
    """The tracer of a body that writes it, and the output."""
    model = deep()[1]
    with model.trace(rows(count)) as tracer:
        model.layers[1].output = write(model.layers[0].output, model.layers[1].output)
        out = model.output.save()
    return tracer, out


def right(write: Write, count: int) -> Tensor:
    """With hooks."""
    net = deep()[0]
    kept: list[Tensor] = []
    first = net.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out))
    second = net.layers[1].register_forward_hook(lambda _m, _a, out: write(kept[0], out).expand_as(out))
    try:
        return net(rows(count))  # type: ignore[no-any-return]
    finally:
        first.remove()
        second.remove()


ONE, TWO = torch.ones(1, 6), torch.full((2, 6), 2.0)
GROWS: list[Write] = [
    lambda h, out: h.flip(0),
    lambda h, out: out + ONE,
    lambda h, out: (out @ ONE.T) @ ONE,
    lambda h, out: torch.cat([h[1:], h[:1]]),
    lambda h, out: torch.where(h > 0, out, h.mean(0, keepdim=True)),
]
FITS_ONE_SIZE: list[tuple[Write, int]] = [
    (lambda h, out: h[:2], 2),
    (lambda h, out: h[:3], 3),  # the same body with another number
    (lambda h, out: h[:1], 1),
    (lambda h, out: h.mean(0, keepdim=True), 1),
    (lambda h, out: torch.stack([h[0], h[-1]]), 2),
    (lambda h, out: ONE, 1),
    (lambda h, out: ONE * 3, 1),
]


@pytest.mark.parametrize("write", GROWS)
def test_what_grows_with_the_batch_is_right_at_each(write: Write) -> None:
    for count in (1, 2, 4):
        tracer, out = traced(write, count)
        bitwise(out, right(write, count))
        for other in (1, 2, 3, 5):
            bitwise(tracer.program(rows(other))[0], right(write, other))


@pytest.mark.parametrize(("write", "count"), FITS_ONE_SIZE)
def test_what_does_not_grow_is_refused_at_another_batch(write: Write, count: int) -> None:
    for _ in range(2):
        tracer, out = traced(write, count)
        bitwise(out, right(write, count))
        bitwise(tracer.program(rows(count))[0], out)
        message = r"layers.1:output is f32\[4, 6\] for these inputs, and the body writes .* there: what it writes"
        with pytest.raises(fxsight.InputError, match=message):
            tracer.program(rows(4))


def test_a_tensor_with_as_many_rows_as_the_batch() -> None:
    """It is added, assigned, or only read beside the model's values."""
    bodies: Sequence[Write] = [lambda h, out: out + TWO, lambda h, out: TWO, lambda h, out: out + (h @ TWO.T) @ TWO]
    for write in bodies:
        tracer, out = traced(write, 2)
        bitwise(out, right(write, 2))
        for other in (1, 3):
            with pytest.raises(
                fxsight.InputError, match=r"or uses a tensor of that size, so its program holds for batch"
            ):
                tracer.program(rows(other))
    bitwise(traced(bodies[2], 3)[1], right(bodies[2], 3))  # a new trace of it fits
    for write in bodies[:2]:
        with pytest.raises((RuntimeError, fxsight.WriteError)):
            traced(write, 3)


def test_another_tensor_at_another_batch() -> None:
    """Each trace has the tensor of its own batch."""
    model = deep()[1]
    for count in (2, 3, 1, 2):
        vector = rows(count, 5)
        with model.trace(rows(count)):
            model.layers[1].output[:] += vector
            out = model.output.save()
        bitwise(out, right(lambda h, out, vector=vector: out + vector, count))  # type: ignore[misc]


@pytest.mark.parametrize(("write", "count"), FITS_ONE_SIZE)
def test_edits_are_said_again_at_each_size(write: Write, count: int) -> None:
    """A body that is recorded anew broadcasts one row, and refuses two."""
    model = deep()[1]
    with model.edit(rows(count)) as edited:
        edited.layers[1].output = write(edited.layers[0].output, edited.layers[1].output)
    bitwise(edited(rows(count)), right(write, count))
    if count == 1:
        bitwise(edited(rows(4)), right(write, 4))
    else:
        with pytest.raises(fxsight.WriteError, match="the shapes cannot be broadcast"):
            edited(rows(4))


def test_a_block_that_is_written_once() -> None:
    model = deep()[1]
    with pytest.raises(fxsight.InputError, match="trace again"), model.session() as session:
        outs = fxsight.list().save()
        with session.iter([rows(1), rows(3)]) as item, model.trace(item):
            model.layers[1].output = model.layers[0].output.mean(0, keepdim=True)
            outs.append(model.output)
    with model.session() as session:
        outs = fxsight.list().save()
        with session.iter([rows(1), rows(3)]) as item, model.trace(item):
            model.layers[1].output = model.layers[0].output.flip(0)
            outs.append(model.output)
    for out, count in zip(outs, (1, 3), strict=True):
        bitwise(out, right(lambda h, out: h.flip(0), count))


def test_a_number_that_is_not_there_at_other_sizes_is_torchs_own_error() -> None:
    model = deep()[1]
    with model.trace(rows(4)) as tracer:
        model.layers[1].output[3] = 0
        model.output.save()
    with pytest.raises(IndexError, match="index 3 is out of"):
        tracer.program(rows(2))
    bitwise(tracer.program(rows(5))[0], oracle.run(deep()[0], (rows(5),), {}, [_zero(3)])[0])


def _zero(row: int) -> oracle.Edit:
    def change(h: Tensor) -> None:
        h[row] = 0

    return oracle.Edit("layers.1", "output", "inplace", change)
