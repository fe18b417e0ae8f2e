from petals.protocol.dice import pick
from support.announcements import dice


def test_a_pick_is_fair_and_in_range() -> None:
    rolls = dice()
    picks = [pick(4, rolls) for _ in range(4000)]
    assert set(picks) == {0, 1, 2, 3}
    assert all(900 < picks.count(number) < 1100 for number in range(4))
    assert pick(1, rolls) == 0
