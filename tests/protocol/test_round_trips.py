import pytest
from petals.protocol.announcement import MAX_ROUND_TRIP
from petals.protocol.round_trips import (
    FRESH,
    LIFETIME,
    MAX_KEPT,
    RETRY,
    RoundTrips,
    ends,
    successors,
)
from petals.protocol.span import Span
from support.announcements import announce, dice, peer_id

PEERS = [
    announce(1, Span(0, 4)),
    announce(2, Span(2, 6)),
    announce(3, Span(4, 8)),
    announce(4, Span(5, 8)),
    announce(5, Span(0, 8)),
    announce(6, None),
]


def known_to(*seconds: float, now: float = 0.0) -> RoundTrips:
    """Peers a, b, c, … at these distances."""
    trips = RoundTrips()
    for name, value in zip("abcdefgh", seconds, strict=False):
        trips.measured(name, value, now)
    return trips


def test_a_successor_takes_over_at_the_end_of_a_span_or_before_and_goes_beyond() -> None:
    assert successors(Span(0, 4), PEERS) == {peer_id(2), peer_id(3), peer_id(5)}
    assert successors(Span(4, 8), PEERS) == set()


def test_an_originator_uses_those_at_both_ends() -> None:
    assert ends(8, PEERS) == {peer_id(number) for number in (1, 3, 4, 5)}


def test_figures_are_smoothed_and_forgotten() -> None:
    trips = known_to(0.1)
    trips.measured("a", 0.2, 10.0)
    assert trips.known(10.0) == {"a": pytest.approx(0.15)}
    assert trips.known(10.0 + LIFETIME) == {}
    trips = known_to(0.1)
    trips.measured("a", 0.2, LIFETIME)
    assert trips.known(LIFETIME) == {"a": 0.2}
    assert repr(trips) == "<RoundTrips to 1 peers, 0 not measured>"


def test_an_endless_round_trip_can_be_announced() -> None:
    assert known_to(1e6).known(0.0) == {"a": MAX_ROUND_TRIP}


def test_the_nearest_few_are_announced() -> None:
    trips = RoundTrips()
    names = [str(number) for number in range(40)]
    for number, name in enumerate(names):
        trips.measured(name, 1.0 - number / 100, 0.0)
    nearest = trips.nearest({*names[:-1], "unknown"}, 5, 0.0)
    assert list(nearest) == names[-2:-7:-1]


def test_whoever_was_never_measured_is_wanted_and_whoever_failed_is_left_alone() -> None:
    trips = known_to(0.1)
    assert trips.wanting(["a", "b"], 1.0) == ["b"]
    trips.missed("b", 1.0)
    assert trips.wanting(["a", "b"], 1.0) == []
    assert trips.wanting(["a", "b"], 1.0 + max(FRESH, RETRY)) == ["a", "b"]
    trips.measured("b", 0.1, 2.0)
    assert "0 not measured" in repr(trips)


def test_half_of_a_turn_is_for_the_nearest_that_have_grown_old() -> None:
    trips = known_to(0.1, 0.2, 0.3)
    turn = trips.turn(["a", "b", "c", "x", "y", "z"], 4, FRESH, dice())
    assert len([peer for peer in turn if peer in "abc"]) == 2
    assert len([peer for peer in turn if peer in "xyz"]) == 2


def test_either_half_may_use_what_the_other_leaves() -> None:
    trips = known_to(0.1, 0.2, 0.3)
    assert sorted(trips.turn(["a", "b", "c", "x"], 4, FRESH, dice())) == ["a", "b", "c", "x"]
    assert len(RoundTrips().turn("stuvwxyz", 4, 0.0, dice())) == 4
    assert trips.turn(["a", "b", "c"], 4, 1.0, dice()) == []


def test_the_never_measured_come_before_the_far_and_old() -> None:
    trips = RoundTrips()
    far = [str(number) for number in range(30)]
    for number, name in enumerate(far):
        trips.measured(name, float(number), 0.0)
    turn = trips.turn([*far, "x", "y"], 4, FRESH, dice())
    assert {"x", "y"} < {*turn}


def test_who_is_drawn_depends_on_the_dice_alone() -> None:
    turns = {tuple(RoundTrips().turn("stuvwxyz", 2, 0.0, dice(seed))) for seed in range(20)}
    assert len(turns) > 5
    assert RoundTrips().turn("stuvwxyz", 2, 0.0, dice(3)) == RoundTrips().turn(
        "stuvwxyz", 2, 0.0, dice(3)
    )


def test_what_is_kept_has_a_bound() -> None:
    trips = RoundTrips()
    for number in range(MAX_KEPT + 5):
        trips.measured(str(number), 1.0 + number / 1000, 0.0)
        trips.missed(f"silent {number}", 0.0)
    assert len(trips.known(0.0)) == MAX_KEPT
    assert next(iter(trips.known(0.0))) == "0"
    assert f"{MAX_KEPT} not measured" in repr(trips)
