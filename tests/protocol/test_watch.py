"""Deadlines from measured speed, and who is to blame when nothing comes back."""

import pytest
from petals.protocol.frames import State
from petals.protocol.watch import (
    FACTOR,
    LEAST,
    LEAST_PATIENCE,
    LONGEST_ANSWER,
    LONGEST_QUIET,
    STUCK_ROUNDS,
    Pace,
    Target,
    Watch,
)

ALL = Target(position=5, rewind=0)


def state(
    position: int = 5, produced: int = 5, *, rewind: int = 0, made_of: int = 0, passes: int = 0
) -> State:
    return State(0, position, rewind, produced, made_of, True, passes)


DONE = state()


def took(watch: Watch, rows: int, begin: float, seconds: float) -> None:
    watch.sent(rows, begin)
    watch.returned(begin + seconds, everything=True)


def asked(watch: Watch, states: dict[str, State], now: float, target: Target = ALL) -> list[str]:
    """A round in which all hops answer at once: who is given up."""
    nonce = watch.ask(tuple(states), now)
    given_up: list[str] = []
    for peer_id, said in states.items():
        answer = State(
            nonce,
            said.position,
            said.rewind,
            said.produced,
            said.produced_rewind,
            True,
            said.passes,
        )
        given_up += watch.answered(peer_id, answer, target, now)
    return given_up


def rounds(watch: Watch, states: dict[str, State], count: int = STUCK_ROUNDS) -> list[str]:
    return [peer for _ in range(count) for peer in asked(watch, states, 1.0)]


# --- what is expected ---------------------------------------------------------------------------


def test_steps_teach_what_a_step_takes() -> None:
    watch = Watch(0.0)
    took(watch, 1, 0.0, 8.0)
    assert watch.expected == 8.0
    took(watch, 1, 10.0, 16.0)
    assert watch.expected == 9.0  # an eighth of the way
    took(watch, 5, 30.0, 17.0)
    watch.sent(3, 50.0)
    assert watch.expected == 9.0 + 2 * 2.0
    watch.returned(100.0, everything=False)
    watch.returned(101.0, everything=True)
    watch.sent(3, 110.0)
    assert watch.expected == 9.0 + 2 * (2.0 + 21.0) / 2


def test_before_that_hops_are_taken_at_their_word() -> None:
    watch = Watch(0.0)
    watch.announced(Pace(1.0, 0.5) + Pace(2.0, 0.25))
    watch.sent(1, 0.0)
    assert watch.expected == 3.0
    watch.sent(4, 0.0)
    assert watch.expected == 3.0 + 4 * 0.75


def test_a_step_that_was_disturbed_teaches_nothing() -> None:
    watch = Watch(0.0)
    watch.sent(1, 0.0)
    watch.rerouted(7, 1.0)
    watch.returned(50.0, everything=True)
    watch.sent(1, 60.0)
    watch.sent(1, 61.0)
    watch.returned(99.0, everything=True)
    assert watch.expected == 0.0


def test_waiting_on_for_what_was_sent_before_teaches_nothing() -> None:
    watch = Watch(0.0)
    took(watch, 0, 0.0, 50.0)
    assert watch.expected == 0.0


def test_a_new_route_has_all_rows_before_it() -> None:
    watch = Watch(0.0)
    watch.announced(Pace(1.0, 0.5))
    watch.rerouted(9, 0.0)
    assert watch.expected == 1.0 + 8 * 0.5


# --- when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "quiet", "answer"),
    [
        (0.01, LEAST / 2, LEAST / 2),
        (1.0, FACTOR / 2, FACTOR / 2),
        (5.0, FACTOR * 5 / 2, LONGEST_ANSWER),
        (100.0, LONGEST_QUIET, LONGEST_ANSWER),
    ],
)
def test_a_silent_hop_is_found_within_three_times_what_a_step_takes(
    seconds: float, quiet: float, answer: float
) -> None:
    watch = Watch(0.0)
    took(watch, 1, 0.0, seconds)
    watch.sent(1, 200.0)
    assert watch.deadline() == 200.0 + quiet
    watch.ask(["a", "b"], 300.0)
    assert watch.deadline() == 300.0 + answer
    watch.answered("b", State(1, 5, 0, 5, 0, True), ALL, 300.5)
    assert watch.unanswered(301.0) == ["a"]
    assert watch.deadline() == 301.0 + quiet


def test_only_an_answer_to_this_question_by_who_was_asked_counts() -> None:
    watch = Watch(0.0)
    first = watch.ask(["a"], 1.0)
    assert watch.answered("b", State(first, 0, 0, 0, 0, True), ALL, 1.0) == []
    assert watch.unanswered(2.0) == ["a"]
    assert watch.answered("a", State(first, 0, 0, 0, 0, True), ALL, 2.0) == []
    watch.ask(["a"], 3.0)
    assert watch.answered("a", State(first, 0, 0, 0, 0, True), ALL, 3.0) == []
    assert watch.unanswered(4.0) == ["a"]


# --- who ----------------------------------------------------------------------------------------


def test_a_hop_that_has_taken_rows_and_computes_nothing_is_stuck() -> None:
    watch = Watch(0.0)
    assert rounds(watch, {"a": DONE, "b": state(5, 3), "c": state(3, 3)}) == ["b"]


def test_a_hop_whose_node_works_for_others_is_slow() -> None:
    watch = Watch(0.0)
    watch.sent(1, 0.0)
    for passes in range(20):
        assert asked(watch, {"a": DONE, "b": state(5, 3, passes=passes)}, 1.0 + passes) == []
    assert asked(watch, {"a": DONE, "b": state(5, 3, passes=99)}, LEAST_PATIENCE + 1) == ["b"]


def test_what_was_sent_and_did_not_arrive_is_laid_to_the_receiver() -> None:
    watch = Watch(0.0)
    assert rounds(watch, {"a": DONE, "b": state(3, 3), "c": state(3, 3)}) == ["b"]


def test_outputs_that_do_not_arrive_are_laid_to_the_last_hop() -> None:
    assert rounds(Watch(0.0), {"a": DONE, "b": DONE}) == ["b"]


def test_rows_of_an_abandoned_past_are_not_the_rows_that_are_wanted() -> None:
    watch, target = Watch(0.0), Target(5, rewind=2)
    now_here = state(5, 5, rewind=2, made_of=2)
    for _ in range(STUCK_ROUNDS - 1):
        assert (
            asked(watch, {"a": now_here, "b": state(5, 5, rewind=2, made_of=1)}, 1.0, target) == []
        )
    assert asked(watch, {"a": now_here, "b": state(5, 5, rewind=2, made_of=1)}, 1.0, target) == [
        "b"
    ]


def test_two_successors_of_one_hop_are_not_to_blame() -> None:
    watch = Watch(0.0)
    assert rounds(watch, {"a": DONE, "b": state(0, 0), "c": state(0, 0)}) == ["b"]
    assert rounds(watch, {"a": DONE, "d": state(0, 0), "c": state(0, 0)}) == ["a", "d"]


def test_rows_that_come_back_clear_a_hop_of_suspicion() -> None:
    watch = Watch(0.0)
    assert rounds(watch, {"a": DONE, "b": state(0, 0)}) == ["b"]
    watch.returned(2.0, everything=True)
    assert rounds(watch, {"a": DONE, "d": state(0, 0)}) == ["d"]


def test_the_first_hop_has_nobody_before_it() -> None:
    watch = Watch(0.0)
    assert rounds(watch, {"a": state(0, 0), "b": state(0, 0)}) == ["a"]
    assert rounds(watch, {"c": state(0, 0), "b": state(0, 0)}) == ["c"]
