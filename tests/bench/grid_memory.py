"""Peak memory of a grid, W8 or EAP, in fresh processes: ``python -m tests.bench.grid_memory w2 "fxsight sweep" small``.

Models, captures, plans and the clean run are there before, and one plain forward; what is shown is what the cells add.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.bench import models
from tests.bench.case import CAREFUL, FAST, HOOKS, NNSIGHT, NNSIGHT_PYTHON, SESSION, SWEEP, TRACE, Bench, Workload, say
from tests.bench.grid import Task
from tests.bench.memory import RETURNED, peak, second_peak
from tests.bench.remote import ROOT, environment
from tests.bench.report import Table
from tests.bench.timing import Job

CONTENDERS: dict[str, Sequence[str]] = {
    "w1": (HOOKS, CAREFUL, NNSIGHT, SESSION, SWEEP, FAST),
    **dict.fromkeys(("w2", "w3", "w21"), (HOOKS, NNSIGHT, SWEEP, FAST)),
    **dict.fromkeys(("w8", "eap"), (HOOKS, CAREFUL, NNSIGHT, TRACE)),
}
GRADIENTS = {"w8": "w8 gpt2 attribution", "eap": "eap gpt2"}  # and what nnsight's job is called


def _job(workload: str, contender: str, size: str, net: Any, task: Task) -> Job:
    """The cells of a workload as one contender computes them."""
    if contender == NNSIGHT:
        from tests.bench.nnsight_jobs import JOBS

        return JOBS[GRADIENTS.get(workload, f"{workload} {size}")](False)
    from fxsight.model import Model
    from tests.bench import eap, sweeps, w1, w8

    if workload in GRADIENTS:
        kind = (w8.Attribution if workload == "w8" else eap.Edges)(net, replace(task, **_few(task)))
        if contender == TRACE:  # its programs are there before, as those of sweeps are
            kind.traced()
            kind.traced()
        kind.task = task
        return kind.traced if contender == TRACE else kind.hooked(contender == CAREFUL)
    model = Model(net, cache=False)
    if workload == "w1":
        made: dict[str, Callable[[], Job]] = {
            HOOKS: lambda: w1.naive(net, task),
            CAREFUL: lambda: w1.careful(net, task),
            SESSION: lambda: w1.in_session(model, task),
            SWEEP: lambda: w1.swept(model, task, "exact"),
            FAST: lambda: w1.swept(model, task, "fast"),
        }
        return made[contender]()
    make = {"w2": sweeps.w2, "w3": sweeps.w3, "w21": sweeps.w21}[workload]
    return make(net, model, task)[0][contender]


def _few(task: Task) -> dict[str, Any]:
    """Two prompts of four tokens."""
    return {"clean": task.clean[:2, :4], "corrupted": task.corrupted[:2, :4]}


def _measure(bench: Bench) -> Iterator[Table]:
    size = "small" if bench.options.quick else "gpt2"
    names = list(dict.fromkeys(name for row in CONTENDERS.values() for name in row))
    rows: list[list[str]] = []
    for workload, contenders in CONTENDERS.items():
        found = dict.fromkeys(names, "")
        for contender in contenders:
            if contender == NNSIGHT and (not bench.worker or (size == "small" and workload in GRADIENTS)):
                continue
            say(f"memory of {workload}: {contender}")
            python = NNSIGHT_PYTHON if contender == NNSIGHT else Path(sys.executable)
            command = [str(python), "-m", "tests.bench.grid_memory", workload, contender, size]
            env = environment(bench.options.threads) | RETURNED
            done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=-1, text=True)
            found[contender] = f"{json.loads(done.stdout.splitlines()[-1]):.0f} MiB"
        rows.append([workload.upper(), *found.values()])
    named = "4 layers of width 256" if bench.options.quick else "GPT-2 small"
    yield Table(f"Memory that all cells add at their peak, {named}", ["", *names], rows, "Beside one plain forward.")


def main() -> None:
    workload, contender, size = sys.argv[1:]
    with torch.set_grad_enabled(workload in GRADIENTS):
        net: Any = models.MODELS[size]()
        task = Task.of(net, False)
        job = _job(workload, contender, size, net, task)
        net(task.corrupted)
        if workload in GRADIENTS:
            job()
            added = second_peak(job)
        else:
            before = peak()
            job()
            added = peak() - before
    print(json.dumps(added))


WORKLOAD = Workload("gridmemory", "what W1, W2, W3, W8, EAP and W21 add to the memory (minutes)", _measure, False)

if __name__ == "__main__":
    main()
