"""Nodes that move: to gaps at once, and for the weakest block's sake when it pays."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from petals.protocol.announcement import Announcement, PeerState
from petals.protocol.placement import Move, Placed, choose_span, placed, should_move
from petals.protocol.span import Span, coverage
from support.announcements import announce, dice, peer_id
from support.best_placement import exhaustive_bottleneck, programmed_bottleneck, throughput
from support.settling import settle

BLOCKS = 8


def node(number: int, start: int, end: int, speed: float = 100.0) -> Placed:
    return Placed(f"peer{number:02}", Span(start, end), speed)


def moves(swarm: Sequence[Placed], num_blocks: int = BLOCKS) -> dict[str, Move]:
    """Who would move, if all ask at the same moment."""
    found = {
        own.peer_id: should_move(
            own, [other for other in swarm if other is not own], num_blocks, len(own.span)
        )
        for own in swarm
    }
    return {peer: move for peer, move in found.items() if move is not None}


def joined(sizes: Sequence[tuple[int, float]], num_blocks: int, seed: int) -> list[Placed]:
    """Nodes of these lengths and speeds after they have joined one by one."""
    swarm: list[Announcement] = []
    for number, (length, speed) in enumerate(sizes, start=1):
        span = choose_span(swarm, num_blocks, length, dice(seed + number))
        swarm.append(announce(number, span, num_blocks=num_blocks, decode_speed=speed))
    return placed(swarm, num_blocks)


@st.composite
def swarms(draw: st.DrawFn, max_nodes: int = 9, max_blocks: int = 10) -> tuple[list[Placed], int]:
    """Nodes anywhere, and how many blocks the model has."""
    num_blocks = draw(st.integers(1, max_blocks))
    nodes = []
    for number in range(draw(st.integers(1, max_nodes))):
        length = draw(st.integers(1, num_blocks))
        start = draw(st.integers(0, num_blocks - length))
        speed = draw(st.sampled_from([10.0, 37.0, 100.0, 250.0, 1000.0]))
        nodes.append(node(number, start, start + length, speed))
    return nodes, num_blocks


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        (PeerState.JOINING, True),
        (PeerState.ONLINE, True),
        (PeerState.DRAINING, False),
        (PeerState.OFFLINE, False),
    ],
)
def test_who_is_coming_counts_and_who_is_going_does_not(state: PeerState, counts: bool) -> None:
    swarm = [announce(1, Span(0, 4), state=state, decode_speed=0.0), announce(2, None)]
    expected = [Placed(peer_id(1), Span(0, 4), 100.0)] if counts else []
    assert placed(swarm, BLOCKS) == expected


def test_blocks_beyond_the_model_do_not_count() -> None:
    swarm = [announce(1, Span(6, 10), num_blocks=12), announce(2, Span(9, 12), num_blocks=12)]
    assert placed(swarm, BLOCKS) == [Placed(peer_id(1), Span(6, 8), 50.0)]


def test_a_node_must_hold_something() -> None:
    with pytest.raises(ValueError, match="at least 1 block, not 0"):
        should_move(node(1, 0, 4), [], BLOCKS, 0)


def test_nobody_moves_in_a_balanced_swarm() -> None:
    assert moves([node(1, 0, 4), node(2, 4, 8), node(3, 0, 8)]) == {}


def test_one_that_is_not_needed_goes_to_the_gap() -> None:
    swarm = [node(1, 0, 4), node(2, 0, 4), node(3, 4, 6)]
    assert moves(swarm) == {"peer01": Move(Span(4, 8), urgent=True)}


def test_of_two_the_one_that_is_missed_less() -> None:
    swarm = [node(1, 0, 4, speed=900.0), node(2, 0, 4), node(3, 4, 6)]
    assert moves(swarm) == {"peer02": Move(Span(4, 8), urgent=True)}


def test_two_gaps_are_filled_at_once_and_by_different_nodes() -> None:
    swarm = [node(number, 2, 5) for number in range(3)]
    assert moves(swarm) == {
        "peer00": Move(Span(5, 8), urgent=True),
        "peer01": Move(Span(0, 3), urgent=True),
    }


def test_two_do_not_leave_a_block_to_each_other() -> None:
    swarm = [node(1, 3, 5), node(2, 3, 5), node(3, 5, 6)]
    assert moves(swarm) == {"peer01": Move(Span(0, 2), urgent=True)}


def test_nodes_in_between_slide_where_nobody_can_jump() -> None:
    swarm = [node(1, 1, 4), node(2, 4, 6), node(3, 5, 8)]
    assert moves(swarm) == {"peer02": Move(Span(3, 5), urgent=True)}
    swarm[1] = node(2, 3, 5)
    assert moves(swarm) == {"peer01": Move(Span(0, 3), urgent=True)}


def test_sliding_goes_the_other_way_too() -> None:
    swarm = [node(1, 0, 3), node(2, 2, 4), node(3, 4, 7)]
    assert moves(swarm) == {"peer02": Move(Span(3, 5), urgent=True)}


def test_nodes_that_are_too_few_stay() -> None:
    assert moves([node(1, 0, 3), node(2, 4, 7)]) == {}


def test_many_gaps_are_planned_a_few_at_a_time() -> None:
    swarm = [node(number, 0, 1) for number in range(40)]
    settled, count = settle(swarm, 40, dice())
    assert coverage([one.span for one in settled], 40) == [1] * 40
    assert count == 39


def test_a_node_that_can_hold_more_or_less_than_it_does() -> None:
    assert should_move(node(1, 2, 4), [], BLOCKS, 20) == Move(Span(0, 8), urgent=True)
    others = [node(2, 0, 6), node(3, 0, 6)]
    assert should_move(node(1, 2, 6), others, BLOCKS, 2) == Move(Span(6, 8), urgent=True)


def test_a_faster_block_gives_to_a_slower_one() -> None:
    swarm = [node(1, 0, 4), node(2, 0, 4), node(3, 0, 4), node(4, 4, 8)]
    assert moves(swarm) == {"peer01": Move(Span(4, 8), urgent=False)}


def test_a_gain_that_is_too_small_moves_nobody() -> None:
    swarm = [node(1, 0, 4, 103.0), node(2, 0, 4, 5.0), node(3, 4, 8, 100.0)]
    assert moves(swarm) == {}


def test_two_move_one_after_the_other_where_one_alone_would_not_help() -> None:
    swarm = [node(1, 0, 4, 300.0), node(2, 0, 4, 300.0), node(3, 4, 6), node(4, 4, 8)]
    settled, count = settle(swarm, BLOCKS, dice())
    assert min(throughput(settled, BLOCKS)) >= 0.9 * exhaustive_bottleneck(swarm, BLOCKS)
    assert count <= 2


def test_the_order_of_moves_is_one_that_uncovers_nothing() -> None:
    swarm = [node(0, 1, 5, 300.0), node(1, 10, 12), node(2, 2, 10, 300.0), node(3, 7, 9, 10.0)]
    swarm += [node(4, 3, 6, 300.0), node(5, 0, 1, 10.0)]
    assert moves(swarm, 12) == {"peer00": Move(Span(0, 4), urgent=False)}
    settle(swarm, 12, dice())


def test_another_arrangement_where_no_few_moves_help() -> None:
    """Two rows of nodes that lie across each other, as joining one by one can leave them."""
    sizes = [(4, 93.6), (4, 59.3), (6, 394.2), (5, 209.9), (3, 42.1), (8, 118.4)]
    sizes += [(7, 219.0), (3, 391.5), (6, 51.5), (5, 88.1), (4, 204.7), (8, 421.6)]
    swarm = joined(sizes, 24, seed=1)
    settled, count = settle(swarm, 24, dice())
    bound = sum(speed for _, speed in sizes) / 24
    assert min(throughput(swarm, 24)) < 0.75 * bound < 0.85 * bound < min(throughput(settled, 24))
    assert count <= 2 * len(swarm)


@given(swarms(), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_any_swarm_comes_to_rest_with_all_covered_that_can_be(
    swarm: tuple[list[Placed], int], seed: int
) -> None:
    nodes, num_blocks = swarm
    settled, _ = settle(nodes, num_blocks, dice(seed))
    counts = coverage([one.span for one in settled], num_blocks)
    assert sum(map(bool, counts)) == min(num_blocks, sum(len(one.span) for one in nodes))


@given(swarms(max_nodes=4, max_blocks=5), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_a_few_nodes_come_near_to_the_best_of_all_assignments(
    swarm: tuple[list[Placed], int], seed: int
) -> None:
    nodes, num_blocks = swarm
    settled, _ = settle(nodes, num_blocks, dice(seed))
    best = exhaustive_bottleneck(nodes, num_blocks)
    assert min(throughput(settled, num_blocks)) >= 0.9 * best - 1e-9


@pytest.mark.parametrize(("num_blocks", "seed"), [(8, 0), (8, 1), (8, 2), (24, 2)])
def test_twelve_unequal_nodes_reach_nine_tenths_of_the_best_and_survive_four_deaths(
    num_blocks: int, seed: int
) -> None:
    rolled = dice(seed)
    sizes = [
        (rolled.randint(num_blocks // 8, num_blocks // 2), rolled.uniform(50, 400))
        for _ in range(12)
    ]
    swarm = joined(sizes, num_blocks, seed)
    settled, _ = settle(swarm, num_blocks, rolled)
    assert min(throughput(settled, num_blocks)) >= 0.9 * programmed_bottleneck(swarm, num_blocks)

    alive = rolled.sample(settled, 8)
    assert sum(len(one.span) for one in alive) >= num_blocks
    settled, _ = settle(alive, num_blocks, rolled)
    assert min(throughput(settled, num_blocks)) >= 0.9 * programmed_bottleneck(alive, num_blocks)


def test_a_large_swarm_is_levelled_by_single_moves() -> None:
    rolled = dice(3)
    crowded = [
        node(number, start := rolled.randrange(8), start + 5, rolled.uniform(50, 400))
        for number in range(60)
    ]
    behind = [node(number, 13 + number % 3, 18 + number % 3) for number in range(60, 70)]
    settled, _ = settle(crowded + behind, 20, rolled)
    bound = sum(one.speed for one in settled) / 20
    assert min(throughput(settled, 20)) >= 0.8 * bound
