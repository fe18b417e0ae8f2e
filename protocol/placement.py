"""Which blocks a node should serve: when it joins, and whether it should move later.

A joining node follows the rule of the Petals paper (arXiv 2312.08361): the contiguous run of blocks
where the swarm's throughput is least, weakest block first; so blocks that nobody serves come before
all others. A node divides its throughput among the blocks of its span, since a token needs all of
them.

A running node asks now and then whether it should move. All nodes make the same plan from the same
view, and a node moves when it is its turn in it: at once to blocks that nobody serves
(``covering``), else when the weakest block is weaker than it need be (``balancing``). Where views
differ, two may move for one reason; so a node waits a random while and asks again before it moves.

In a swarm of thousands nobody knows all the others, but the throughput of each block is known exactly
(``tally.py``). That is all that joining needs, and a node that would move then decides by it alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .announcement import Announcement, PeerState
from .balancing import balancing_step, has_nothing_to_give, levelling_move
from .covering import covering_plan, ready
from .dice import Dice, pick
from .layout import Layout, Placed, throughput_units
from .packing import units
from .routing import NOMINAL_SPEED
from .span import Span

__all__ = [
    "Move",
    "Placed",
    "block_throughput",
    "choose_span",
    "choose_span_by",
    "placed",
    "should_level",
    "should_move",
    "weakest_span",
]


QUICK_SHARE = 10
"""A node that holds less than such a part of a model has loaded it sooner than most."""
QUICK_WEIGHT = 0.7
"""What a quick node counts of what others are still loading. Those that have just gone are missed until
somebody has loaded what they served, for minutes; so the quick ones go where blocks are weak now."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where a node should go."""

    span: Span
    urgent: bool
    """Whether it covers blocks that nobody serves."""


def placed(announcements: Iterable[Announcement], num_blocks: int) -> list[Placed]:
    """Who counts, of a model with ``num_blocks``.

    Those that serve, and those that are loading: they have made their choice. A node counts where it
    moves to, and one that is leaving does not count.
    """
    nodes = []
    for announcement in announcements:
        span = announcement.moving_to or announcement.span
        if span is None or announcement.state not in (PeerState.JOINING, PeerState.ONLINE):
            continue
        speed = announcement.decode_speed or NOMINAL_SPEED
        if span.end > num_blocks:
            within = span.intersection(Span(0, num_blocks))
            if within is None:
                continue
            # what it gives to each block is what it was
            span, speed = within, speed * len(within) / len(span)
        nodes.append(Placed(announcement.peer_id, span, speed))
    return nodes


def should_move(
    own: Placed, others: Sequence[Placed], num_blocks: int, capacity_blocks: int
) -> Move | None:
    """Where this node should go now, if anywhere; others hold elsewhere as many blocks as here."""
    if capacity_blocks < 1:
        raise ValueError(f"a node must hold at least 1 block, not {capacity_blocks}")
    if has_nothing_to_give(own, others, num_blocks):
        return None
    layout = Layout([own, *others], num_blocks, {own.peer_id: capacity_blocks})
    urgent = bool(layout.uncovered())
    if urgent:
        steps = ready(layout, covering_plan(layout))
    else:
        step = balancing_step(layout)
        steps = [] if step is None else [step]
    for step in steps:
        if layout.nodes[step.number].peer_id == own.peer_id:
            return Move(step.target, urgent)
    return None


def should_level(own: Placed, throughput: Sequence[float], capacity_blocks: int) -> Move | None:
    """Where this node of a very large swarm should go, by the throughput of each block."""
    sums = [units(value) for value in throughput]
    target = levelling_move(own, sums, min(capacity_blocks, len(sums)))
    return None if target is None else Move(target, urgent=min(sums) == 0)


def block_throughput(announcements: Iterable[Announcement], num_blocks: int) -> list[float]:
    """Tokens per second that the swarm can put through each block."""
    sums = throughput_units(placed(announcements, num_blocks), num_blocks)
    return [value / units(1) for value in sums]


def choose_span(
    announcements: Iterable[Announcement], num_blocks: int, capacity_blocks: int, dice: Dice
) -> Span:
    """The weakest run of as many blocks as a node can hold, of a model with ``num_blocks``."""
    known = list(announcements)
    serving = block_throughput((peer for peer in known if peer.serves_all), num_blocks)
    loading = block_throughput((peer for peer in known if not peer.serves_all), num_blocks)
    return choose_span_by(serving, loading, capacity_blocks, dice)


def choose_span_by(
    serving: Sequence[float], loading: Sequence[float], capacity_blocks: int, dice: Dice
) -> Span:
    """The same by the throughput of each block: what there is, and what others are loading."""
    quick = capacity_blocks * QUICK_SHARE <= len(serving)
    weight = QUICK_WEIGHT if quick else 1.0
    throughput = [now + weight * soon for now, soon in zip(serving, loading, strict=True)]
    return weakest_span(throughput, capacity_blocks, dice)


def weakest_span(throughput: Sequence[float], capacity_blocks: int, dice: Dice) -> Span:
    """The run of as many blocks as a node can hold that is weakest, weakest block first.

    Where a long stretch is equally weak, the choice falls on one of the runs that divide it
    without leaving gaps too small for the next node; which one is drawn, so that nodes that join
    at the same moment seldom choose the same.
    """
    num_blocks = len(throughput)
    if capacity_blocks < 1:
        raise ValueError(f"a node must hold at least 1 block, not {capacity_blocks}")
    if capacity_blocks >= num_blocks:
        return Span(0, num_blocks)
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
