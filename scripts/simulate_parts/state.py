"""What is so at a moment of the simulation, as arrays over all nodes that ever come."""

from __future__ import annotations

import numpy as np

from .population import NUM_BLOCKS, Floats, Ints, Population

ABSENT, JOINING, ONLINE, MOVING, GONE = range(5)
"""MOVING: it has announced its new span, serves neither, and loads."""


class State:
    """Who is where."""

    def __init__(self, population: Population) -> None:
        count = len(population)
        self.population = population
        self.status: Ints = np.zeros(count, dtype=np.int64)
        self.start: Ints = np.zeros(count, dtype=np.int64)
        self.died: Floats = np.full(count, np.inf)
        """When it crashed."""
        self.session_blocks: Ints = np.zeros(count, dtype=np.int64)
        """Over all sessions that are open there, the blocks that they run."""

    @property
    def share(self) -> Floats:
        """What a node gives to each of its blocks."""
        share: Floats = self.population.speed / self.population.length
        return share

    def there(self) -> Ints:
        """Those that have come and not gone."""
        return np.flatnonzero((self.status > ABSENT) & (self.status < GONE))

    def online(self) -> Ints:
        """Those that serve."""
        return np.flatnonzero(self.status == ONLINE)

    def throughput(self, nodes: Ints) -> Floats:
        """Tokens per second through each block, by ``nodes``."""
        return self._sums(nodes, self.share[nodes])

    def coverage(self, nodes: Ints) -> Floats:
        """How many of ``nodes`` hold each block."""
        return self._sums(nodes, np.ones(len(nodes)))

    def _sums(self, nodes: Ints, values: Floats) -> Floats:
        start = self.start[nodes]
        changes = np.zeros(NUM_BLOCKS + 1)
        np.add.at(changes, start, values)
        np.add.at(changes, start + self.population.length[nodes], -values)
        sums: Floats = np.cumsum(changes[:-1])
        return sums
