"""Which blocks a joining node should serve.

The rule is the one of the Petals paper (arXiv 2312.08361): the contiguous run of blocks where the
swarm's throughput is least, weakest block first; so blocks that nobody serves come before all
others. A node divides its throughput among the blocks of its span, since a token needs all of
them.
"""

from collections.abc import Iterable, Sequence

from .announcement import Announcement, PeerState
from .dice import Dice, pick
from .routing import NOMINAL_SPEED
from .span import Span


def block_throughput(announcements: Iterable[Announcement], num_blocks: int) -> list[float]:
    """Tokens per second that the swarm can put through each block.

    Counts nodes that serve, and those that are loading: they have made their choice. A node that
    is leaving does not count.
    """
    throughput = [0.0] * num_blocks
    for announcement in announcements:
        span = announcement.span
        if span is None or announcement.state not in (PeerState.JOINING, PeerState.ONLINE):
            continue
        share = (announcement.decode_speed or NOMINAL_SPEED) / len(span)
        for block in range(span.start, min(span.end, num_blocks)):
            throughput[block] += share
    return throughput


def choose_span(
    announcements: Iterable[Announcement], num_blocks: int, capacity_blocks: int, dice: Dice
) -> Span:
    """The weakest run of as many blocks as a node can hold, of a model with ``num_blocks``.

    Where a long stretch is equally weak, the choice falls on one of the runs that divide it
    without leaving gaps too small for the next node; which one is drawn, so that nodes that join
    at the same moment seldom choose the same.
    """
    if capacity_blocks < 1:
        raise ValueError(f"a node must hold at least 1 block, not {capacity_blocks}")
    if capacity_blocks >= num_blocks:
        return Span(0, num_blocks)
    throughput = block_throughput(announcements, num_blocks)
    weakness = [
        sorted(throughput[start : start + capacity_blocks])
        for start in range(num_blocks - capacity_blocks + 1)
    ]
    weakest = min(weakness)
    tied = [start for start, run in enumerate(weakness) if run == weakest]
    choices = _dividing(tied, capacity_blocks)
    start = choices[pick(len(choices), dice)]
    return Span(start, start + capacity_blocks)


def _dividing(starts: Sequence[int], length: int) -> list[int]:
    """Of each stretch of consecutive starts, those a multiple of ``length`` from its first."""
    chosen: list[int] = []
    first = previous = -2
    for start in starts:
        if start != previous + 1:
            first = start
        if (start - first) % length == 0:
            chosen.append(start)
        previous = start
    return chosen
