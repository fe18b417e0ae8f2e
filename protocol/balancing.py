"""Moves that raise the throughput of a swarm's weakest block.

Theory: in a swarm of few nodes hardly a single move helps by itself; what helps is two or three
together, or another arrangement of all. So the nodes have an aim in common: what ``packing`` would
make of them, which follows from who is there and not from where they are. While the swarm is short
of it by more than ``PAYS``, the plan is the shortest sequence of moves that comes near to it, or, if
no few moves do, the way to that arrangement itself. Whoever is first in the plan moves; the rest of
the plan is then the shortest one from there. So each move brings the swarm nearer to its aim, and no
node ever goes back.

In a swarm of many nodes single moves are fine enough: from where most is to where least is, as long
as the block that is left keeps more than the one that is helped had. So the sums, compared from the
least upwards, only ever rise.

Rule of this file: no plan uncovers a block at any step.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, islice, permutations

from .layout import Layout, Placed, Step, throughput_units
from .packing import Piece, best_packing, weakest_start
from .span import Span

PAYS = 1.06
"""By how much the bottleneck must be short of what it could be before anybody moves. A move costs
minutes of loading, so more would be better; but the aim itself is up to 4 % below the best, and the
swarm shall have 0.9 of that. Speeds are measured once, so noise does not reach this far."""
NEAR = 0.95
"""How much of the aim a short plan must reach. Above ``1 / PAYS``, so that a small change after it
starts no new one."""
FEW_NODES = 24
"""Up to here moves are planned together."""
SEQUENCES = 1500
"""Of moves that are tried, shorter ones first: all up to three moves of twelve nodes, and up to two of
twenty-four."""
MANY_PAYS = 1.08
"""``PAYS`` where moves are planned singly: there the aim is an even spread, which nobody reaches."""
EXACT_PAYS = 1.04
"""``PAYS`` where the sums of thousands are known: there those who join have evened out nearly all."""
STEP_PAYS = 1.02
"""By how much the blocks left must stay ahead of what the blocks helped had."""


def has_nothing_to_give(own: Placed, others: Sequence[Placed], num_blocks: int) -> bool:
    """Whether it is plain at a glance that a node of a large swarm stays where it is."""
    if len(others) < FEW_NODES:
        return False
    return _stays(own, throughput_units(chain(others, [own]), num_blocks), MANY_PAYS)


def levelling_move(own: Placed, sums: Sequence[int], length: int) -> Span | None:
    """Where a node of a very large swarm helps more, if anywhere, by the sums of all blocks alone.

    ``sums`` count this node, too. Each decides for itself: of ten thousand, only a few look within the
    seconds that it takes until the others know.
    """
    if _left(own, sums) <= 0 or _stays(own, sums, EXACT_PAYS):
        return None
    start = weakest_start(sums, length)
    target = Span(start, start + length)
    return None if target == own.span else target


def _left(own: Placed, sums: Sequence[int]) -> int:
    """What the weakest of its blocks has without a node."""
    return min(sums[own.span.start : own.span.end]) - own.share


def _stays(own: Placed, sums: Sequence[int], pays: float) -> bool:
    least = min(sums)
    balanced = least * pays * len(sums) >= sum(sums)
    return least > 0 and (balanced or _left(own, sums) <= least * STEP_PAYS)


def balancing_step(layout: Layout) -> Step | None:
    """The next move, of whichever node; None if the swarm is as it should be. There are no gaps."""
    bound = sum(layout.sums) / layout.num_blocks
    if len(layout.nodes) > FEW_NODES:
        return _levelling_step(layout) if layout.bottleneck * MANY_PAYS < bound else None
    if layout.bottleneck * PAYS >= bound:
        return None
    return _planned_step(tuple(layout.nodes), tuple(layout.lengths), layout.num_blocks)


@lru_cache(maxsize=8)  # a node asks every few seconds, and twice before it moves
def _planned_step(
    nodes: tuple[Placed, ...], lengths: tuple[int, ...], num_blocks: int
) -> Step | None:
    pieces = [Piece(length, node.speed) for length, node in zip(lengths, nodes, strict=True)]
    aim = best_packing(tuple(sorted(pieces)), num_blocks)
    own_lengths = {node.peer_id: length for length, node in zip(lengths, nodes, strict=True)}
    layout = Layout(nodes, num_blocks, own_lengths)
    if layout.bottleneck * PAYS >= aim.bottleneck:
        return None
    return _short_plan(layout, aim.bottleneck * NEAR) or _towards(layout, pieces, aim.starts)


def _short_plan(layout: Layout, level: float) -> Step | None:
    """The first move of a shortest sequence that lifts all blocks to ``level``."""
    numbered = range(len(layout.nodes))
    sequences = chain.from_iterable(permutations(numbered, count + 1) for count in numbered)
    for numbers in islice(sequences, SEQUENCES):
        steps = _put_back(layout, numbers, level)
        if steps and _safe(layout, steps):
            return steps[0]
    return None


def _put_back(layout: Layout, numbers: Sequence[int], level: float) -> list[Step] | None:
    """Where nodes go if they are taken out and put where least is, if that reaches ``level``.

    To execute the first of these steps and to ask again for those behind it gives the same places.
    """
    trial = layout.copy()
    for number in numbers:
        trial.take_out(number)
    missing = sum(level - value for value in trial.sums if value < level)
    if missing > sum(map(layout.speed, numbers)):
        return None
    steps = []
    for number in numbers:
        target = trial.target(number, weakest_start(trial.sums, trial.lengths[number]))
        trial.put(number, target)
        steps.append(Step(number, target))
    return steps if trial.bottleneck >= level else None


def _safe(layout: Layout, steps: Iterable[Step]) -> bool:
    trial = layout.copy()
    for step in steps:
        if trial.uncovers(step.number, step.target):
            return False
        trial.move(step.number, step.target)
    return True


def _towards(layout: Layout, pieces: Sequence[Piece], starts: Sequence[int]) -> Step | None:
    """Of the moves that bring a node to its place in a packing, the one that costs least meanwhile.

    Equal nodes stand for each other, so nobody moves whose place an equal one could take.
    """
    wanted: dict[Piece, list[Span]] = {}
    for piece, start in zip(sorted(pieces), starts, strict=True):
        wanted.setdefault(piece, []).append(Span(start, start + piece.length))
    astray = []
    for number, piece in enumerate(pieces):
        if layout.nodes[number].span in wanted[piece]:
            wanted[piece].remove(layout.nodes[number].span)
        else:
            astray.append(number)
    best: tuple[int, Step] | None = None
    for number in astray:
        step = Step(number, wanted[pieces[number]].pop(0))
        if layout.uncovers(number, step.target):
            continue
        trial = layout.copy()
        trial.move(number, step.target)
        if best is None or trial.bottleneck > best[0]:
            best = trial.bottleneck, step
    return None if best is None else best[1]


def _levelling_step(layout: Layout) -> Step | None:
    """The move from where most is left to where least is."""
    targets: dict[int, int] = {}
    least: dict[Span, int] = {}
    best = layout.bottleneck * STEP_PAYS
    found: Step | None = None
    for number, node in enumerate(layout.nodes):
        if node.span not in least:
            least[node.span] = min(layout.sums[node.span.start : node.span.end])
        left = least[node.span] - node.share
        if left > best:
            length = layout.lengths[number]
            if length not in targets:
                targets[length] = weakest_start(layout.sums, length)
            best, found = left, Step(number, layout.target(number, targets[length]))
    return found
