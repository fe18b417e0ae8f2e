import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol import swarm as module
from petals.protocol.announcement import PeerState
from petals.protocol.errors import ModelMismatch
from petals.protocol.span import Span
from petals.protocol.swarm import Swarm, model_mismatch
from support.announcements import MODEL, NOW, announce, peer_id

OTHER_MODEL = "cd" * 32
SPAN = Span(0, 4)


@pytest.fixture
def swarm() -> Swarm:
    return Swarm(peer_id(99))


def ids(swarm: Swarm, now: float = NOW) -> list[str]:
    return [known.peer_id for known in swarm.candidates(now, MODEL)]


def test_the_newest_announcement_holds(swarm: Swarm) -> None:
    assert swarm.update(announce(1, SPAN, sequence=5), NOW)
    assert not swarm.update(announce(1, Span(4, 8), sequence=5), NOW)
    assert not swarm.update(announce(1, Span(4, 8), sequence=4), NOW)
    known = swarm.get(peer_id(1), NOW)
    assert known is not None
    assert known.span == SPAN
    assert swarm.update(announce(1, Span(4, 8), sequence=6), NOW)
    assert [known.span for known in swarm.peers(NOW)] == [Span(4, 8)]


@given(st.permutations([(1, SPAN), (2, Span(4, 8)), (3, Span(2, 6))]))
def test_the_order_of_arrival_does_not_matter(said: list[tuple[int, Span]]) -> None:
    swarm = Swarm(peer_id(99))
    for sequence, span in said:
        swarm.update(announce(1, span, sequence=sequence), NOW)
    assert [known.span for known in swarm.peers(NOW)] == [Span(2, 6)]


def test_an_announcement_holds_until_it_expires(swarm: Swarm) -> None:
    swarm.update(announce(1, SPAN), NOW)
    assert ids(swarm, NOW + 59.9) == [peer_id(1)]
    assert ids(swarm, NOW + 60) == []
    assert swarm.get(peer_id(1), NOW + 60) is None
    assert not swarm.update(announce(1, SPAN, sequence=9), NOW + 60)
    assert repr(swarm) == "<Swarm of 1 peers, 0 avoided, 0 banned>"
    swarm.expire(NOW + 60)
    assert repr(swarm) == "<Swarm of 0 peers, 0 avoided, 0 banned>"


def test_a_peer_that_left_is_not_revived_by_what_it_said_before(swarm: Swarm) -> None:
    swarm.update(announce(1, SPAN, sequence=2, state=PeerState.OFFLINE), NOW)
    assert not swarm.update(announce(1, SPAN, sequence=1), NOW)
    assert swarm.peers(NOW) == []


def test_this_node_is_not_its_own_peer(swarm: Swarm) -> None:
    assert not swarm.update(announce(99, SPAN), NOW)


def test_a_session_uses_peers_that_are_online_with_blocks_and_room(swarm: Swarm) -> None:
    swarm.update(announce(1, SPAN, cache_tokens_left=100), NOW)
    swarm.update(announce(2, SPAN, state=PeerState.JOINING), NOW)
    swarm.update(announce(3, SPAN, state=PeerState.DRAINING), NOW)
    swarm.update(announce(4, None), NOW)
    swarm.update(announce(5, SPAN, model=OTHER_MODEL), NOW)
    assert ids(swarm) == [peer_id(1)]
    assert [known.peer_id for known in swarm.candidates(NOW, MODEL, cache_tokens=100)] == ids(swarm)
    assert swarm.candidates(NOW, MODEL, cache_tokens=101) == []
    assert [known.peer_id for known in swarm.peers(NOW, OTHER_MODEL)] == [peer_id(5)]
    assert len(swarm.peers(NOW, MODEL)) == 4
    assert len(swarm.peers(NOW)) == 5


def test_coverage_counts_who_is_online(swarm: Swarm) -> None:
    swarm.update(announce(1, Span(0, 4)), NOW)
    swarm.update(announce(2, Span(3, 5)), NOW)
    swarm.update(announce(3, Span(5, 8), state=PeerState.JOINING), NOW)
    swarm.update(announce(4, None), NOW)
    assert swarm.coverage(NOW, MODEL, 8) == [1, 1, 1, 2, 1, 0, 0, 0]
    assert swarm.missing(NOW, MODEL, 8) == [Span(5, 8)]


def test_a_failing_peer_is_avoided_twice_as_long_each_time(swarm: Swarm) -> None:
    swarm.update(announce(1, SPAN, expires_at=NOW + 1e6), NOW)
    assert swarm.retry_at(peer_id(1)) == 0
    waits = [swarm.failed(peer_id(1), NOW) - NOW for _ in range(12)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert swarm.retry_at(peer_id(1)) == NOW + 300
    assert ids(swarm, NOW + 299.9) == []
    assert ids(swarm, NOW + 300) == [peer_id(1)]
    assert swarm.failures(peer_id(1)) == 12


def test_a_peer_that_comes_and_goes_sinks(swarm: Swarm) -> None:
    swarm.update(announce(1, SPAN), NOW)
    for _ in range(3):
        swarm.failed(peer_id(1), NOW)
    swarm.succeeded(peer_id(1))
    assert ids(swarm) == [peer_id(1)]
    assert swarm.failures(peer_id(1)) == 2
    assert swarm.failed(peer_id(1), NOW) == NOW + 4
    for _ in range(4):
        swarm.succeeded(peer_id(1))
    assert swarm.failures(peer_id(1)) == 0
    assert swarm.failed(peer_id(1), NOW) == NOW + 1


def test_a_peer_that_failed_is_tried_sooner_where_there_is_nobody_else(swarm: Swarm) -> None:
    swarm.update(announce(1, SPAN), NOW)
    for _ in range(5):
        swarm.failed(peer_id(1), NOW)

    def usable(after: float, *, urgent: bool) -> bool:
        found = swarm.candidates(NOW + after, MODEL, urgent=urgent)
        return bool(found) and swarm.usable(peer_id(1), NOW + after, urgent=urgent)

    assert not usable(module.URGENT_BACKOFF - 0.1, urgent=True)
    assert usable(module.URGENT_BACKOFF, urgent=True)
    assert not usable(15.9, urgent=False)
    assert usable(16.0, urgent=False)
    swarm.ban(peer_id(1))
    assert not usable(16.0, urgent=True)


def test_a_peer_without_room_is_asked_again_when_it_said(swarm: Swarm) -> None:
    swarm.update(announce(1, SPAN), NOW)
    swarm.refused(peer_id(1), NOW, 7.0)
    assert ids(swarm, NOW + 6.9) == []
    assert not swarm.usable(peer_id(1), NOW + 6.9, urgent=True)
    assert ids(swarm, NOW + 7.0) == [peer_id(1)]
    assert swarm.failures(peer_id(1)) == 0


def test_a_peer_left_in_peace_long_enough_starts_anew(swarm: Swarm) -> None:
    swarm.failed(peer_id(1), NOW)
    swarm.expire(NOW + 300)
    assert swarm.failed(peer_id(1), NOW + 300) == NOW + 302
    swarm.expire(NOW + 602)
    assert swarm.failed(peer_id(1), NOW + 602) == NOW + 603


def test_a_banned_peer_is_not_used(swarm: Swarm) -> None:
    swarm.update(announce(1, SPAN), NOW)
    swarm.ban(peer_id(1))
    assert swarm.banned == {peer_id(1)}
    assert ids(swarm) == []
    assert len(swarm.peers(NOW)) == 1


def test_what_peers_can_make_grow_is_bounded(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PEERS", 8)
    monkeypatch.setattr(module, "MAX_BANNED", 2)
    for number in range(1, 30):
        swarm.update(announce(number, SPAN, expires_at=NOW + number), NOW)
        swarm.failed(peer_id(number), NOW)
        swarm.ban(peer_id(number))
    known = {announcement.peer_id for announcement in swarm.peers(NOW)}
    assert known >= {peer_id(number) for number in range(23, 30)}  # who expires first goes first
    assert repr(swarm) == "<Swarm of 8 peers, 8 avoided, 2 banned>"
    assert swarm.banned == {peer_id(28), peer_id(29)}
    assert swarm.update(announce(30, SPAN, expires_at=NOW + 90), NOW + 28)


def test_failures_that_are_over_make_room_first(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PEERS", 2)
    swarm.failed(peer_id(1), NOW)
    swarm.failed(peer_id(2), NOW + 200)
    swarm.failed(peer_id(3), NOW + 301)
    assert [swarm.retry_at(peer_id(number)) for number in (1, 2, 3)] == [0, NOW + 201, NOW + 302]


def test_another_model_of_the_same_name_is_told_apart() -> None:
    ours, others = announce(1, SPAN), [announce(n, SPAN, model=OTHER_MODEL) for n in (2, 3)]
    gone = announce(4, SPAN, model="ef" * 32, state=PeerState.OFFLINE)
    namesake = announce(5, SPAN, model_name="other", model="ef" * 32)
    assert model_mismatch([], "demo", MODEL) is None
    assert model_mismatch([ours, *others], "demo", MODEL) is None
    assert model_mismatch([gone, namesake], "demo", MODEL) is None
    error = model_mismatch([*others, gone, namesake, ours], "demo", "ff" * 32)
    assert isinstance(error, ModelMismatch)
    assert str(error) == (
        "no peer serves demo with your weights and configuration (fingerprint ffffffffffffffff); "
        "what the swarm calls demo is cdcdcdcdcdcdcdcd (2 peers), abababababababab (1 peer). "
        "Load the checkpoint that they serve, or start nodes that serve yours"
    )
