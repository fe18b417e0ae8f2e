"""Network coordinates of simulated nodes: the product's rule, on the simulated ways.

A node measures a few dozen others, as ``protocol/round_trips.py`` has it do: half of them at random,
half the nearest that it meets. It finds its place when it has come, and looks for it again now and
then, as those whom it has measured find theirs.
"""

from __future__ import annotations

import random

import numpy as np
from petals.protocol.coordinates import Coordinate, relaxed

from .announcing import peer_id
from .population import Ints, Population

MEASURED = 32
"""What a node has measured when it has been there for four minutes: most have not loaded by then."""
MET = 128
"""Of so many the nearest are measured again."""
SETTLING = 4
"""Times that what a newcomer has measured pulls at it until it serves."""
HELD_UP = 0.05
"""By how much of it a round trip may take longer when it is measured."""


class Places:
    """Where nodes believe to be."""

    def __init__(self, people: Population, dice: random.Random) -> None:
        self._people = people
        self._dice = dice
        self._coordinates: dict[int, Coordinate] = {}
        self._measured: dict[int, dict[int, float]] = {}

    def of(self, node: int) -> Coordinate:
        """Where a node believes to be."""
        return self._coordinates.get(node, Coordinate())

    def round_trips(self, node: int) -> dict[str, float]:
        """What a node has measured, by peer id."""
        return {peer_id(other): time for other, time in self._measured.get(node, {}).items()}

    def find(self, node: int, there: Ints) -> None:
        """A node that has come measures others, who are ``there``."""
        met = there[np.array([self._dice.randrange(len(there)) for _ in range(MET)])]
        people = self._people
        ways = 2 * (
            people.access[node]
            + people.access[met]
            + people.between[people.city[node], people.city[met]]
        )
        nearest = np.argsort(ways, kind="stable")[: MEASURED // 2]
        chosen = np.unique(np.concatenate([met[nearest], met[: MEASURED // 2]]))
        self._measured[node] = {
            int(other): 2 * people.latency(node, int(other)) * (1 + HELD_UP * self._dice.random())
            for other in chosen
            if other != node
        }
        for _ in range(SETTLING):
            self.settle(node)

    def settle(self, node: int) -> None:
        """What a node has measured pulls at it again."""
        springs = [(self.of(other), time) for other, time in self._measured.get(node, {}).items()]
        self._coordinates[node] = relaxed(self.of(node), springs, self._dice)

    def forget(self, node: int) -> None:
        """A node has gone."""
        self._measured.pop(node, None)
