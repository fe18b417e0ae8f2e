"""How often a node tells the swarm about itself and asks about others, by how large the swarm is.

In a small swarm each node matters: it must be found, and missed, within seconds, and the traffic of
a few is little. In a large one nobody depends on one node, but what all write to the holders of a
record, and what one reading brings, grow with the number of nodes. So announcements become rarer,
until one a minute: whoever has died counts until its last has expired. Readings become rarer still, with
the cube of the swarm: each is as large as the swarm, all nodes make them, and whoever opens a session
reads when it has to.

Rule of this file: ``known`` is how many peers a whole reading has brought. Records are bounded, so
in a swarm of ten thousand that is about a third of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .announcement import MAX_ROUND_TRIPS, REGION_BLOCKS, Announcement

SHORTEST_ANNOUNCE = 20.0
LONGEST_ANNOUNCE = 60.0
SMALL_FOR_ANNOUNCE = 100
"""Peers up to which everybody announces as often as it can be."""
SHORTEST_REFRESH = SHORTEST_LOOK = 20.0
SMALL_FOR_REFRESH = 75
LONGEST_LOOK = 7200.0
LONGEST_REFRESH = 14_400.0
"""After which a node must know that its swarm has shrunk."""
ROUND_TRIPS_OF_ALL = 1600
FULL = 200
"""Peers known at one region from which on its records must be taken to be full. Each holds about 170 then,
and those that a reader asks show 500 of three thousand."""


@dataclass(frozen=True, slots=True)
class Upkeep:
    """Seconds, give or take a tenth, so that nodes do not march in step."""

    announce_interval: float
    time_to_live: float
    """Of an announcement: three intervals, so that two may be lost."""
    refresh_interval: float
    """Between two readings of all regions, if nobody needs one sooner."""
    look_interval: float
    """Between two looks at whether this node should move, each at something just read."""
    round_trips: int
    """How many to announce. In a small swarm nothing says better which way is short; in a large one they
    would be most of what all announce, and coordinates say nearly as much."""


def upkeep(known: int) -> Upkeep:
    """What is right where a reading has brought ``known`` peers."""
    announce = min(LONGEST_ANNOUNCE, SHORTEST_ANNOUNCE * max(1.0, known / SMALL_FOR_ANNOUNCE))
    grown = SHORTEST_REFRESH * max(1.0, known / SMALL_FOR_REFRESH) ** 3
    refresh = min(LONGEST_REFRESH, grown)
    return Upkeep(
        announce,
        3 * announce,
        refresh,
        min(LONGEST_LOOK, refresh),
        min(MAX_ROUND_TRIPS, ROUND_TRIPS_OF_ALL // max(1, known)),
    )


def sampled(announcements: Iterable[Announcement], num_blocks: int) -> bool:
    """Whether a reading of the regions shows too few of the swarm to compare them with each other.

    A full record hides how many more there are, so a region looks as strong as any other one. Then
    placement asks for what the holders have counted (``tally.py``).
    """
    known = [0] * (num_blocks // REGION_BLOCKS + 1)
    for announcement in announcements:
        span = announcement.span
        if span is not None and span.end <= num_blocks:
            for region in range(span.start // REGION_BLOCKS, (span.end - 1) // REGION_BLOCKS + 1):
                known[region] += 1
    return max(known) > FULL
