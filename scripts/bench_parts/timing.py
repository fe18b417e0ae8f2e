"""Timing: samples of several contestants taken in turns, and their medians.

A machine drifts while it is measured, the more so when others use it. Contestants that take turns
(A B C A B C …) drift alike, so that the ratio of their medians holds where their figures do not.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

Sampler = Callable[[], float]
"""Does something once and returns its figure, most often seconds."""


def timed(action: Callable[[], object], repeats: int = 1) -> float:
    """Seconds that ``action`` takes, the mean of ``repeats`` in a row."""
    begin = time.perf_counter()
    for _ in range(repeats):
        action()
    return (time.perf_counter() - begin) / repeats


def interleaved(contestants: Mapping[str, Sampler], rounds: int) -> dict[str, list[float]]:
    """``rounds`` samples of each contestant, taken in turns after one that does not count."""
    for sample in contestants.values():
        sample()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, sample in contestants.items():
            samples[name].append(sample())
    return samples


def medians(contestants: Mapping[str, Sampler], rounds: int) -> dict[str, float]:
    """The median of each contestant's samples, taken as ``interleaved`` does."""
    taken = interleaved(contestants, rounds)
    return {name: statistics.median(samples) for name, samples in taken.items()}


class Heartbeat:
    """The longest time for which this process did not get to run, while the block runs.

    A process that others stop, or starve, has waits that are not its own doing. Whoever reports a
    longest wait should report this beside it.
    """

    def __init__(self, interval: float = 0.01) -> None:
        self._interval = interval
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.longest = 0.0
        """Seconds between two beats, the interval included."""

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _beat(self) -> None:
        last = time.perf_counter()
        while not self._stopping.wait(self._interval):
            now = time.perf_counter()
            self.longest = max(self.longest, now - last)
            last = now
