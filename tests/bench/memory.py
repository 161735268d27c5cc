"""Memory of one trace at its peak, in fresh processes: ``python -m tests.bench.memory TASK MODEL`` prints MiB.

The capture, and one run of each kind on a small input, come before; what is shown is what one large input adds.
"""

import gc
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.bench import models
from tests.bench.case import NNSIGHT_PYTHON, Bench, Workload, say
from tests.bench.remote import ROOT, environment
from tests.bench.report import Table

TASKS = ["bare module", "nnsight, one block", "fxsight, one block", "fxsight, last block", "fxsight, all logits"]


# Blocks of 64 KiB and more go back when they are freed: what is held is what is used.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def second_peak(job: Callable[[], Any]) -> float:
    """What a job that has run before holds at its peak above what the process holds before it, in MiB; Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is held now
    before = _held("VmRSS")
    job()
    return _held("VmHWM") - before


def _held(what: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def _call(task: str, net: Any) -> Callable[[torch.Tensor], Any]:
    """The work of a task on some tokens."""
    tool, _, what = task.partition(", ")
    if tool == "bare module":
        return lambda ids: net(ids)
    package, name = ("nnsight", "NNsight") if tool == "nnsight" else ("fxsight.model", "Model")
    model = getattr(importlib.import_module(package), name)(net)

    def trace(ids: torch.Tensor) -> Any:
        blocks = model.transformer.h
        with model.trace(ids):
            part = {"one block": lambda: blocks[len(blocks) // 2], "last block": lambda: blocks[-1]}.get(what)
            found = (model if part is None else part()).output.save()
        return found

    return trace


def _measure(bench: Bench) -> Iterator[Table]:
    rows: list[list[str]] = []
    name = "toy" if bench.options.quick else "gpt2"
    for task in TASKS:
        if task.startswith("nnsight") and not bench.worker:
            continue
        say(f"memory: {task}")
        python = NNSIGHT_PYTHON if task.startswith("nnsight") else Path(sys.executable)
        command = [str(python), "-m", "tests.bench.memory", task, name]
        env = environment(bench.options.threads)
        done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=-1, text=True)
        rows.append([task, f"{json.loads(done.stdout.splitlines()[-1]):.0f} MiB"])
    named = "T2's toy transformer" if bench.options.quick else "GPT-2 small"
    yield Table(f"Memory that a forward adds, {named}, 8 x 256 tokens", ["", "peak above"], rows, "No gradients.")


def main() -> None:
    net: Any = models.MODELS[sys.argv[2]]()
    call, length = _call(sys.argv[1], net), min(256, net.config.n_positions)
    with torch.no_grad():
        for _ in range(2):
            call(models.tokens(net, 2, 8))
        before = peak()
        result = call(models.tokens(net, 8, length))
        added = peak() - before
    assert result is not None
    print(json.dumps(added))


WORKLOAD = Workload("memory", "what one forward adds to the memory of the process", _measure)

if __name__ == "__main__":
    main()
