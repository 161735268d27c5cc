"""``python -m tests.coverage [model type ...]``: one process for each architecture, one after the other."""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.coverage.probe import probe
from tests.coverage.recipes import names
from tests.coverage.table import table

LIMIT = 240  # seconds for one architecture
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def _run(kind: str, end: Connection) -> None:
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
        found: dict[str, Any] = ours.recv() if ours.poll(LIMIT) else {"fails": "time", "cause": f"over {LIMIT} s"}
    except EOFError:
        found = {"fails": "process", "cause": "it ended by itself"}
    process.kill()
    process.join()
    return {"kind": kind, **found}


def main() -> None:
    """Ask for all, or for those named; a whole run writes the page."""
    kinds = sys.argv[1:] or list(names())
    reports = []
    for kind in kinds:
        reports.append(ask(kind))
        print(json.dumps(reports[-1]), flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(table(reports))


if __name__ == "__main__":
    main()
