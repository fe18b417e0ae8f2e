"""How often a node tells the swarm about itself and asks about others, by how large the swarm is.

In a small swarm each node matters: it must be found, and missed, within seconds, and the traffic of
a few is little. In a large one nobody depends on one node, but what all write to the holders of a
record, and what one reading brings, grow with the number of nodes. So announcements become rarer,
up to the longest time that one may live, and readings rarer with the square of the swarm: the reading
grows, and so does the number of those who could do without it. Whoever opens a session reads when it
has to.

Rule of this file: ``known`` is how many peers a whole reading has brought. Records are bounded, so
in a swarm of ten thousand that is between one and two thousand.
"""

from dataclasses import dataclass

from .announcement import MAX_TIME_TO_LIVE

SHORTEST_ANNOUNCE = 20.0
SMALL_FOR_ANNOUNCE = 100
"""Peers up to which everybody announces as often as that."""
SHORTEST_REFRESH = 20.0
SMALL_FOR_REFRESH = 75
SHORTEST_LOOK = 20.0
LONGEST_LOOK = 3600.0
"""Between two looks at whether to move. Each brings a large swarm's sample, and a sample's noise may
name a node that had better stay: more looks are more moves, and not more balance."""
WHOLE = 400
"""Peers up to which regions' records hold everybody; beyond, they are full, and each shows as many
nodes as any other, however many there are. A model's list by name is a fair sample then."""


@dataclass(frozen=True, slots=True)
class Upkeep:
    """Seconds, give or take a tenth, so that nodes do not march in step."""

    announce_interval: float
    time_to_live: float
    """Of an announcement: three intervals, so that two may be lost."""
    refresh_interval: float
    """Between two readings of all regions, if nobody needs one sooner."""
    look_interval: float
    """Between two looks at whether this node should move."""
    sampled: bool
    """Whether placement must look at the model's list by name, instead of at the regions."""


def upkeep(known: int) -> Upkeep:
    """What is right where a reading has brought ``known`` peers."""
    announce = min(MAX_TIME_TO_LIVE / 3, SHORTEST_ANNOUNCE * max(1.0, known / SMALL_FOR_ANNOUNCE))
    refresh = SHORTEST_REFRESH * max(1.0, known / SMALL_FOR_REFRESH) ** 2
    sampled = known > WHOLE
    look = LONGEST_LOOK if sampled else min(LONGEST_LOOK, max(SHORTEST_LOOK, refresh))
    return Upkeep(announce, 3 * announce, refresh, look, sampled)
