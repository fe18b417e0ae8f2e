from collections.abc import Collection
from dataclasses import replace

import pytest
from petals.protocol.announcement import Announcement
from petals.protocol.choice import MAX_ROUNDS, Choice
from petals.protocol.errors import NoRoute
from petals.protocol.routing import Route, plan_route
from petals.protocol.span import Span
from support.announcements import announce, dice, peer_id

MODEL = Span(0, 8)
FAST = announce(1, MODEL, decode_speed=400.0)
MIDDLE = announce(2, MODEL, decode_speed=200.0)
SLOW = announce(3, MODEL, decode_speed=100.0)


def plan(candidates: Collection[Announcement]) -> Route:
    return plan_route(candidates, MODEL, latency=lambda *_: 0.0, dice=dice())


def wanted(choice: Choice) -> list[str]:
    return [hop.peer_id for hop in choice.to_ask()]


def chosen(choice: Choice) -> list[str]:
    return [hop.peer_id for hop in choice.route.hops]


def answer(choice: Choice, *answers: Announcement) -> None:
    choice.heard(choice.to_ask(), answers)


def busy(peer: Announcement, blocks: int) -> Announcement:
    return replace(peer, session_blocks=blocks)


def test_an_idle_swarm_takes_one_question() -> None:
    choice = Choice([FAST, MIDDLE, SLOW], plan)
    assert wanted(choice) == [FAST.peer_id]
    answer(choice, FAST)
    assert wanted(choice) == []
    assert chosen(choice) == [FAST.peer_id]


def test_where_there_is_nobody_else_nobody_is_asked() -> None:
    choice = Choice([announce(1, Span(0, 4)), announce(2, Span(4, 8))], plan)
    assert wanted(choice) == []
    assert len(chosen(choice)) == 2


def test_who_turns_out_busy_is_left_to_others_who_are_asked_too() -> None:
    choice = Choice([FAST, MIDDLE, SLOW], plan)
    answer(choice, busy(FAST, 80))
    assert wanted(choice) == [MIDDLE.peer_id]
    answer(choice, MIDDLE)
    assert wanted(choice) == []
    assert chosen(choice) == [MIDDLE.peer_id]


def test_a_little_busier_is_no_reason_to_go_on_asking() -> None:
    choice = Choice([FAST, MIDDLE], plan)
    answer(choice, busy(FAST, 18))
    assert (wanted(choice), chosen(choice)) == ([], [FAST.peer_id])


def test_who_is_wanted_after_all_is_asked_again() -> None:
    choice = Choice([FAST, MIDDLE, SLOW], plan)
    answer(choice, busy(FAST, 32))
    answer(choice, busy(MIDDLE, 80))
    assert wanted(choice) == [FAST.peer_id]
    answer(choice, busy(FAST, 40))
    assert (wanted(choice), chosen(choice)) == ([], [FAST.peer_id])


def test_in_the_end_the_answers_decide() -> None:
    crowd = [announce(n, MODEL, decode_speed=100.0 + n) for n in range(1, MAX_ROUNDS + 3)]
    choice = Choice(crowd, plan)
    asked = []
    for number in range(MAX_ROUNDS):
        (peer,) = wanted(choice)
        asked.append(peer)
        loaded = next(known for known in crowd if known.peer_id == peer)
        answer(choice, busy(loaded, 100 if number == 3 else 200))
    assert wanted(choice) == []
    assert chosen(choice) == [asked[3]]  # two look idle still, and were not asked


def test_who_is_silent_is_left_out() -> None:
    choice = Choice([FAST, MIDDLE, SLOW], plan)
    answer(choice)
    assert wanted(choice) == [MIDDLE.peer_id]
    answer(choice, MIDDLE)
    assert chosen(choice) == [MIDDLE.peer_id]


def test_a_silent_peer_has_to_do_where_nobody_else_has_its_blocks() -> None:
    only = announce(4, Span(0, 2))
    front, back = announce(5, Span(2, 8), decode_speed=300.0), announce(6, Span(2, 8))
    choice = Choice([only, front, back], plan)
    assert wanted(choice) == [peer_id(4), peer_id(5)]
    answer(choice, busy(front, 80))
    assert (wanted(choice), chosen(choice)) == ([], [peer_id(4), peer_id(5)])


def test_a_choice_of_nothing_is_none() -> None:
    with pytest.raises(NoRoute):
        Choice([announce(1, Span(0, 4))], plan)
