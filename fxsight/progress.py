"""One line on stderr while a capture takes long: ``⠹ capturing GPT2LMHeadModel, 3 s``.

No thread moves it: the scribe's clock (``provenance``) ticks at every call the model makes, and a tick may draw.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

AFTER = 1.0  # seconds without a word
EVERY = 0.1  # seconds between two drawings


class Progress:
    """Shows, from the second second on, that something is going on; gone when it is done.

        with Progress("capturing GPT2LMHeadModel") as progress:
            capture(module, args, kwargs, reader, on_tick=progress)

    clock: seconds.  console: where to draw; asked once, after the first second; None for nowhere.
    """

    def __init__(
        self,
        title: str,
        clock: Callable[[], float] = time.monotonic,
        console: Callable[[], Console | None] | None = None,
    ) -> None:
        self._title = title
        self._clock = clock
        self._console = console or stderr_console
        self._live: Live | None = None
        self._start = self._next = 0.0

    def __enter__(self) -> Progress:
        self._start = self._clock()
        self._next = self._start + AFTER
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, title: str = "") -> None:
        """A tick: draws when it is time to; costs a look at the clock otherwise.  title: from now on."""
        now = self._clock()
        self._title = title or self._title
        if now >= self._next:
            self._next = now + EVERY
            self._draw(now - self._start)

    def _draw(self, seconds: float) -> None:
        from rich.spinner import Spinner  # late: most captures are over before anything is drawn

        if self._live is None:
            console = self._console()
            if console is None:
                self._next = float("inf")
                return
            self._live = _live(console)
            self._spinner = Spinner("dots")
        self._spinner.update(text=f"{self._title}, {seconds:.0f} s")
        self._live.update(self._spinner, refresh=True)


def _live(console: Console) -> Live:
    """A line that is drawn when told to, and vanishes; what the model prints meanwhile goes above it."""
    from rich.live import Live

    live = Live(
        console=console,
        auto_refresh=False,  # else a thread would do it
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=console.file is sys.stderr,
    )
    live.start()
    return live


def stderr_console() -> Console | None:
    """A console on stderr, when a person looks at it: a terminal that can redraw a line, or a notebook that can."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:
        return console if find_spec("ipywidgets") is not None else None
    return console if sys.stderr.isatty() and not console.is_dumb_terminal else None
