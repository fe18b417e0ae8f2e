from petals.protocol.expected import EXPECT_SECONDS, MAX_EXPECTED, Expected


def test_those_who_ask_next_hear_of_those_who_asked_before() -> None:
    expected = Expected()
    assert expected.blocks(0.0) == 0
    expected.asked("ann", 4, 0.0)
    expected.asked("bob", 2, 1.0)
    assert expected.blocks(1.0) == 6


def test_who_does_not_come_is_forgotten() -> None:
    expected = Expected()
    expected.asked("ann", 4, 0.0)
    expected.asked("bob", 2, 1.0)
    assert expected.blocks(EXPECT_SECONDS) == 2
    assert expected.blocks(EXPECT_SECONDS + 1) == 0


def test_who_has_come_is_expected_once_less() -> None:
    expected = Expected()
    for blocks in (4, 3):
        expected.asked("ann", blocks, 0.0)
    expected.asked("bob", 2, 0.0)
    expected.came("ann")
    assert expected.blocks(0.0) == 5
    expected.came("eve")  # who has not asked
    assert expected.blocks(0.0) == 5


def test_strangers_make_it_no_longer_than_its_bound() -> None:
    expected = Expected()
    for number in range(MAX_EXPECTED + 10):
        expected.asked(str(number), 1, 0.0)
    assert expected.blocks(0.0) == MAX_EXPECTED
    assert repr(expected) == "<Expected: 1024 sessions at most>"
