"""What holders count of the announcements at a key, and what a reader makes of their words."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol import tally as module
from petals.protocol.announcement import REGION_BLOCKS, PeerState, model_key, region_keys
from petals.protocol.span import Span
from petals.protocol.tally import FRESH, Tallies, Totals, agreed
from support.announcements import MODEL, NOW, entry

BLOCKS = 12
FIRST, SECOND = region_keys(MODEL, Span(0, BLOCKS))
SILENCE: list[bytes] = []


def said(number: int, blocks: Span | None, **changes: object) -> bytes:
    return entry(number, blocks, num_blocks=BLOCKS, **changes)


def told(key: bytes, *entries: bytes) -> Tallies:
    tallies = Tallies()
    tallies.count(key, entries, NOW)
    return tallies


def sums(tallies: Tallies, key: bytes, now: float = NOW) -> bytes:
    found = tallies.sums(key, now)
    assert found is not None
    return found


def test_each_node_gives_its_speed_to_the_blocks_it_serves() -> None:
    both = [said(1, Span(2, 6)), said(2, Span(4, 12), decode_speed=80.0)]
    answers = [[sums(told(key, *both), key)] for key in (FIRST, SECOND)]
    totals = agreed(answers, BLOCKS)
    assert totals is not None
    assert list(totals.serving) == [0, 0, 25, 25, 35, 35, 10, 10, 10, 10, 10, 10]
    assert list(totals.loading) == [0] * BLOCKS
    assert totals.throughput == list(totals.serving)


def test_what_is_loaded_is_told_apart() -> None:
    joining = said(1, Span(0, 4), state=PeerState.JOINING)
    moving = said(2, Span(8, 12), moving_to=Span(0, 4))
    leaving = said(3, Span(0, 4), state=PeerState.DRAINING)
    totals = agreed([[sums(told(FIRST, joining, moving, leaving), FIRST)]], 8)
    assert totals == Totals((0,) * 8, (50, 50, 50, 50, 0, 0, 0, 0))
    assert totals.throughput == [50, 50, 50, 50, 0, 0, 0, 0]


def test_only_the_newest_word_of_a_node_counts() -> None:
    tallies = told(FIRST, said(1, Span(0, 4)), said(1, Span(4, 8), sequence=2), said(1, Span(0, 8)))
    assert agreed([[sums(tallies, FIRST)]], 8) == Totals((0,) * 4 + (25,) * 4, (0,) * 8)
    tallies.count(FIRST, [said(1, Span(8, 12), sequence=3)], NOW)
    assert agreed([[sums(tallies, FIRST, NOW + FRESH)]], 8) == Totals((0,) * 8, (0,) * 8)
    assert repr(tallies) == "<Tallies of 1 peers at 1 keys>"


def test_sums_hold_for_a_moment_and_the_expired_do_not_count() -> None:
    tallies = told(FIRST, said(1, Span(0, 8)), said(2, Span(0, 8), expires_at=NOW + 30))
    before = sums(tallies, FIRST)
    tallies.count(FIRST, [said(3, Span(0, 8))], NOW)
    assert sums(tallies, FIRST, NOW + FRESH / 2) == before
    assert msgpack.unpackb(sums(tallies, FIRST, NOW + 31))[0] == 25
    tallies.sweep(NOW + 31)
    assert repr(tallies) == "<Tallies of 2 peers at 1 keys>"
    tallies.sweep(NOW + 61)
    assert repr(tallies) == "<Tallies of 0 peers at 0 keys>"
    assert tallies.sums(FIRST, NOW + 61) is None


def test_what_belongs_elsewhere_is_not_counted() -> None:
    assert told(model_key("demo"), said(1, Span(0, 8))).sums(model_key("demo"), NOW) is None
    assert told(FIRST, b"junk").sums(FIRST, NOW) is None
    others = told(FIRST, said(1, Span(0, 8), model="cd" * 32), said(2, None))
    assert msgpack.unpackb(sums(others, FIRST)) == [0] * 16


def test_a_node_counts_so_many_peers_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COUNTED", 2)
    tallies = told(FIRST, *(said(number, Span(0, 8)) for number in (1, 2, 3)))
    assert msgpack.unpackb(sums(tallies, FIRST))[0] == 25
    tallies.count(FIRST, [said(1, Span(0, 4), sequence=2)], NOW)
    assert msgpack.unpackb(sums(tallies, FIRST, NOW + FRESH))[0] == 37.5
    late = said(4, Span(0, 8), expires_at=NOW + 200)
    tallies.count(SECOND, [late], NOW + 100)  # by then the others have expired
    assert repr(tallies) == "<Tallies of 1 peers at 1 keys>"


def answer(first: float) -> bytes:
    return bytes(msgpack.packb([first] + [0.0] * (2 * REGION_BLOCKS - 1)))


def test_a_minority_of_liars_is_not_believed() -> None:
    honest, liars = [answer(100.0)] * 4, [answer(1e15), answer(0.0), b"", b"\xc1", b"x" * 500]
    liars += [msgpack.packb([1.0]), answer(float("nan")), msgpack.packb({"a": 1}), answer(-1.0)]
    totals = agreed([[*liars, *honest]], 8)
    assert totals is not None
    assert totals.serving[0] == 100


def test_a_region_of_which_nobody_speaks_makes_all_unknown() -> None:
    assert agreed([[answer(1.0)], SILENCE], BLOCKS) is None
    assert agreed([[answer(1.0)], [b"junk"]], BLOCKS) is None


@given(st.lists(st.binary(max_size=200)))
def test_any_bytes_of_holders_are_read_or_ignored(answers: list[bytes]) -> None:
    agreed([answers], 8)
