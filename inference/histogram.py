"""Counts of how large something was: what monitoring draws distributions from."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class HistogramFigures:
    """A histogram at one moment."""

    meaning: str
    buckets: tuple[tuple[float, int], ...]
    """Upper bounds, the last infinite, each with how many values were at most so large."""
    total: float
    """Of all values."""


class Histogram:
    """Counts values by the smallest of ``bounds`` that holds them. Not for several threads at once."""

    def __init__(self, meaning: str, bounds: Sequence[float]) -> None:
        self._meaning = meaning
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self.total = 0.0
        """Of all values so far."""

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def figures(self) -> HistogramFigures:
        """What was counted so far."""
        counts = accumulate(self._counts)
        return HistogramFigures(
            self._meaning, tuple(zip(self._bounds, counts, strict=True)), self.total
        )
