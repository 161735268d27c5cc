"""What comes before the first number: capture, cold and from disk, and compilation, in fresh processes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tests.bench.case import NNSIGHT_PYTHON, Bench, Options, Workload, say
from tests.bench.remote import ROOT, environment
from tests.bench.report import Table, duration

Numbers = dict[str, float]
COLUMNS = ["", "import", "first call", "second call", "peak memory"]


def _capture(bench: Bench) -> Iterator[Table]:
    options, python = bench.options, Path(sys.executable)
    found: dict[str, list[Numbers]] = {}
    starts = 1 if options.quick else 3
    for number in range(starts):
        with TemporaryDirectory(prefix="fxsight-bench-") as folder:
            tasks = [
                ("bare module", "bare", python),
                ("torch.export alone", "export", python),
                ("fxsight, nothing stored", "fxsight", python),
                ("fxsight, from disk", "fxsight", python),
                *([("nnsight", "nnsight", NNSIGHT_PYTHON)] if bench.worker else []),
            ]
            for title, task, interpreter in tasks:
                say(f"capture: {title}, start {number + 1}")
                found.setdefault(title, []).append(start(interpreter, task, options, folder))
    note = f"Medians of {starts} start(s). Import: the tool, after torch and transformers. The call reads one block."
    yield Table(f"First call in a fresh process, {_named(options)}", COLUMNS, table_rows(found), note)


def _compilation(bench: Bench) -> Iterator[Table]:
    options = bench.options
    tasks = [
        ("fxsight inductor, cold", "inductor"),
        ("fxsight inductor, Inductor's files on disk", "inductor"),
    ]
    tasks += [("torch.compile of the bare module, cold", "compile")] * options.compiled
    found: dict[str, list[Numbers]] = {}
    with TemporaryDirectory(prefix="fxsight-bench-") as folder:
        for title, task in tasks:
            say(f"compile: {title}")
            found[title] = [start(Path(sys.executable), task, options, f"{folder}/{task}")]
    yield Table(f"Compiling {_named(options)}", COLUMNS, table_rows(found), COMPILE_NOTE)


COMPILE_NOTE = "One start each. A block steered, the last logits saved; captured before, so the first call compiles."


def _named(options: Options) -> str:
    return "T2's toy transformer" if options.quick else "GPT-2 small"


def start(python: Path, task: str, options: Options, cache: str, model: str = "") -> Numbers:
    """One process; raises CalledProcessError, showing its messages, when it fails."""
    more = {"FXSIGHT_CACHE_DIR": f"{cache}/fxsight", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    if options.cpu_time:
        more["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool, whose processes outlive the measurement
    settings = [task, model or ("toy" if options.quick else "gpt2"), "cpu" if options.cpu_time else "wall"]
    command = [str(python), "-m", "tests.bench.fresh", *settings]
    env = environment(options.threads, **more)
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=-1, text=True)
    numbers: Numbers = json.loads(done.stdout.splitlines()[-1])
    return numbers


def table_rows(found: dict[str, list[Numbers]]) -> list[list[str]]:
    """A row for each title: medians over its starts."""
    return [
        [title, *_cells({key: median(n[key] for n in starts) for key in starts[0]})] for title, starts in found.items()
    ]


def _cells(numbers: Numbers) -> list[str]:
    return [*(duration(numbers[key]) for key in ("import", "first", "second")), f"{numbers['peak']:.0f} MiB"]


CAPTURE = Workload("capture", "first trace of GPT-2 small in a fresh process: cold, from disk, nnsight", _capture)
COMPILE = Workload("compile", "Inductor compile time of GPT-2 small steered, cold and warm (minutes)", _compilation)
