"""A histogram counts every value once, at its bound."""

import math

from petals.inference.histogram import Histogram


def test_values_are_counted_by_their_bounds() -> None:
    histogram = Histogram("sizes", (1, 2, 4))
    for value in (0, 1, 1.5, 2, 3, 9):
        histogram.observe(value)
    figures = histogram.figures()
    assert figures.meaning == "sizes"
    assert list(figures.buckets) == [(1, 2), (2, 4), (4, 5), (math.inf, 6)]
    assert figures.total == 16.5
