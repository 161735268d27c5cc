"""Paired times: every contender is timed in every round, one batch after the other, in an order that rotates.

Other work on the machine slows neighbours alike: ratios within a round hold where absolute times do not.
The garbage collector stays on: what a tool leaves behind is part of its cost.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from torch import Tensor

Job = Callable[[], Sequence[Tensor]]
BATCH = 0.03  # seconds that one batch of short calls should take


class Clock(Protocol):
    """One contender, here or in another process."""

    def result(self) -> list[Tensor]:
        """What it computes, to be compared."""
        ...

    def time(self, calls: int) -> float:
        """Seconds for one call, as the mean of a batch."""
        ...


class Local:
    """A job in this process.

    cpu: time is that of the process, not of the clock on the wall: what others do on the machine is left out.
    """

    def __init__(self, job: Job, cpu: bool = False) -> None:
        self._job = job
        self._now = time.process_time if cpu else time.perf_counter

    def result(self) -> list[Tensor]:
        return list(self._job())

    def time(self, calls: int) -> float:
        job, now = self._job, self._now
        start = now()
        for _ in range(calls):
            job()
        return (now() - start) / calls


@dataclass(frozen=True)
class Paired:
    """One contender's seconds per call in each round, beside the reference's in the same rounds."""

    seconds: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds for one call."""
        return median(self.seconds)

    @property
    def ratio(self) -> float:
        """Median of the ratios to the reference within each round."""
        return median(own / other for own, other in zip(self.seconds, self.reference, strict=True))

    @property
    def over(self) -> float:
        """Seconds above the reference: median of the differences within each round."""
        return median(own - other for own, other in zip(self.seconds, self.reference, strict=True))

    @property
    def over_at_best(self) -> float:
        """Seconds above the reference, each at its fastest: nearer to what a quiet machine shows."""
        return min(self.seconds) - min(self.reference)


def interleave(clocks: Mapping[str, Clock], rounds: int, calls: int | None = None) -> dict[str, tuple[float, ...]]:
    """Seconds per call of each contender in each round.

    calls: in one batch; by default as many as fill ``BATCH``.
    """
    counts = {name: calls or _calls(clock) for name, clock in clocks.items()}
    names = list(clocks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(clocks[name].time(counts[name]))
    return {name: tuple(found) for name, found in seconds.items()}


def _calls(clock: Clock) -> int:
    once = clock.time(1)
    if once < BATCH:
        once = clock.time(5)
    return max(1, round(BATCH / once))
