import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol.admission import (
    Admission,
    AdmissionLimits,
    Bursts,
    NotAdmitted,
    Pace,
    Ticket,
)
from petals.protocol.errors import ConfigError

MIB = 1024 * 1024
LIMITS = AdmissionLimits(max_sessions=6, peer_sessions=3, peer_cache_share=0.5, peer_backlog=1)
TOKENS = 100


def admission(limits: AdmissionLimits = LIMITS) -> Admission:
    return Admission(limits, own_peer_id="me", cache_tokens=TOKENS)


def open_sessions(node: Admission, peer_id: str, count: int, tokens: int = 1) -> list[Ticket]:
    return [node.admit(peer_id, cache_tokens=tokens) for _ in range(count)]


def test_a_peer_may_have_so_many_sessions() -> None:
    node = admission()
    first, *_ = open_sessions(node, "a", 3)
    with pytest.raises(NotAdmitted, match="you have 3 sessions here") as refused:
        node.admit("a", cache_tokens=1)
    assert refused.value.peer_id == "a"
    assert refused.value.retry_after > 0
    node.admit("b", cache_tokens=1)
    first.release()
    node.admit("a", cache_tokens=1)


def test_all_peers_together_may_have_so_many() -> None:
    node = admission()
    open_sessions(node, "a", 3)
    [last] = open_sessions(node, "b", 3)[2:]
    for peer_id in ("c", "me"):
        with pytest.raises(NotAdmitted, match="this node has 6 sessions already") as refused:
            node.admit(peer_id, cache_tokens=1)
        assert refused.value.peer_id is None
    last.release()
    node.admit("c", cache_tokens=1)


def test_a_peers_sessions_share_half_of_the_cache() -> None:
    node = admission()
    open_sessions(node, "a", 2, tokens=25)
    with pytest.raises(NotAdmitted, match=r"have 50 of the 50 tokens .* this one needs 1$"):
        node.admit("a", cache_tokens=1)
    node.admit("b", cache_tokens=50)


def test_the_first_session_of_a_peer_may_have_any_size() -> None:
    node = admission()
    [large] = open_sessions(node, "a", 1, tokens=100)
    with pytest.raises(NotAdmitted, match="have 100 of the 50 tokens"):
        node.admit("a", cache_tokens=1)
    large.release()
    open_sessions(node, "a", 1, tokens=51)


def test_our_own_sessions_count_but_have_no_limit_of_their_own() -> None:
    node = admission()
    tickets = open_sessions(node, "me", 5, tokens=90)
    tickets[0].took_in(100 * MIB)
    assert not tickets[0].backlogged
    open_sessions(node, "a", 1)
    with pytest.raises(NotAdmitted, match="6 sessions already"):
        node.admit("b", cache_tokens=1)


def test_what_waits_to_be_computed_is_counted_over_all_sessions_of_a_peer() -> None:
    node = admission()
    one, two = open_sessions(node, "a", 2)
    other = node.admit("b", cache_tokens=1)
    one.took_in(MIB - 1)
    assert not two.backlogged
    two.took_in(2 * MIB)  # however large, a frame is let in while there is room for a byte
    assert [ticket.backlogged for ticket in (one, two, other)] == [True, True, False]
    two.computed(2 * MIB)
    assert [ticket.backlogged for ticket in (one, two, other)] == [False, False, False]


def test_a_session_that_ends_takes_its_backlog_along() -> None:
    node = admission()
    one, two = open_sessions(node, "a", 2)
    one.took_in(2 * MIB)
    held_up = [two.backlogged]
    one.release()
    one.release()
    assert [*held_up, two.backlogged] == [True, False]
    two.release()
    assert repr(node) == "<Admission of 0 sessions of 0 peers>"
    open_sessions(node, "a", 3)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"max_sessions": 0}, "max_sessions: must be at least 1, got 0"),
        ({"peer_sessions": -1}, "peer_sessions: must be at least 1, got -1"),
        ({"peer_cache_share": 0}, "peer_cache_share: must be above 0 and at most 1, got 0"),
        ({"peer_cache_share": 1.1}, "peer_cache_share: must be above 0 and at most 1, got 1.1"),
        ({"peer_cache_share": math.nan}, "peer_cache_share: must be above 0 and at most 1"),
        ({"peer_opens": math.nan}, "peer_opens: must be at least 1, got nan"),
    ],
)
def test_limits_that_cannot_be(setting: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        AdmissionLimits(**setting)  # type: ignore[arg-type]


def test_a_pace_lets_some_go_at_once_and_the_rest_evenly() -> None:
    pace = Pace(per_second=10, at_once=3)
    assert [pace.take(100.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert [pytest.approx(pace.take(100.0)) for _ in range(3)] == [0.1, 0.2, 0.3]
    assert pace.take(100.7) == 0.0  # six have been taken: the seventh was due at 100.4
    assert [pace.take(200.0) for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(0.1)]


@given(pauses=st.lists(st.floats(0, 1), min_size=1, max_size=60), at_once=st.integers(1, 5))
def test_however_they_come_no_more_go_than_the_pace_allows(
    pauses: list[float], at_once: int
) -> None:
    pace, now, gone = Pace(per_second=10, at_once=at_once), 0.0, []
    for pause in pauses:
        now += pause
        gone.append(now + pace.take(now))
    gone.sort()
    for first in range(len(gone)):
        for last in range(first, len(gone)):
            allowed = at_once + 10 * (gone[last] - gone[first]) + 1e-6
            assert last - first + 1 <= allowed + 1


def test_bursts_go_at_once_and_then_nothing_until_they_are_paid_for() -> None:
    bursts = Bursts(per_second=10, at_once=5)
    assert [bursts.take(100.0, 2) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert [pytest.approx(bursts.take(100.0, 2)) for _ in range(3)] == [0.6, 0.6, 0.6]
    assert bursts.take(100.5, 2) == pytest.approx(0.7), "a third burst, behind the second"
    assert [bursts.take(200.0, 2) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bursts.take(200.0, 2) == pytest.approx(0.6)


@given(
    pauses=st.lists(st.floats(0, 1), min_size=1, max_size=60),
    at_once=st.integers(1, 5),
    most=st.integers(1, 3),
)
def test_however_they_come_no_more_go_than_bursts_allow(
    pauses: list[float], at_once: int, most: int
) -> None:
    bursts, now, gone = Bursts(per_second=10, at_once=at_once), 0.0, []
    for number, pause in enumerate(pauses):
        now += pause
        count = 1 + number % most
        gone.append((now + bursts.take(now, count), count))
    gone.sort()
    for first in range(len(gone)):
        for last in range(first, len(gone)):
            taken = sum(count for _, count in gone[first : last + 1])
            # one burst may have begun just before and one ends in the middle, each over by a part
            allowed = 2 * (at_once + most) + 10 * (gone[last][0] - gone[first][0]) + 1e-6
            assert taken <= allowed


def held(tickets: list[Ticket], admitted: dict[Ticket, tuple[str, int]], peer_id: str) -> list[int]:
    return [admitted[ticket][1] for ticket in tickets if admitted[ticket][0] == peer_id]


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["a", "b", "me"]), st.integers(1, 60), st.booleans()), max_size=60
    )
)
def test_no_order_of_coming_and_going_breaks_a_limit(moves: list[tuple[str, int, bool]]) -> None:
    """Against a twin that counts anew each time."""
    node = admission()
    open_now: list[Ticket] = []
    admitted: dict[Ticket, tuple[str, int]] = {}
    for peer_id, tokens, leaves in moves:
        if leaves and open_now:
            open_now.pop(tokens % len(open_now)).release()
            continue
        theirs = held(open_now, admitted, peer_id)
        fits = len(open_now) < 6 and (
            peer_id == "me" or not theirs or (len(theirs) < 3 and sum(theirs) + tokens <= 50)
        )
        try:
            ticket = node.admit(peer_id, cache_tokens=tokens)
        except NotAdmitted:
            assert not fits
        else:
            assert fits
            open_now.append(ticket)
            admitted[ticket] = (peer_id, tokens)
    for ticket in open_now:
        ticket.release()
    assert repr(node) == "<Admission of 0 sessions of 0 peers>"
