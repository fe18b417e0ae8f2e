"""How well a given set of nodes could share a model's blocks, if one could place them at will.

A *piece* is a node without a place: how many blocks it holds, and how fast it is. A node divides
its speed among its blocks, so a piece adds its *share* to each block under it; the *bottleneck* is
the least sum.

Theory: the exact answer is an integer programme, which takes minutes. A large neighbourhood search
takes milliseconds and comes within a few percent: place the pieces one after another where least is,
then over and over take a few of them out, put them back where least is, in another order, and keep
what is no worse. "No worse" compares the sums from the least upwards, so that a step that helps the
second weakest block is taken, too.

Rule of this file: what comes out depends on the set of pieces alone, so that all nodes that know the
same peers think alike. Therefore the dice are made here, and always fall the same way.
"""

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from .dice import pick

ROUNDS = 1500
"""Of taking out and putting back: some ten milliseconds for a dozen nodes, once for each set of them."""
TAKEN_OUT = (2, 3, 4)
"""How many pieces at a time, or fewer: one may be drawn twice."""


def units(throughput: float) -> int:
    """Tokens per second in millionths: whole numbers, so that sums are the same in any order."""
    return round(throughput * 1e6)


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """A node to be placed."""

    length: int
    """Blocks that it holds."""
    speed: float
    """Tokens per second through one block."""

    @property
    def share(self) -> int:
        """What it gives to each of its blocks."""
        return units(self.speed / self.length)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where pieces would go, and the bottleneck that this would give."""

    bottleneck: int
    starts: tuple[int, ...]
    """Of the pieces, in their order."""


class _LoadedDice:
    """A linear congruential sequence (Knuth's MMIX constants): the same on every node."""

    def __init__(self) -> None:
        self._state = 1

    def random(self) -> float:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
        return self._state / 2**64


def weakest_start(sums: Sequence[int], length: int) -> int:
    """Where a run of ``length`` blocks helps most: of those with the weakest block, the weakest."""
    least = min(sums)
    before = list(accumulate(sums, initial=0))
    last = len(sums) - length
    best, weakest = before[-1] + 1, 0
    tried = 0
    for block, value in enumerate(sums):
        if value == least:
            for start in range(max(tried, block - length + 1), min(block, last) + 1):
                run = before[start + length] - before[start]
                if run < best:
                    best, weakest = run, start
            tried = block + 1
    return weakest


def add(sums: MutableSequence[int], start: int, length: int, share: int) -> None:
    """Add ``share`` to a run of blocks."""
    for block in range(start, start + length):
        sums[block] += share


@lru_cache(maxsize=32)  # asked again every few seconds while nobody comes or goes
def best_packing(pieces: tuple[Piece, ...], num_blocks: int) -> Packing:
    """The best found for ``pieces``, which are sorted and no longer than the model."""
    assert list(pieces) == sorted(pieces)
    sums = [0] * num_blocks
    starts = [0] * len(pieces)
    for number in sorted(range(len(pieces)), key=lambda number: -pieces[number].share):
        _put(pieces[number], number, sums, starts)
    dice = _LoadedDice()
    order = sorted(sums)
    for _ in range(ROUNDS):
        count = TAKEN_OUT[pick(len(TAKEN_OUT), dice)]
        chosen = list(dict.fromkeys(pick(len(pieces), dice) for _ in range(count)))
        new_sums, new_starts = sums.copy(), starts.copy()
        for number in chosen:
            piece = pieces[number]
            add(new_sums, starts[number], piece.length, -piece.share)
        for number in chosen:
            _put(pieces[number], number, new_sums, new_starts)
        new_order = sorted(new_sums)
        if new_order >= order:
            sums, starts, order = new_sums, new_starts, new_order
    return Packing(order[0], tuple(starts))


def _put(piece: Piece, number: int, sums: list[int], starts: list[int]) -> None:
    starts[number] = weakest_start(sums, piece.length)
    add(sums, starts[number], piece.length, piece.share)
