"""Who serves which blocks, as a thing to try moves on.

Rules of this file: nodes are in the order of their peer ids, so that all who know the same nodes see
the same layout. A node has blocks that it *holds* and a *length*, how many it would hold elsewhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from .packing import add, units
from .span import Span, coverage


@dataclass(frozen=True, slots=True)
class Placed:
    """A node in its place, or on its way there."""

    peer_id: str
    span: Span
    speed: float
    """Tokens per second through one block; divided among the blocks of its span."""

    @property
    def share(self) -> int:
        """What it gives to each of its blocks, in ``units``."""
        return units(self.speed / len(self.span))


@dataclass(frozen=True, slots=True)
class Step:
    """A node and where it goes; a plan is a list of them."""

    number: int
    """Of the node in the layout."""
    target: Span


class Layout:
    """Nodes on the blocks of a model."""

    def __init__(
        self, nodes: Iterable[Placed], num_blocks: int, lengths: dict[str, int] | None = None
    ) -> None:
        """``lengths``: of those nodes, by peer id, that can hold more or fewer than they do."""
        self.num_blocks = num_blocks
        self.nodes = sorted(nodes, key=lambda node: node.peer_id)
        own = lengths or {}
        self.lengths = [
            min(own.get(node.peer_id, len(node.span)), num_blocks) for node in self.nodes
        ]
        self.counts = coverage([node.span for node in self.nodes], num_blocks)
        """Nodes on each block."""
        self.sums = throughput_units(self.nodes, num_blocks)
        """Throughput of each block, in ``units``."""

    @property
    def bottleneck(self) -> int:
        """The throughput of the weakest block."""
        return min(self.sums)

    def uncovered(self) -> list[int]:
        """The blocks that nobody serves."""
        return [block for block, count in enumerate(self.counts) if count == 0]

    def target(self, number: int, start: int) -> Span:
        """Where a node would be if it began at ``start``."""
        return Span(start, start + self.lengths[number])

    def uncovers(self, number: int, target: Span) -> bool:
        """Whether a node that moves to ``target`` leaves a block that nobody else serves."""
        span = self.nodes[number].span
        return any(self.counts[block] == 1 for block in _outside(span, target))

    def weakest_left(self, number: int, target: Span) -> float:
        """The least throughput of the blocks that a node leaves when it moves to ``target``."""
        node = self.nodes[number]
        left = (self.sums[block] for block in _outside(node.span, target))
        return min(left, default=float("inf")) - node.share

    def speed(self, number: int) -> int:
        """What all blocks of a node have of it together, in ``units``."""
        return units(self.nodes[number].speed)

    def take_out(self, number: int) -> None:
        """Let a node leave; where it was is remembered."""
        node = self.nodes[number]
        for block in range(node.span.start, node.span.end):
            self.counts[block] -= 1
            self.sums[block] -= node.share

    def put(self, number: int, target: Span) -> None:
        """Put a node that has been taken out somewhere else."""
        self.nodes[number] = node = Placed(
            self.nodes[number].peer_id, target, self.nodes[number].speed
        )
        for block in range(target.start, target.end):
            self.counts[block] += 1
        add(self.sums, target.start, len(target), node.share)

    def move(self, number: int, target: Span) -> None:
        """Let a node go to ``target``."""
        self.take_out(number)
        self.put(number, target)

    def copy(self) -> "Layout":
        """Another one to try something on."""
        other = object.__new__(Layout)
        other.num_blocks, other.lengths = self.num_blocks, self.lengths
        other.nodes, other.counts = self.nodes.copy(), self.counts.copy()
        other.sums = self.sums.copy()
        return other


def _outside(span: Span, target: Span) -> list[int]:
    return [block for block in range(span.start, span.end) if block not in target]


def throughput_units(nodes: Iterable[Placed], num_blocks: int) -> list[int]:
    """The throughput of each block, in ``units``."""
    changes = [0] * (num_blocks + 1)  # at each block, so that ten thousand nodes cost little
    for node in nodes:
        span = node.span
        share = units(node.speed / (span.end - span.start))
        changes[span.start] += share
        changes[span.end] -= share
    return list(accumulate(changes[:num_blocks]))
