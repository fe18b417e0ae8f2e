from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol.announcement import Announcement, PeerState
from petals.protocol.placement import (
    Move,
    Placed,
    block_throughput,
    choose_span,
    choose_span_by,
    should_level,
)
from petals.protocol.span import Span, coverage
from support.announcements import announce, dice

BLOCKS = 8


def join(
    announcements: list[Announcement], capacity: int, num_blocks: int = BLOCKS, seed: int = 1
) -> Span:
    return choose_span(announcements, num_blocks, capacity, dice(seed))


def test_a_node_that_can_hold_everything_does() -> None:
    assert join([announce(1, Span(0, 4))], 8) == Span(0, 8)
    assert join([], 20) == Span(0, 8)


def test_a_node_must_hold_something() -> None:
    with pytest.raises(ValueError, match="at least 1 block, not 0"):
        join([], 0)


def test_blocks_that_nobody_serves_come_first() -> None:
    swarm = [announce(1, Span(0, 3), decode_speed=1.0), announce(2, Span(5, 8), decode_speed=1.0)]
    assert join(swarm, 2) == Span(3, 5)
    assert join(swarm, 3) in (Span(2, 5), Span(3, 6))


def test_then_the_weakest_run() -> None:
    swarm = [announce(1, Span(0, 4), decode_speed=400.0), announce(2, Span(4, 8))]
    assert block_throughput(swarm, BLOCKS) == [100.0] * 4 + [25.0] * 4
    assert join(swarm, 4) == Span(4, 8)


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
    assert block_throughput(swarm, BLOCKS) == [25.0 if counts else 0.0] * 4 + [0.0] * 4


def test_a_span_beyond_the_model_does_no_harm() -> None:
    throughput = block_throughput([announce(1, Span(6, 12), num_blocks=12)], BLOCKS)
    assert throughput == pytest.approx([0.0] * 6 + [100 / 6] * 2)


def test_nodes_that_join_at_once_divide_an_empty_swarm_without_small_gaps() -> None:
    choices = {join([], 2, seed=seed) for seed in range(50)}
    assert choices == {Span(0, 2), Span(2, 4), Span(4, 6), Span(6, 8)}


@given(st.lists(st.integers(1, BLOCKS), min_size=1, max_size=9), st.integers(0, 99))
def test_joining_never_lowers_and_soon_raises_the_coverage(
    capacities: list[int], seed: int
) -> None:
    swarm: list[Announcement] = []
    covered = [0]
    for number, capacity in enumerate(capacities, start=1):
        span = join(swarm, capacity, seed=seed + number)
        assert len(span) == capacity
        swarm.append(announce(number, span, num_blocks=BLOCKS))
        counts = coverage([made.span for made in swarm if made.span], BLOCKS)
        covered.append(sum(count > 0 for count in counts))
        # nobody doubles a block while a run of uncovered ones would have taken the whole span
        if covered[-1] < BLOCKS:
            assert covered[-1] > covered[-2]
    assert all(before <= after for before, after in pairwise(covered))


@given(st.integers(1, BLOCKS), st.integers(0, 99))
def test_equal_nodes_cover_the_model_with_as_few_as_can(capacity: int, seed: int) -> None:
    swarm: list[Announcement] = []
    for number in range(1, -(-BLOCKS // capacity) + 1):
        span = join(swarm, capacity, seed=seed + number)
        swarm.append(announce(number, span, num_blocks=BLOCKS))
    assert 0 not in coverage([made.span for made in swarm if made.span], BLOCKS)


def test_a_node_that_loads_quickly_goes_where_blocks_are_weak_now() -> None:
    serving, loading = [10.0] * 8 + [7.0] * 2 + [9.0] * 10, [0.0] * 8 + [3.0] * 2 + [0.5] * 10
    assert choose_span_by(serving, loading, 2, dice()) == Span(8, 10)
    few = choose_span_by(serving, loading, 3, dice())
    assert few.start >= 10, "those who come later than itself make up for it"


def leveller(start: int, end: int, speed: float = 40.0) -> Placed:
    return Placed("a", Span(start, end), speed)


def test_in_a_very_large_swarm_a_node_moves_by_the_sums_of_all_blocks() -> None:
    throughput = [1000.0] * 6 + [900.0] * 2
    assert should_level(leveller(0, 2), throughput, 2) == Move(Span(6, 8), urgent=False)
    assert should_level(leveller(0, 2, 200.0), throughput, 2) is None, "too much would be missing"
    assert should_level(leveller(6, 8), throughput, 2) is None
    assert should_level(leveller(0, 2), [1000.0] * 6 + [970.0] * 2, 2) is None, "it does not pay"


def test_there_too_a_gap_is_urgent_and_no_move_makes_one() -> None:
    throughput = [20.0, 20.0, 500.0, 500.0, 0.0, 0.0]
    assert should_level(leveller(2, 4), throughput, 2) == Move(Span(4, 6), urgent=True)
    assert should_level(leveller(0, 2), throughput, 2) is None
    assert should_level(Placed("a", Span(0, 6), 60.0), [100.0] * 5 + [10.0], 9) is None


def test_where_it_is_already_is_no_move() -> None:
    assert should_level(Placed("a", Span(0, 4), 4.0), [90.0] + [100.0] * 7, 4) is None
