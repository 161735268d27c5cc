"""Python's garbage collector waits while many small objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def waiting() -> Generator[None]:
    """While open, nothing is collected; afterwards as before.

    Graphs are many small objects that refer to one another, and none of them is garbage while they are made: looking
    through all of them again and again takes a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
