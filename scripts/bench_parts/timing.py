"""Timing: samples of several contestants taken in turns, and their medians.

A machine drifts while it is measured, the more so when others use it. Contestants that take turns
(A B C A B C …) drift alike, so that the ratio of their medians holds where their figures do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

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
