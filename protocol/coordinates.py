"""Network coordinates: each peer a point in a space in which distances are round trips.

Nobody can measure the ways between all peers, and routes need just those between others. So each
node keeps a point, moves it a little with each round trip that it measures to a peer whose point it
knows, and announces it; then the way between any two is the distance of their points.

Theory: Vivaldi (F. Dabek, R. Cox, F. Kaashoek, R. Morris: "Vivaldi: A Decentralized Network
Coordinate System", SIGCOMM 2004), with its adaptive timestep and its height vectors. Each pair is a
spring whose rest length is the measured round trip. A node's confidence in its own point, beside the
other's in theirs, decides how far it yields. The height is what every way from a node has in common,
its line to the nearest exchange, for which there is no place in a plane: it is added to every
distance, whatever the direction.

Vivaldi forgets a measurement that it has used. A node here keeps its figures for half an hour anyway
(``round_trips.py``), so it lets them pull again and again: one in a swarm that has settled finds its
place by its first few dozen of them.

Rules of this file: strangers say their points, so ``checked`` bounds every figure, and one measurement
moves our own point by no more than ``MAX_MOVE``, whatever the other says of itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import checks
from .checks import BadValueError
from .dice import Dice

DIMENSIONS = 3
"""A globe does not fit into a plane, and more than three are of no use to it (``scripts/simulate``)."""
MAX_SECONDS = 60.0
"""Of each figure."""
LEAST_HEIGHT = 1e-5
LEAST_ERROR = 0.02
"""Nobody is believed to be surer than this, so that a liar pulls no harder than an honest old peer."""
TUNING = 0.25
"""The paper's c_c and c_e: how much of the way to where a measurement would have us we go at most, and
how much of our error it decides at most. A quarter is what the paper recommends."""
MAX_MOVE = 0.05
"""Seconds. Honest measurements move us that far in our first minute only."""
SWEEPS = 3
MAX_SPRINGS = 48
"""Measurements, of those that a node keeps, that pull at it in one relaxation: some milliseconds."""
_TICKS = 100_000
"""A second's: figures travel as whole numbers of these, which are short."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A point, and how sure its owner is of it."""

    position: tuple[float, ...] = (0.0,) * DIMENSIONS
    """Seconds of round trip along each axis."""
    height: float = LEAST_HEIGHT
    """The same: what is added to every distance."""
    error: float = 1.0
    """Of the distances that it gives, relative; 1: it knows nothing."""

    def distance(self, other: "Coordinate") -> float:
        """The round trip between two points, in seconds."""
        return math.dist(self.position, other.position) + self.height + other.height

    def moved(self, other: "Coordinate", round_trip: float, dice: Dice) -> "Coordinate":
        """This point after a measured ``round_trip`` to another one."""
        round_trip = max(round_trip, LEAST_HEIGHT)
        distance = self.distance(other)
        weight = self.error / (self.error + max(other.error, LEAST_ERROR))
        missed = min(1.0, abs(distance - round_trip) / round_trip)
        error = missed * TUNING * weight + self.error * (1 - TUNING * weight)
        move = max(-MAX_MOVE, min(MAX_MOVE, TUNING * weight * (round_trip - distance)))
        apart = math.dist(self.position, other.position)
        if apart > LEAST_HEIGHT:
            ways = [here - there for here, there in zip(self.position, other.position, strict=True)]
            height = self.height + move * (self.height + other.height) / distance
        else:  # at one place: somewhere, and with all the force, or all would rise instead of parting
            ways = [dice.random() - 0.5 for _ in self.position]
            distance, height = math.hypot(*ways), self.height
        position = [
            here + move * way / distance for here, way in zip(self.position, ways, strict=True)
        ]
        return Coordinate(
            tuple(max(-MAX_SECONDS, min(MAX_SECONDS, part)) for part in position),
            max(LEAST_HEIGHT, min(MAX_SECONDS, height)),
            max(LEAST_ERROR, error),
        )

    def plain(self) -> list[int]:
        """As it travels: the axes and the height in hundred-thousandths of a second, the error in %."""
        return [
            *(round(part * _TICKS) for part in (*self.position, self.height)),
            round(self.error * 100),
        ]


def relaxed(
    own: Coordinate, measured: Sequence[tuple[Coordinate, float]], dice: Dice
) -> Coordinate:
    """Our point after round trips to others have pulled at it until it hardly moves."""
    for _ in range(SWEEPS):
        for other, round_trip in sorted(measured, key=lambda _: dice.random())[:MAX_SPRINGS]:
            own = own.moved(other, round_trip, dice)
    return own


_axis = checks.integer(-round(MAX_SECONDS * _TICKS), round(MAX_SECONDS * _TICKS))
_height = checks.integer(1, round(MAX_SECONDS * _TICKS))
_error = checks.integer(1, 100)


def checked(value: Any) -> Coordinate:
    """A check of what ``Coordinate.plain`` gives."""
    if not isinstance(value, list | tuple) or len(value) != DIMENSIONS + 2:
        raise BadValueError(f"a list of {DIMENSIONS + 2} whole numbers")
    *axes, height, error = value
    return Coordinate(
        tuple(_axis(axis) / _TICKS for axis in axes), _height(height) / _TICKS, _error(error) / 100
    )
