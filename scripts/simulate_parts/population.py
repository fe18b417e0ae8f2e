"""Who takes part: machines, where they are, when they come and how they go.

Machines are a mixture of six GPUs that people have, each with the blocks of a 70-block model of
BLOOM-176B's size that its memory holds in 4 bits, and its decode speed (the A100's is the Petals
paper's, the others are in proportion to memory bandwidth), give or take 15 %. They stand in 40
large cities, weighted by where the Internet's machines are. The one-way latency between two is the
great circle at two thirds of the speed of light, times 1.6 for the detours of cables, plus what
either end needs to reach its city's exchange: log-normal around 4 ms. A node stays for an
exponential time with the mean that the churn gives; half of those that go crash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NUM_BLOCKS = 70
MACHINES = (  # share of all, blocks (least, most), tokens per second through one block
    (0.15, 4, 6, 110.0),  # T4
    (0.25, 3, 5, 130.0),  # RTX 3060
    (0.25, 8, 10, 280.0),  # RTX 3090
    (0.15, 8, 10, 300.0),  # RTX 4090
    (0.12, 26, 32, 450.0),  # A100
    (0.08, 26, 32, 700.0),  # H100
)
CITIES = (  # latitude, longitude, weight
    *((40.7, -74.0, 8), (39.0, -77.5, 9), (41.9, -87.6, 5), (32.8, -96.8, 5), (37.4, -122.0, 9)),
    *((47.6, -122.3, 4), (34.0, -118.2, 6), (33.7, -84.4, 3), (43.7, -79.4, 3), (45.5, -73.6, 2)),
    *((51.5, -0.1, 7), (48.9, 2.4, 6), (50.1, 8.7, 9), (52.4, 4.9, 7), (52.5, 13.4, 3)),
    *((59.3, 18.1, 2), (60.2, 24.9, 2), (52.2, 21.0, 3), (50.5, 30.5, 2), (55.8, 37.6, 3)),
    *((41.4, 2.2, 2), (45.5, 9.2, 3), (48.2, 16.4, 2), (41.0, 29.0, 2), (32.1, 34.8, 1)),
    *((35.7, 139.7, 6), (37.6, 127.0, 4), (31.2, 121.5, 5), (22.3, 114.2, 3), (25.0, 121.5, 2)),
    *((1.4, 103.8, 5), (19.1, 72.9, 3), (12.9, 77.6, 3), (13.8, 100.5, 1), (-6.2, 106.8, 1)),
    *((-33.9, 151.2, 3), (-23.5, -46.6, 3), (-34.6, -58.4, 1), (19.4, -99.1, 1), (-26.2, 28.0, 1)),
)
EARTH_KM = 6371.0
KM_PER_SECOND = 200_000.0
DETOUR = 1.6
ACCESS_SECONDS = 0.004
ACCESS_SPREAD = 0.5
LOADING = (10.0, 60.0)
"""Seconds for each block: a gigabyte over 0.14 to 0.8 Gbit/s."""
CRASHES = 0.5
GROWTH = 1800.0
"""Seconds in which the first nodes come."""


@dataclass(frozen=True)
class Population:
    """All nodes that ever come, in the order in which they do; one array entry each."""

    comes: Floats
    goes: Floats
    crashes: npt.NDArray[np.bool_]
    """Whether it goes without a word."""
    length: Ints
    speed: Floats
    """Tokens per second through one block."""
    loading: Floats
    """Seconds to load a span."""
    city: Ints
    access: Floats
    between: Floats
    """Seconds from one city to another."""
    churn: float
    """How many of all go in an hour."""

    def __len__(self) -> int:
        return len(self.comes)

    def latency(self, sender: int, receiver: int) -> float:
        """Seconds one way."""
        if sender == receiver:
            return 0.0
        between = self.between[self.city[sender], self.city[receiver]]
        return float(self.access[sender] + self.access[receiver] + between)


def draw_population(
    nodes: int, hours: float, churn: float, dice: np.random.Generator
) -> Population:
    """``nodes`` that come within ``GROWTH``, and one for each that goes after that."""
    end = hours * 3600
    first = np.sort(dice.uniform(0, GROWTH, nodes))
    per_second = nodes * churn / 3600
    count = int(dice.poisson(per_second * max(0.0, end - GROWTH)))
    later = np.sort(dice.uniform(GROWTH, max(GROWTH, end), count))
    comes = np.concatenate([first, later])
    total = len(comes)
    kinds = dice.choice(len(MACHINES), total, p=[machine[0] for machine in MACHINES])
    least, most, speeds = (np.array([m[column] for m in MACHINES])[kinds] for column in (1, 2, 3))
    length = dice.integers(least.astype(int), most.astype(int) + 1)
    weights = np.array([city[2] for city in CITIES], dtype=float)
    stays = dice.exponential(3600 / churn, total) if churn > 0 else np.full(total, np.inf)
    return Population(
        comes=comes,
        # nobody goes while the swarm grows, so that it reaches its size
        goes=np.maximum(comes, GROWTH) + stays,
        crashes=dice.random(total) < CRASHES,
        length=length,
        speed=speeds * dice.uniform(0.85, 1.15, total),
        loading=length * dice.uniform(*LOADING, total),
        city=dice.choice(len(CITIES), total, p=weights / weights.sum()),
        access=ACCESS_SECONDS * np.exp(ACCESS_SPREAD * dice.standard_normal(total)),
        between=city_latencies(),
        churn=churn,
    )


def city_latencies() -> Floats:
    """Seconds from each city to each."""
    latitude, longitude = (np.radians([city[axis] for city in CITIES]) for axis in (0, 1))
    cosine = np.sin(latitude)[:, None] * np.sin(latitude) + np.cos(latitude)[:, None] * np.cos(
        latitude
    ) * np.cos(longitude[:, None] - longitude)
    kilometres = EARTH_KM * np.arccos(np.clip(cosine, -1, 1))
    np.fill_diagonal(kilometres, 0.0)
    seconds: Floats = kilometres * DETOUR / KM_PER_SECOND
    return seconds
