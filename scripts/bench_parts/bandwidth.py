"""How fast this machine reads memory: the bound that no decoding can pass.

A token needs every weight once, so weights' bytes over bandwidth is the least time that it takes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch

from .timing import Sampler, interleaved, timed
from .torch_thread import on_torch_thread

COLUMNS = 4096
REPEATS = 3


class Bandwidth:
    """Reads a tensor that no cache holds, in several ways; the fastest is the machine's speed."""

    @on_torch_thread
    def __init__(self, megabytes: int = 384) -> None:
        self._data = torch.ones(megabytes * 2**20 // 4 // COLUMNS, COLUMNS)
        self._row = torch.ones(COLUMNS)
        self.best = 0.0
        """Bytes per second, the best that was ever measured here."""

    @on_torch_thread
    def measure(self) -> float:
        """Bytes per second, now."""
        kernels: list[Callable[[], object]] = [
            self._data.sum,
            lambda: torch.mv(self._data, self._row),
            lambda: torch.linalg.vector_norm(self._data),
        ]
        seconds = min(timed(kernel) for kernel in kernels for _ in range(REPEATS))
        speed = self._data.nbytes / seconds
        self.best = max(self.best, speed)
        return speed

    def beside(
        self, contestants: Mapping[str, Sampler], rounds: int
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The contestants' medians, in seconds, and how fast the memory was for each.

        A host that others share changes within minutes, and the bound with it. So the memory is measured
        before and behind every sample, the faster counts, and what is the median is the product of both:
        the share of the bound.
        """
        speeds: dict[str, list[float]] = {name: [] for name in contestants}

        def between(name: str, sample: Sampler) -> float:
            before = self.measure()
            seconds = sample()
            speeds[name].append(max(before, self.measure()))
            return seconds

        samplers = {name: partial(between, name, own) for name, own in contestants.items()}
        taken = interleaved(samplers, rounds)
        medians = {name: statistics.median(samples) for name, samples in taken.items()}
        bytes_at_most = {
            name: [
                seconds * speed for seconds, speed in zip(own, speeds[name][-rounds:], strict=True)
            ]
            for name, own in taken.items()
        }
        return medians, {
            name: statistics.median(own) / medians[name] for name, own in bytes_at_most.items()
        }
