"""Module and example inputs → program: ``torch.export`` with every free size left free.

The module is exported as it is, in its current mode, not functionalised: the program calls the same operators in the
same order as the module, so that its numbers are the module's own, bit for bit.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxsight import _torch
from fxsight.builder import Builder, fixed, title_of
from fxsight.capture_errors import Refused, capture_error
from fxsight.errors import InputError
from fxsight.past import Count, pasts_in
from fxsight.program import Program
from fxsight.provenance import Scribe
from fxsight.sizes import bind_sizes
from fxsight.source import SourceReader
from fxsight.state import restored
from fxsight.tree import Tree, flatten

AUTO = torch.export.Dim.AUTO


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reader: SourceReader | None = None,
    on_tick: OnTick = None,
) -> Program:
    """The program of ``module(*args, **kwargs)``, for all sizes of the inputs that the model's code allows.

    The module is called once, on fake tensors: nothing is computed, and meta-device modules work.

    Raises: CaptureError with the model's line, when the model cannot be one graph.
    """
    return capture_all(module, args, kwargs, reader, on_tick)[-1]


def capture_all(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reader: SourceReader | None = None,
    on_tick: OnTick = None,
    method: str = "forward",
) -> list[Program]:
    """One program, or several when the first excludes these very inputs: the last holds for them.

    A model whose code asks whether the batch is one gets a program for one and another for more.
    method: what is called; its program stands where that of the forward does, at the root's address.

    Raises: CaptureError.
    """
    leaves, inputs = flatten((args, dict(kwargs)))
    is_step = any(pasts_in((args, kwargs)))
    made: list[Program] = []
    failure = _hidden(module)
    for plan in [] if failure else _plans(module, [x for x in leaves if is_free(x)], is_step):
        flat = _Flat(module, inputs, leaves, Scribe(module, reader or SourceReader(), on_tick), method)
        program = _attempt(flat, plan)
        if isinstance(program, Program):
            made.append(program)
            failure = _misfit(program, leaves)
            if failure is None:
                return made
            continue
        failure = program
        if _torch.takes_functions(failure):
            break  # whatever the sizes
    assert failure is not None, "there is always a plan"
    # The last plan is the inputs as they are: its error has their sizes in it.
    raise capture_error(title_of(module, method), failure) from (None if isinstance(failure, Refused) else failure)


def _hidden(module: nn.Module) -> Exception | None:
    """Why there is nothing to see in a module, if so."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            cause = f"{path or 'it'} is compiled by torch.jit, which hides its operations"
            return Refused(cause, "use the module it was compiled from")
    return None


def _attempt(flat: _Flat, plan: Plan) -> Program | Exception:
    """The program, or why there is none this way."""
    try:
        with restored(flat.module):
            exported = _export(flat, plan)
    except _Stopped as stopped:
        return stopped.error
    except Exception as error:  # whatever torch raises becomes one CaptureError
        return error
    try:
        return Builder(flat.scribe, flat.inputs, flat.leaves, exported, flat.method).program()
    except Refused as refused:
        return refused


def _misfit(program: Program, leaves: Sequence[Any]) -> InputError | None:
    """Why a program does not hold for the inputs that it was made with, if so."""
    try:
        bind_sizes(program, leaves)
    except InputError as error:
        return error
    return None


_ONE_AT_A_TIME = threading.RLock()  # torch.export has state that all threads share
OnTick = Callable[[], None] | None
Shapes = tuple[Any, ...]  # per input, its free dimensions


@dataclass(frozen=True)
class Plan:
    """One way to export: example tensors, their free dimensions, whether with transformers' patches, and whether the
    model knows that it is exported."""

    tensors: tuple[Any, ...]
    shapes: Shapes
    patched: bool = False
    noticed: bool = True


def _plans(module: nn.Module, given: list[Any], is_step: bool) -> Iterator[Plan]:
    """What to try, freest first; at last the inputs as they are.

    given: tensors, and counts of caches.  is_step: whether there is a cache: one token then stays one.
    """
    rows = {t.shape[0] for t in given if isinstance(t, torch.Tensor) and t.ndim > 1}
    tensors = tuple(int(t) if isinstance(t, int) else t for t in given)
    examples = tuple(map(_pair, tensors)) if rows == {1} else tensors  # a batch of one is shown as a batch of two
    free, outer = tuple(_dims(t, 9, is_step) for t in given), tuple(_dims(t, 2, is_step) for t in given)
    if is_step or _asks_of_export(module):  # a model over a cache chooses its kernels by it
        yield Plan(examples, free, noticed=False)
        yield Plan(tensors, free, noticed=False)
    yield Plan(examples, free)
    yield Plan(tensors, free)
    yield Plan(examples, outer)
    if any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__):
        yield Plan(examples, outer, patched=True)
        yield Plan(tensors, outer, patched=True)
    yield Plan(tensors, tuple(None if isinstance(t, int) else {} for t in given))


# In the file of a model of transformers: its code has another way for exports, with other bits (the gated delta rules),
# or is given a mask only then (attention to both sides), and is causal without.
_CHOOSING = frozenset(("is_torchdynamo_exporting", "create_bidirectional_sliding_window_mask"))


def _asks_of_export(module: nn.Module) -> bool:
    """Whether a part does something else when it is told that it is exported."""
    names = {type(part).__module__ for part in module.modules()}
    return any(not _CHOOSING.isdisjoint(vars(sys.modules[name])) for name in names if name in sys.modules)


def is_free(leaf: Any) -> bool:
    """Whether a program is free in an input: a tensor, or a count of a cache."""
    return isinstance(leaf, torch.Tensor) or type(leaf) is Count


def _pair(leaf: Any) -> Any:
    """A tensor with one row as one with two, its dimensions in the same order in memory."""
    if not isinstance(leaf, torch.Tensor) or leaf.ndim < 2:
        return leaf
    steps = leaf.stride()
    inner = sorted(range(1, leaf.ndim), key=lambda dim: -steps[dim])
    there = leaf.expand(2, *leaf.shape[1:]).permute(0, *inner).contiguous()
    return there.permute(0, *(1 + inner.index(dim) for dim in range(1, leaf.ndim)))


def _dims(leaf: Any, most: int, is_step: bool) -> Any:
    """The free dimensions of a tensor among the first ``most``; a count is free itself.

    In a step that is given one token, code asks whether there are more, as no program free in that can answer.
    """
    if isinstance(leaf, int):
        return AUTO
    one = {d for d in range(1, leaf.ndim) if is_step and leaf.shape[d] == 1 and leaf.ndim < 4}
    return {d: AUTO for d in range(min(leaf.ndim, most)) if d not in one}


def _export(flat: _Flat, plan: Plan) -> torch.export.ExportedProgram:
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(_torch.honest_sizes())
        stack.enter_context(_torch.quiet_export())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # a capture draws nothing from the user's numbers
        if plan.patched:
            stack.enter_context(_transformers_patches(flat.module))
        flat.noticed = plan.noticed
        shapes = {"leaves": plan.shapes} if plan.tensors else None
        return torch.export.export(flat, plan.tensors, strict=False, dynamic_shapes=shapes)


@contextmanager
def _transformers_patches(module: nn.Module) -> Generator[None]:
    """What transformers itself changes in its models while exporting them (``transformers.exporters``)."""
    from transformers.exporters.exporter_dynamo import reset_model_state
    from transformers.exporters.utils import apply_patches

    with apply_patches("dynamo"), reset_model_state(module):
        yield


class _Flat(nn.Module):
    """The module as a function of its tensor leaves alone, watched by a scribe."""

    def __init__(self, module: nn.Module, inputs: Tree, leaves: Sequence[Any], scribe: Scribe, method: str) -> None:
        super().__init__()
        self.module = module
        self.inputs, self.leaves, self.scribe, self.method = inputs, leaves, scribe, method
        self.noticed = True  # see ``Plan``
        # What the call returned is kept in the scribe: export takes back what a module keeps while it traces.
        self.train(module.training)

    def train(self, mode: bool = True) -> _Flat:
        """Does not reach into the user's module."""
        self.training = mode
        return self

    def forward(self, *leaves: Any) -> tuple[Any, ...]:
        given = iter(leaves)
        args, kwargs = self.inputs.build([next(given) if is_free(x) else x for x in self.leaves])
        pasts = tuple(pasts_in((args, kwargs)))
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        try:
            with self.scribe.watching(), nullcontext() if self.noticed else _torch.unnoticed_export():
                output = self._call(args, kwargs)
            self._write_back(buffers)
        except Exception as error:
            raise _Stopped(error) from error
        found, tree = flatten(output)
        values = [isinstance(x, (torch.Tensor, torch.SymInt)) for x in found]
        others = tuple(None if is_value else fixed(x) for x, is_value in zip(found, values, strict=True))
        self.scribe.returned = (tree, others)
        left = self.scribe.leave(pasts) if pasts else []  # returned, too: export drops what nothing returns
        return (*(x for x, is_value in zip(found, values, strict=True) if is_value), *left)

    def _call(self, args: Any, kwargs: Any) -> Any:
        is_forward = self.method == "forward"
        return self.module(*args, **kwargs) if is_forward else self.scribe.call_method(self.method, args, kwargs)

    def _write_back(self, before: Mapping[str, torch.Tensor]) -> None:
        """A tensor put in the place of a buffer is copied into the buffer: a program knows buffers by name."""
        now = dict(self.module.named_buffers(remove_duplicate=False))
        changed = {name: now[name] for name in before if name in now and now[name] is not before[name]}
        shared = {_torch.storage_key(before[name]) for name in changed}
        for name, tensor in changed.items():
            if _layout(tensor) != _layout(before[name]):
                cause = f"it puts a tensor of another shape, dtype or device in the place of the buffer {name}"
                fix = "make the buffer like that from the start, or keep the tensor in an attribute"
                raise Refused(cause, fix, _torch.export_node(tensor))
            if _torch.storage_key(tensor) in shared:  # two buffers changed places
                changed[name] = tensor.clone()
        for name, tensor in changed.items():
            before[name].copy_(tensor)
        self.scribe.tick()


class _Stopped(Exception):
    """An error of the model on its way through torch.export, which prints errors that it knows and adds advice."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return [_torch.size_expr(size) for size in tensor.shape], tensor.dtype, tensor.device
