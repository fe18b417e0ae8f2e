from itertools import pairwise

import pytest
from petals.protocol.announcement import MAX_TIME_TO_LIVE
from petals.protocol.upkeep import LONGEST_LOOK, upkeep


@pytest.mark.parametrize("known", [0, 1, 12, 75])
def test_in_a_small_swarm_everybody_is_up_to_date(known: int) -> None:
    told = upkeep(known)
    assert (told.announce_interval, told.time_to_live) == (20, 60)
    assert (told.refresh_interval, told.look_interval) == (20, 20)
    assert not told.sampled


def test_in_a_large_one_nobody_asks_without_need() -> None:
    told = upkeep(1500)
    assert (told.announce_interval, told.time_to_live) == (100, MAX_TIME_TO_LIVE)
    assert told.refresh_interval == 8000
    assert told.look_interval == LONGEST_LOOK
    assert told.sampled


def test_in_between_it_grows_with_the_swarm() -> None:
    for fewer, more in pairwise(map(upkeep, range(0, 2000, 50))):
        assert fewer.announce_interval <= more.announce_interval
        assert fewer.refresh_interval <= more.refresh_interval
        assert fewer.look_interval <= more.look_interval
        assert more.time_to_live == 3 * more.announce_interval
