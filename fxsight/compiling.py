"""What the other process does: ``python -m fxsight.compiling JOB PARENT SECONDS`` compiles one job, and ends.

It ends, too, when the process that has started it has ended, and when it takes too long: a timer of the system looks
each second.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

from fxsight.errors import FxsightWarning


def main(path: str, parent: str, seconds: str) -> None:
    """Compile the job of a file.  parent: a process.  seconds: how long it may take.

    Raises: what keeps it from being compiled or kept.
    """
    _watch(int(parent), time.monotonic() + float(seconds))
    from fxsight.job import read_job  # torch, which takes seconds: watched already

    try:
        os.nice(10)
        warnings.simplefilter("error", FxsightWarning)  # a folder that cannot be written
        read_job(Path(path)).do()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _watch(parent: int, end: float) -> None:
    def look(*_: Any) -> None:
        if os.getppid() != parent or time.monotonic() > end:
            _end_all()

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)


def _end_all() -> NoReturn:
    """This process and the compilers it has started."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
