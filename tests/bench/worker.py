"""Runs in nnsight's environment: answers questions on stdin, one JSON object a line.

{"do": "result", "job": name}: where its result lies.
{"do": "time", "job": name, "calls": n}: seconds for one call.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.bench.nnsight_jobs import JOBS, version
from tests.bench.timing import Local


class Answers:
    """Jobs made when first asked for, and kept."""

    def __init__(self, folder: Path, quick: bool, cpu: bool) -> None:
        self._folder, self._quick, self._cpu = folder, quick, cpu
        self._clocks: dict[str, Local] = {}

    def _make(self, job: str) -> Local:
        return self._clocks.setdefault(job, Local(JOBS[job](self._quick), self._cpu))

    def answer(self, do: str, job: str = "", calls: int = 1) -> Any:
        if do == "about":
            return {"nnsight": version(), "torch": torch.__version__}
        clock = self._clocks.get(job) or self._make(job)
        if do == "time":
            return clock.time(calls)
        path = self._folder / f"{len(self._clocks)}.pt"
        torch.save([tensor.clone() for tensor in clock.result()], path)
        return str(path)


def main() -> None:
    folder, threads, quick, cpu = sys.argv[1:]
    torch.set_num_threads(int(threads))
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is not an answer
    answers = Answers(Path(folder), quick == "1", cpu == "1")
    for line in sys.stdin:
        try:
            reply = {"answer": answers.answer(**json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
