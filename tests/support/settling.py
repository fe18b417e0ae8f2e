"""A swarm that settles: nodes ask, one after another in any order, whether they should move."""

from collections.abc import Sequence
from random import Random  # noqa: TID251 - tests throw dice with known seeds

from petals.protocol.layout import Placed
from petals.protocol.placement import should_move
from petals.protocol.span import coverage

MOVES_EACH = 8
"""More than that by each node, all in all, is no settling."""


def settle(nodes: Sequence[Placed], num_blocks: int, dice: Random) -> tuple[list[Placed], int]:
    """Where they are when nobody wants to move any more, and after how many moves.

    Fails if a move uncovers a block, or if they do not come to rest.
    """
    swarm = list(nodes)
    moves = 0
    resting = False
    while not resting:
        resting = True
        for number in dice.sample(range(len(swarm)), len(swarm)):
            own = swarm[number]
            others = dice.sample(others := swarm[:number] + swarm[number + 1 :], len(others))
            move = should_move(own, others, num_blocks, len(own.span))
            if move is None:
                continue
            assert move.span != own.span
            assert len(move.span) == len(own.span)
            before = coverage([node.span for node in swarm], num_blocks)
            assert move.urgent == (0 in before)
            swarm[number] = Placed(own.peer_id, move.span, own.speed)
            after = coverage([node.span for node in swarm], num_blocks)
            assert all(now for was, now in zip(before, after, strict=True) if was)
            moves += 1
            assert moves <= MOVES_EACH * len(swarm), "they go on and on"
            resting = False
    return swarm, moves
