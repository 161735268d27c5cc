"""``python -m tests.coverage [model type ...]``: one process for each architecture, one after the other.

``python -m tests.coverage --page a.jsonl b.jsonl`` puts what such runs have printed into the page.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.coverage.probe import probe
from tests.coverage.recipes import names
from tests.coverage.table import table

LIMIT = 240  # seconds of the processor for one architecture
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")  # before the first operator: see tests/conftest.py
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def _run(kind: str, end: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    end.send(probe(kind))


def ask(kind: str) -> dict[str, Any]:
    """The report on one architecture, from a process that is ended when it takes too long."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv() if ours.poll(10 * LIMIT) else {"fails": "time", "cause": "no end"}
    except EOFError:
        found = {"fails": "process", "cause": f"it ended by itself; {LIMIT} s are allowed"}
    process.kill()
    process.join()
    return {"kind": kind, **found}


def main() -> None:
    """Ask for all, or for those named; a whole run writes the page."""
    if sys.argv[1:2] == ["--page"]:
        lines = [line for name in sys.argv[2:] for line in Path(name).read_text().splitlines()]
        PAGE.write_text(table([json.loads(line) for line in lines if line.startswith("{")], PAGE.read_text()))
        return
    kinds = sys.argv[1:] or list(names())
    reports = []
    for kind in kinds:
        reports.append(ask(kind))
        print(json.dumps(reports[-1]), flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(table(reports))


if __name__ == "__main__":
    main()
