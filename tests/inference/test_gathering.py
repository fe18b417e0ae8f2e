"""Whom a round waits for: those who come back quickly, and not for long."""

from petals.inference.gathering import Gathering
from petals.protocol.span import Span

SPAN = Span(0, 4)
ROUND = 0.08


def used_to(delay: float, *, times: int = 3, span: Span = SPAN) -> Gathering:
    """A session ``a`` that has come back after ``delay`` seconds so often, and has left at 100."""
    gathering = Gathering()
    for number in range(times):
        gathering.left("a", span, float(number))
        gathering.came("a", number + delay)
    gathering.left("a", span, 100.0)
    return gathering


def test_who_comes_back_quickly_is_waited_for() -> None:
    gathering = used_to(0.01)
    assert 0.01 < gathering.wait([SPAN], ROUND, 100.0) < 0.03
    assert gathering.wait([SPAN], ROUND, 100.0 + 0.03) <= 0, "it is late: no longer"
    gathering.came("a", 100.005)
    assert gathering.wait([SPAN], ROUND, 100.005) == 0, "it is here"


def test_nobody_is_waited_for_longer_than_half_a_round() -> None:
    assert used_to(0.03).wait([SPAN], ROUND, 100.0) <= ROUND / 2 + 1e-9
    assert used_to(0.03).wait([SPAN], 10.0, 100.0) <= 0.05 + 1e-9
    assert used_to(0.041).wait([SPAN], ROUND, 100.0) == 0
    assert used_to(0.01).wait([SPAN], 0.0, 100.0) == 0, "nobody knows yet what a round costs"


def test_who_is_new_closed_or_slow_is_not_waited_for() -> None:
    assert used_to(0.01, times=0).wait([SPAN], ROUND, 100.0) == 0
    assert used_to(5.0).wait([SPAN], ROUND, 100.0) == 0
    gathering = used_to(0.01)
    gathering.forget("a")
    gathering.forget("nobody")
    assert gathering.wait([SPAN], ROUND, 100.0) == 0


def test_a_habit_follows_what_a_session_does() -> None:
    gathering = used_to(0.001)
    gathering.came("a", 101.0)
    gathering.left("a", SPAN, 102.0)
    assert gathering.wait([SPAN], ROUND, 102.0) == 0
    for number in range(30):
        gathering.came("a", 102.001 + number)
        gathering.left("a", SPAN, 103.0 + number)
    assert gathering.wait([SPAN], ROUND, 132.0) > 0


def test_only_sessions_of_the_same_blocks_count() -> None:
    gathering = used_to(0.01, span=Span(0, 2))
    assert gathering.wait([SPAN], ROUND, 100.0) == 0
    assert gathering.wait([SPAN, Span(0, 2)], ROUND, 100.0) > 0


def test_a_step_submitted_before_the_last_one_ended_says_nothing() -> None:
    gathering = Gathering()
    gathering.came("a", 1.0)
    gathering.left("a", SPAN, 2.0)
    gathering.came("a", 2.001)
    gathering.came("a", 9.0)
    gathering.left("a", SPAN, 10.0)
    assert gathering.wait([SPAN], ROUND, 10.0) > 0


def test_of_who_is_sampled_here_only_idle_seconds_count() -> None:
    """What the thread does meanwhile, a head or a round of others, brings it back or runs anyway."""
    gathering = Gathering()
    for number in range(3):
        gathering.left("a", SPAN, float(number), 0.001 * number)
        gathering.came("a", number + 0.5, 0.001 * (number + 1))
    gathering.left("a", SPAN, 100.0, 0.0)
    assert 0.001 < gathering.wait([SPAN], ROUND, 100.03, 0.0) < 0.006
    assert gathering.wait([SPAN], ROUND, 100.03, 0.006) <= 0, "it was idle for that long"
    assert gathering.wait([SPAN], ROUND, 100.03 + 2 * ROUND, 0.0) <= 0, "nor for ever"
