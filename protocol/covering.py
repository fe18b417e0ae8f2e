"""Moves that bring nodes to blocks that nobody serves.

Theory: if there are more blocks to hold than blocks held once, some node is not needed where it is,
or two overlap. The first can go to a gap at once. The second can make room: the overlapping one
slides towards the gap by as much as it overlaps, which makes it overlap with the next node, and so
on, until the last one slides into the gap. No step uncovers anything, and each leaves less to do, so
this ends with every block covered whenever the nodes together are long enough.

Rule of this file: a plan follows from the layout alone, so that each of the nodes that see the same
gaps knows which of them goes where.
"""

from itertools import pairwise

from .layout import Layout, Step
from .span import Span

MAX_MOVES = 16
"""Planned ahead. The rest is planned when these have been made."""


def covering_plan(layout: Layout) -> list[Step]:
    """The moves that cover what can be covered, in order; the layout stays as it is."""
    ahead = layout.copy()
    steps: list[Step] = []
    while ahead.uncovered() and len(steps) < MAX_MOVES:
        step = _into_a_gap(ahead) or _slide(ahead)
        if step is None:
            break
        ahead.move(step.number, step.target)
        steps.append(step)
    return steps


def ready(layout: Layout, steps: list[Step]) -> list[Step]:
    """Of a plan, the moves that may be made at once and together.

    Each lessens a gap (or is the first one), and uncovers nothing even if those before it have left
    and not yet arrived.
    """
    now = layout.copy()
    gone: set[int] = set()
    chosen: list[Step] = []
    for step in steps:
        helps = any(
            layout.counts[block] == 0 for block in range(step.target.start, step.target.end)
        )
        may = step.number not in gone and not now.uncovers(step.number, step.target)
        if may and (helps or not chosen):
            chosen.append(step)
            now.take_out(step.number)
        gone.add(step.number)
    return chosen


def _into_a_gap(layout: Layout) -> Step | None:
    """The single move that covers most; of equals, by whoever is missed least where it is."""
    best: tuple[int, float] = (0, 0.0)
    found: Step | None = None
    missing = [0]  # how many uncovered blocks lie before each block
    for count in layout.counts:
        missing.append(missing[-1] + (count == 0))
    starts_by_length: dict[int, list[tuple[int, int]]] = {}
    for number, length in enumerate(layout.lengths):
        if length not in starts_by_length:
            starts_by_length[length] = _useful_starts(missing, length)
        for covered, start in starts_by_length[length]:
            if covered < best[0]:
                break
            target = layout.target(number, start)
            if layout.uncovers(number, target):
                continue
            rank = covered, layout.weakest_left(number, target)
            if rank > best or found is None:
                best, found = rank, Step(number, target)
            break  # what comes after it covers no more
    return found


def _useful_starts(missing: list[int], length: int) -> list[tuple[int, int]]:
    """How much is covered, and from where; the most first."""
    last = len(missing) - 1 - length
    runs = ((missing[start + length] - missing[start], start) for start in range(last + 1))
    return sorted((run for run in runs if run[0]), key=lambda run: (-run[0], run[1]))


def _slide(layout: Layout) -> Step | None:
    """The first step of the shortest chain of slides from an overlap to a gap.

    Only asked when no single move helps: then nobody's blocks are all held by others, too, so nodes
    that overlap are neighbours, and no block is held three times.
    """
    order = sorted(range(len(layout.nodes)), key=lambda number: layout.nodes[number].span)
    best: tuple[int, Step] | None = None
    for direction in (-1, 1):
        since_gap = 0
        edge = 0 if direction < 0 else layout.num_blocks
        walk = order if direction < 0 else order[::-1]
        room = 0
        for number, following in pairwise(walk):
            span, beyond = layout.nodes[number].span, layout.nodes[following].span
            gap = span.start - edge if direction < 0 else edge - span.end
            if gap > 0:
                since_gap, room = 0, gap
            since_gap += 1
            overlap = span.end - beyond.start if direction < 0 else beyond.end - span.start
            edge = span.end if direction < 0 else span.start
            if overlap > 0 and room > 0 and (best is None or since_gap < best[0]):
                shift = min(overlap, room) * direction
                best = since_gap, Step(number, Span(span.start + shift, span.end + shift))
    return None if best is None else best[1]
