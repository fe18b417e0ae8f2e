from itertools import pairwise

import pytest
from petals.protocol.announcement import MAX_ROUND_TRIPS, MAX_TIME_TO_LIVE
from petals.protocol.span import Span
from petals.protocol.upkeep import (
    FULL,
    LONGEST_ANNOUNCE,
    LONGEST_LOOK,
    LONGEST_REFRESH,
    sampled,
    upkeep,
)
from support.announcements import announce

BLOCKS = 24


@pytest.mark.parametrize("known", [0, 1, 12, 75])
def test_in_a_small_swarm_everybody_is_up_to_date(known: int) -> None:
    told = upkeep(known)
    assert (told.announce_interval, told.time_to_live) == (20, 60)
    assert (told.refresh_interval, told.look_interval) == (20, 20)
    assert told.round_trips == MAX_ROUND_TRIPS


def test_in_a_large_one_nobody_asks_without_need() -> None:
    told = upkeep(1900)
    assert (told.announce_interval, told.time_to_live) == (LONGEST_ANNOUNCE, 3 * LONGEST_ANNOUNCE)
    assert told.refresh_interval == LONGEST_REFRESH
    assert told.look_interval == LONGEST_LOOK
    assert told.round_trips == 0


def test_in_between_it_grows_with_the_swarm() -> None:
    for fewer, more in pairwise(map(upkeep, range(0, 2000, 50))):
        assert fewer.announce_interval <= more.announce_interval
        assert fewer.refresh_interval <= more.refresh_interval
        assert fewer.look_interval <= more.look_interval <= more.refresh_interval
        assert more.time_to_live == 3 * more.announce_interval <= MAX_TIME_TO_LIVE
        assert fewer.round_trips >= more.round_trips


def test_a_region_that_shows_very_many_must_be_taken_to_be_full() -> None:
    few = [announce(1, Span(0, 12), num_blocks=BLOCKS)] * (FULL - 1)
    one = announce(2, Span(4, 16), num_blocks=BLOCKS)
    useless = [announce(3, None), announce(4, Span(16, 32), num_blocks=32)]
    assert not sampled([*few, one, *useless], BLOCKS)
    assert sampled([*few, one, one], BLOCKS)
    assert not sampled([], BLOCKS)
