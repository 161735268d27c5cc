"""One start in a process of its own: ``python -m tests.bench.fresh TASK MODEL CLOCK`` prints what it took, as JSON.

Seconds: ``import`` of the tool after torch and transformers, ``first`` and ``second`` call.
``peak``: MiB of memory.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.bench import models

Trace = Callable[..., Any]


def _cpu() -> float:
    """Seconds of processor that this process and those it has started and seen end have taken."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def _timed(call: Callable[[], Any], now: Callable[[], float]) -> float:
    start = now()
    call()
    return now() - start


def _fxsight(net: Any, ids: torch.Tensor, backend: str = "eager") -> Trace:
    model = importlib.import_module("fxsight.model").Model(net, cache=True)

    def trace() -> Any:
        with model.trace(ids, backend=backend):
            return model.transformer.h[0].output.save()

    return trace


def _inductor(net: Any, ids: torch.Tensor) -> Trace:
    """One block steered, the last logits saved; captured already: the first call is the compilation."""
    model = importlib.import_module("fxsight.model").Model(net, cache=False)
    vector = models.direction(net)

    def trace(backend: str = "inductor") -> Any:
        with model.trace(ids, backend=backend):
            model.transformer.h[0].output += vector
            return model.output.logits[:, -1].save()

    trace("eager")
    return trace


def _regions(net: Any, ids: torch.Tensor, is_steered: bool = False) -> Trace:
    """The last rows of the output saved, and a block steered; captured already: the first call is the compilation."""
    model = importlib.import_module("fxsight.model").Model(net, cache=True)

    def trace(backend: str = "inductor") -> Any:
        with model.trace(ids, backend=backend) as tracer:
            if is_steered:
                model.transformer.h[0].output += models.direction(net)
            (model.lm_head if hasattr(net, "lm_head") else model).output[:, -1].save()
        return tracer.program

    trace("eager")
    return trace


def _whole(net: Any, ids: torch.Tensor) -> Trace:
    """The same in one piece."""
    program = _regions(net, ids)("eager")
    whole = type(program)(program.program, net, [], "inductor", {})
    whole.compile_whole()
    return lambda: whole(ids)


def _nnsight(net: Any, ids: torch.Tensor) -> Trace:
    model = importlib.import_module("nnsight").NNsight(net)

    def trace() -> Any:
        with model.trace(ids):
            hidden = model.transformer.h[0].output.save()
        return hidden

    return trace


def _export(net: Any, ids: torch.Tensor) -> Trace:
    """What any capture by ``torch.export`` costs at least."""
    free = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    arguments = {"input_ids": ids, "use_cache": False}
    return lambda: torch.export.export(net, (), arguments, strict=False, dynamic_shapes=free)


def _bare(net: Any, ids: torch.Tensor) -> Trace:
    return lambda: net(ids)


def _compile(net: Any, ids: torch.Tensor) -> Trace:
    fast: Callable[..., Any] = torch.compile(net)
    return lambda: fast(ids)


TASKS: dict[str, tuple[str, Callable[[Any, torch.Tensor], Trace]]] = {
    "fxsight": ("fxsight.model", _fxsight),
    "inductor": ("fxsight.model", _inductor),
    "regions": ("fxsight.model", _regions),
    "steered": ("fxsight.model", partial(_regions, is_steered=True)),
    "whole": ("fxsight.model", _whole),
    "nnsight": ("nnsight", _nnsight),
    "export": ("torch", _export),
    "bare": ("torch", _bare),
    "compile": ("torch", _compile),
}


def main() -> None:
    task, name, clock = sys.argv[1:]
    now = _cpu if clock == "cpu" else time.perf_counter
    package, make = TASKS[task]
    net: Any = models.MODELS[name]()
    ids = models.rows() if name == "kernel" else models.tokens(net, 2, 16)
    importing = _timed(lambda: importlib.import_module(package), now)
    trace = make(net, ids)
    first, second = _timed(trace, now), _timed(trace, now)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"import": importing, "first": first, "second": second, "peak": peak}))


if __name__ == "__main__":
    main()
