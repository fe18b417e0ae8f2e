"""How often a node tells the swarm about itself and asks about others, by how large the swarm is.

In a small swarm each node matters: it must be found, and missed, within seconds, and the traffic of
a few is little. In a large one nobody depends on one node, but what all write to the holders of a
record, and what one reading brings, grow with the number of nodes. So announcements become rarer,
until they live as long as one may. Readings become rarer still, with the cube of the swarm: each is
as large as the swarm, all nodes make them, and whoever opens a session reads when it has to.

Rule of this file: ``known`` is how many peers a whole reading has brought. Records are bounded, so
in a swarm of ten thousand that is about two thousand.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .announcement import MAX_TIME_TO_LIVE, REGION_BLOCKS, Announcement

SHORTEST_ANNOUNCE = 20.0
LONGEST_ANNOUNCE = 120.0
SMALL_FOR_ANNOUNCE = 100
"""Peers up to which everybody announces as often as it can be."""
SHORTEST_REFRESH = SHORTEST_LOOK = 20.0
SMALL_FOR_REFRESH = 75
LONGEST_LOOK = 7200.0
FULL = 330
"""Peers known at one region from which on its record must be taken to be full. All its holders together
show about 400 then, however many there are."""


@dataclass(frozen=True, slots=True)
class Upkeep:
    """Seconds, give or take a tenth, so that nodes do not march in step."""

    announce_interval: float
    time_to_live: float
    """Of an announcement: three intervals, so that two may be lost, or as long as one may live."""
    refresh_interval: float
    """Between two readings of all regions, if nobody needs one sooner."""
    look_interval: float
    """Between two looks at whether this node should move, each at something just read."""


def upkeep(known: int) -> Upkeep:
    """What is right where a reading has brought ``known`` peers."""
    announce = SHORTEST_ANNOUNCE * max(1.0, known / SMALL_FOR_ANNOUNCE)
    refresh = SHORTEST_REFRESH * max(1.0, known / SMALL_FOR_REFRESH) ** 3
    return Upkeep(
        min(LONGEST_ANNOUNCE, announce),
        min(MAX_TIME_TO_LIVE, 3 * announce),
        refresh,
        min(LONGEST_LOOK, refresh),
    )


def sampled(announcements: Iterable[Announcement], num_blocks: int) -> bool:
    """Whether a reading of the regions shows too few of the swarm to compare them with each other.

    A full record hides how many more there are, so a region looks as strong as any other one. Then
    placement has to look at the model's list by name, which is a fair sample of all its nodes.
    """
    known = [0] * (num_blocks // REGION_BLOCKS + 1)
    for announcement in announcements:
        span = announcement.span
        if span is not None and span.end <= num_blocks:
            for region in range(span.start // REGION_BLOCKS, (span.end - 1) // REGION_BLOCKS + 1):
                known[region] += 1
    return max(known) > FULL
