"""The search behind ``routing.py``: which peer runs which block, at the least cost.

Peers and blocks are numbers here. A path names a peer for each block. It costs the latency into its
first peer, the seconds of each block, the latency between neighbours wherever the peer changes, and
the latency out of its last peer. No latency is negative.

Theory: from the last block to the first, the cheapest way to go on from each peer at each block is
a small table, and the best start in it gives a cheapest path. Such a path may come back to a peer
that it has left (a slow peer, interrupted by a fast one), but a session lives at a peer once. Only
then a second search goes over paths that remember whom they have left, best first, led by the table
(A*: what it says is never more than the truth). Of two ways to the same peer at the same block the
dearer one is dropped if it has left all that the cheaper one has left. If that search becomes long,
the peer of the first path runs what lies between, which is always possible and seldom much worse.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby, pairwise
from operator import itemgetter

MAX_STEPS = 1000
"""Of the second search: a few milliseconds. Swarms of eight peers take a tenth of it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a path is made of."""

    holders: Sequence[Sequence[int]]
    """For each block, the peers that may run it, at least one; a peer's blocks are consecutive
    (or would be, had the search been given all its holders)."""
    seconds: Sequence[float]
    """For each peer, the time for one block."""
    entry: Sequence[float]
    """For each peer, the latency into it from where the path begins."""
    leave: Mapping[int, float]
    """For each peer at the last block, the latency out of it to where the path ends."""
    between: Callable[[int, int], float]
    """The latency from one peer to another one."""

    def total(self, path: Sequence[int]) -> float:
        """The cost of ``path``."""
        hops = sum(self.between(here, there) for here, there in pairwise(path) if here != there)
        blocks = sum(self.seconds[peer] for peer in path)
        return self.entry[path[0]] + blocks + hops + self.leave[path[-1]]


_ToGo = list[dict[int, float]]
"""For each block and peer, the cost from the start of that block at that peer to the end."""


def shortest_path(costs: Costs) -> list[int]:
    """For each block, the peer that runs it on the cheapest path."""
    to_go, path = _ignoring_returns(costs)
    runs = [peer for peer, _ in groupby(path)]
    if len(runs) == len(set(runs)):
        return path
    return _without_returns(costs, to_go) or _straightened(path)


def _ignoring_returns(costs: Costs) -> tuple[_ToGo, list[int]]:
    to_go: _ToGo = [{} for _ in costs.holders]
    onward: list[dict[int, int]] = [{} for _ in costs.holders]
    to_go[-1] = {peer: costs.seconds[peer] + costs.leave[peer] for peer in costs.holders[-1]}
    between: dict[int, dict[int, float]] = {}  # a pair of neighbours meets at many blocks
    for block in range(len(to_go) - 2, -1, -1):
        following = to_go[block + 1]
        cheapest_first = sorted(following.items(), key=itemgetter(1))
        for peer in costs.holders[block]:
            best, best_next = following.get(peer, float("inf")), peer
            known = between.setdefault(peer, {})
            for other, further in cheapest_first:
                if further >= best:  # as it is at the latest when ``other`` is ``peer``
                    break
                latency = known.get(other)
                if latency is None:
                    latency = known[other] = costs.between(peer, other)
                cost = latency + further
                if cost < best:
                    best, best_next = cost, other
            to_go[block][peer] = costs.seconds[peer] + best
            onward[block][peer] = best_next
    path = [min(to_go[0], key=lambda peer: costs.entry[peer] + to_go[0][peer])]
    for choice in onward[:-1]:
        path.append(choice[path[-1]])
    return to_go, path


def _without_returns(costs: Costs, to_go: _ToGo) -> list[int] | None:
    """The cheapest path that comes back to nobody; None if that takes too long to find."""
    ahead = [0] * (len(to_go) + 1)  # who may still come, as bits: whoever may not is forgotten
    for block in range(len(to_go) - 1, -1, -1):
        ahead[block] = ahead[block + 1]
        for peer in to_go[block]:
            ahead[block] |= 1 << peer
    tie = count()  # of equals, the one that is further on
    # estimate of the whole, -block, tie, cost before this block, whom it has left, path so far
    waiting: list[tuple[float, int, int, float, int, tuple[int, ...]]] = []

    def push(cost: float, left: int, path: tuple[int, ...]) -> None:
        block = len(path) - 1
        estimate = cost + to_go[block][path[-1]]
        heapq.heappush(
            waiting, (round(estimate, 12), -block, next(tie), cost, left & ahead[block], path)
        )

    for peer in to_go[0]:
        push(costs.entry[peer], 0, (peer,))
    settled: dict[tuple[int, int], list[int]] = {}
    for _ in range(MAX_STEPS):
        if not waiting:
            break
        _, _, _, cost, left, path = heapq.heappop(waiting)
        peer, block = path[-1], len(path) - 1
        if block == len(to_go) - 1:
            return list(path)
        cheaper = settled.setdefault((block, peer), [])
        if any(other & left == other for other in cheaper):
            continue
        cheaper.append(left)
        cost += costs.seconds[peer]
        for other in to_go[block + 1]:
            if other == peer:
                push(cost, left, (*path, peer))
            elif not left >> other & 1:
                push(cost + costs.between(peer, other), left | 1 << peer, (*path, other))
    return None


def _straightened(path: list[int]) -> list[int]:
    """``path`` with each peer running all from its first block to its last."""
    straight = list(path)
    block = 0
    while block < len(straight):
        last = len(straight) - 1 - straight[::-1].index(straight[block])
        straight[block : last + 1] = [straight[block]] * (last + 1 - block)
        block = last + 1
    return straight
