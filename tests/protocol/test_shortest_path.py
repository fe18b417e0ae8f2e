from functools import cache
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from petals.protocol import shortest_path as module
from petals.protocol.shortest_path import Costs, shortest_path


def costs(
    spans: list[tuple[int, int]],
    blocks: int,
    seconds: list[float],
    latency: list[list[float]],
    entry: list[float],
    leave: list[float],
) -> Costs:
    holders = [
        [peer for peer, (start, end) in enumerate(spans) if start <= block < end]
        for block in range(blocks)
    ]
    return Costs(
        holders, seconds, entry, dict(enumerate(leave)), lambda here, there: latency[here][there]
    )


def cheapest(world: Costs) -> float:
    """The dumb twin: every path that comes back to nobody."""
    last = len(world.holders) - 1

    @cache
    def onward(block: int, peer: int, left: frozenset[int]) -> float:
        here = world.seconds[peer]
        if block == last:
            return here + world.leave[peer]
        return here + min(
            (
                onward(block + 1, peer, left)
                if other == peer
                else world.between(peer, other) + onward(block + 1, other, left | {peer})
                for other in world.holders[block + 1]
                if other not in left
            ),
            default=float("inf"),
        )

    return min(world.entry[peer] + onward(0, peer, frozenset()) for peer in world.holders[0])


@st.composite
def worlds(draw: st.DrawFn, max_peers: int = 8, max_blocks: int = 7) -> Costs:
    blocks = draw(st.integers(1, max_blocks))
    peers = draw(st.integers(1, max_peers))
    spans = [(0, blocks)]  # every block has a holder
    for _ in range(peers - 1):
        start = draw(st.integers(0, blocks - 1))
        spans.append((start, draw(st.integers(start + 1, blocks))))
    # few values, far apart: many ties, and fast peers that interrupt slow ones
    times = st.sampled_from([0.0, 0.001, 0.01, 0.013, 0.1, 1.0])
    row = st.lists(times, min_size=peers, max_size=peers)
    return costs(
        spans,
        blocks,
        draw(row),
        draw(st.lists(row, min_size=peers, max_size=peers)),
        draw(row),
        draw(row),
    )


def peers_of(path: list[int]) -> list[int]:
    return [peer for peer, _ in groupby(path)]


@given(worlds())
@settings(max_examples=300)
def test_the_path_is_as_cheap_as_the_best_of_all(world: Costs) -> None:
    path = shortest_path(world)
    assert all(peer in held for peer, held in zip(path, world.holders, strict=True))
    assert len(peers_of(path)) == len(set(peers_of(path)))
    assert world.total(path) == pytest.approx(cheapest(world), abs=1e-9)


def interrupted(rounds: int) -> Costs:
    """A slow peer that holds everything, and fast ones that each hold one block in its middle."""
    blocks = 2 * rounds + 1
    spans = [(0, blocks)] + [(2 * n + 1, 2 * n + 2) for n in range(rounds)]
    free = [0.0] * (rounds + 1)
    return costs(spans, blocks, [1.0] + [0.1] * rounds, [free] * (rounds + 1), free, free)


def test_a_path_never_comes_back_to_a_peer() -> None:
    world = interrupted(3)
    # a fast peer would save time, but nobody could go on behind it
    assert shortest_path(world) == [0] * 7
    # with a second slow peer one interruption is worth it, and only one
    spans = [(0, 7), (1, 2), (3, 4), (5, 6), (0, 7)]
    free = [0.0] * 5
    two = costs(spans, 7, [1.0, 0.1, 0.1, 0.1, 1.0], [free] * 5, free, free)
    path = shortest_path(two)
    assert two.total(path) == pytest.approx(6.1)
    assert len(peers_of(path)) == 3


@pytest.mark.parametrize("steps", [0, 5])
def test_a_search_that_takes_too_long_is_cut_short(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(module, "MAX_STEPS", steps)
    assert shortest_path(interrupted(4)) == [0] * 9


def test_the_cut_short_path_keeps_what_is_not_a_detour() -> None:
    assert module._straightened([1, 1, 0, 2, 0, 3, 3]) == [1, 1, 0, 0, 0, 3, 3]
    assert module._straightened([0, 1, 0, 1]) == [0, 0, 0, 1]


def test_peers_left_out_of_consideration_can_leave_no_path_without_return() -> None:
    # peer 0 holds all blocks, but was not among the best for block 1
    free = [0.0, 0.0]
    world = Costs([[0], [1], [0]], [1.0, 0.1], free, dict(enumerate(free)), lambda here, there: 0.0)
    assert shortest_path(world) == [0, 0, 0]
