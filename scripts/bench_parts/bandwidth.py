"""How fast this machine reads memory: the bound that no decoding can pass.

A token needs every weight once, so weights' bytes over bandwidth is the least time that it takes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

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
    ) -> tuple[dict[str, float], float]:
        """The contestants' medians, and the best speed of the memory, which took turns with them.

        Between them the machine is the same; an hour before it may have been another.
        """
        taken = interleaved({**contestants, "memory": self.measure}, rounds)
        speed = max(taken.pop("memory"))
        return {name: statistics.median(samples) for name, samples in taken.items()}, speed
