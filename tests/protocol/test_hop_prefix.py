"""Hops that begin with rows of another session, and what they say of their own.

Boundaries are at 2, 4, 6, …: two letters.
"""

import pytest
from petals.protocol import prefix
from petals.protocol.checks import Peer
from petals.protocol.frames import Open, Output, Relink, Resume, Step
from petals.protocol.hop import (
    Compute,
    Computed,
    Hop,
    Linked,
    Reply,
    offered_keys,
    shares_prefixes,
)
from petals.protocol.prefix import HashedInputs, Label, offers, output_digest
from petals.protocol.span import Span
from petals.protocol.tensor import DType
from support.sessions import HIDDEN_SIZE, hidden, letters, opened, step

FIRST, SECOND = Span(0, 2), Span(2, 4)
ROUTE = [("a", FIRST), ("b", SECOND)]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "PREFIX_ROWS", 2)


def entries(text: str, hop: int) -> tuple[bytes, ...]:
    """What an originator of ``text`` works out for a hop of ROUTE."""
    inputs = HashedInputs(HIDDEN_SIZE, DType.FLOAT16)
    inputs.take(0, len(text), hidden(text).data if text else b"")
    return offers(inputs.digests, ROUTE, DType.FLOAT16)[hop]


def first(text: str = "", predecessor: str = "me") -> Open:
    return opened(
        span=FIRST,
        predecessor=predecessor,
        successor=Peer("b"),
        prefix=entries(text, 0),
        max_tokens=20,
    )


def second(text: str = "", predecessor: str = "a") -> Open:
    return opened(
        span=SECOND,
        predecessor=predecessor,
        successor=None,
        prefix=entries(text, 1),
        max_tokens=20,
    )


def keys(frame: Open) -> list[Label]:
    """The labels that rows of what ``frame`` offers have."""
    return list(zip(range(2, 100, 2), offered_keys(frame), strict=False))


def make(frame: Open, restored: str = "") -> Hop:
    rows = hidden(restored.upper()) if restored else None
    hop = Hop(frame, hidden_size=HIDDEN_SIZE, now=0.0, restored=rows)
    assert hop.receive(Linked(), 0.0) == [Reply(Resume(0, len(restored), 0))]
    return hop


def take(hop: Hop, taken: Step) -> list[Label]:
    """Take a step in and compute it; how its rows are labelled."""
    [effect] = hop.receive(taken, 0.0)
    assert isinstance(effect, Compute)
    upper = hidden(letters(taken.hidden).upper())
    hop.receive(Computed(taken, upper, effect.labels), 0.0)
    return list(effect.labels)


def sent(hop: Hop, position: int = 0) -> Step:
    """What a successor that holds ``position`` rows is sent."""
    hop.receive(Resume(0, position, 0), 0.0)
    outgoing = hop.next_outgoing(100)
    assert isinstance(outgoing, Step)
    return outgoing


# --- what is said of rows -------------------------------------------------------------------------


def test_a_first_hop_labels_what_it_computes_by_what_has_entered_it() -> None:
    hop = make(first())
    assert take(hop, step("abc")) == keys(first("abcd"))[:1]
    assert take(hop, step("d", 3, sequence=1)) == keys(first("abcd"))[1:]


def test_who_the_originator_is_makes_no_difference_to_a_first_hop() -> None:
    assert keys(first("abcd", "me")) == keys(first("abcd", "somebody"))


def test_each_hop_vouches_and_the_next_one_labels_as_the_originator_foresaw() -> None:
    one, two = make(first()), make(second())
    take(one, step("abcde"))
    going = sent(one)
    assert (
        going.vouched
        == tuple(output_digest(key, FIRST) for _, key in keys(first("abcd")))
        == entries("abcd", 1)
    )
    assert take(two, going) == keys(second("abcd"))


def test_a_batch_and_padded_rows_are_not_labelled() -> None:
    for frame in (
        opened(span=FIRST, batch=2, padding=(0, 0)),
        opened(span=FIRST, padding=(1,)),
    ):
        assert not shares_prefixes(frame)
        hop = Hop(frame, hidden_size=HIDDEN_SIZE, now=0.0)
        rows = step("abcd/abcd" if frame.batch == 2 else "abcd")
        assert hop.receive(rows, 0.0) == [Compute(rows)]


def test_rows_that_a_queued_step_will_rewind_are_sent_with_their_own_digests() -> None:
    """Else the successor would keep the old rows under the name of the new ones."""
    hop = make(first())
    take(hop, step("abcd"))
    rewinding = step("xyz", 1, sequence=1, rewind=1)
    [effect] = hop.receive(rewinding, 0.0)
    assert isinstance(effect, Compute)
    assert sent(hop).vouched == entries("abcd", 1)
    hop.receive(Computed(rewinding, hidden("XYZ"), effect.labels), 0.0)
    after = hop.next_outgoing(100)
    assert isinstance(after, Step)
    assert (after.position, after.vouched) == (1, ())  # the row before it is not here any more


def test_a_rewind_to_a_boundary_is_labelled_as_the_new_text() -> None:
    one, two = make(first()), make(second())
    take(one, step("abcdef"))
    assert take(two, sent(one)) == keys(second("abcdef"))
    labels = take(one, step("xyz", 2, sequence=1, rewind=1))
    assert labels == keys(first("abxy"))[1:]
    going = one.next_outgoing(100)
    assert isinstance(going, Step)
    assert take(two, going) == keys(second("abxy"))[1:]


# --- beginning with what is there -----------------------------------------------------------------


def test_a_hop_that_holds_the_prefix_begins_behind_it() -> None:
    hop = make(first("abcdef"), restored="abcd")
    assert (hop.position, hop.produced) == (4, 4)
    assert take(hop, step("efg", 4)) == keys(first("abcdef"))[2:]
    going = sent(hop)
    assert letters(going.hidden) == "ABCDEFG"
    assert going.vouched == entries("abcdef", 1)


def test_a_successor_that_holds_more_or_less_gets_what_it_lacks() -> None:
    one = make(first("abcdef"), restored="abcd")
    take(one, step("efg", 4))
    for link, (held, rest) in enumerate(
        [("abcdef", "G"), ("abcd", "EFG"), ("ab", "CDEFG"), ("", "ABCDEFG")]
    ):
        two = make(second("abcdef"), restored=held)
        one.receive(Resume(link, len(held), 0), 0.0)
        going = one.next_outgoing(100)
        assert isinstance(going, Step)
        assert letters(going.hidden) == rest
        moved = Step(0, 0, 0, going.position, 0, going.hidden, going.vouched)
        assert take(two, moved) == keys(second("abcdef"))[len(held) // 2 :]


def test_of_what_was_restored_only_wanted_rows_come_back() -> None:
    for want_from, rows in ((4, "E"), (1, "BCDE")):
        last = make(second("abcd"), restored="abcd")
        assert last.next_outgoing(100) is None
        take(last, step("e", 4, want_from=want_from))
        assert last.next_outgoing(100) == Output(0, want_from, hidden(rows))


# --- liars ----------------------------------------------------------------------------------------


def test_a_lying_originator_does_not_poison_a_first_hop() -> None:
    """It offers the digests of one text and sends another."""
    liar = make(first("abcdef"), restored="abcd")
    honest = keys(first("abcdef"))
    assert take(liar, step("XY", 4)) not in (honest, honest[2:])


def test_a_lying_originator_does_not_poison_the_hops_behind_an_honest_one() -> None:
    """The first hop runs one text; the second is offered another's digests, and has its rows."""
    one = make(first())
    take(one, step("uvwxyz"))
    two = make(second("abcdef"), restored="abcd")
    assert take(two, sent(one, 4)) == []


def test_a_false_digest_before_a_true_one_restores_nothing() -> None:
    """Else a rewind to it would go on from a digest of rows that are not there."""
    true = first("abcd")
    false = opened(
        span=FIRST,
        predecessor="me",
        successor=Peer("b"),
        prefix=(entries("xy", 0)[0], true.prefix[1]),
        max_tokens=20,
    )
    assert not set(offered_keys(false)) & set(offered_keys(true))


def test_a_lying_predecessor_is_believed_only_under_its_own_name() -> None:
    liar = make(second(predecessor="liar"))
    poisoned = take(liar, step("xyzxyz", vouched=entries("abcdef", 1)))
    assert poisoned
    assert not set(poisoned) & set(keys(second("abcdef")))


def test_an_originator_that_poses_as_a_predecessor_is_believed_only_under_its_own_name() -> None:
    posing = make(second(predecessor="me"))
    assert not set(take(posing, step("xy", vouched=entries("ab", 1)))) & set(keys(second("ab")))


def test_a_predecessor_opened_anew_with_another_text_is_not_believed() -> None:
    hop = make(second())
    take(hop, step("abcd", vouched=entries("abcd", 1)))
    assert hop.receive(Linked(), 0.0) == [Reply(Resume(1, 4, 0))]
    other = entries("uvwxyz", 1)
    assert take(hop, step("yz", 4, link=1, vouched=other[1:])) == []


def test_a_link_that_broke_at_a_boundary_is_believed_again() -> None:
    hop = make(second())
    take(hop, step("abcd", vouched=entries("abcd", 1)))
    hop.receive(Linked(), 0.0)
    labels = take(hop, step("ef", 4, link=1, vouched=entries("abcdef", 1)[1:]))
    assert labels == keys(second("abcdef"))[2:]


def test_rows_of_another_predecessor_are_not_labelled() -> None:
    hop = make(second())
    take(hop, step("abcd", vouched=entries("abcd", 1)))
    hop.receive(Relink(2, "other", None), 0.0)
    hop.receive(Linked(), 0.0)
    assert take(hop, step("ef", 4, link=2, vouched=entries("abcdef", 1)[1:])) == []


def test_a_first_hop_hashes_whatever_a_new_originator_link_brings() -> None:
    hop = make(first())
    take(hop, step("abc"))
    hop.receive(Relink(2, "other", Peer("b")), 0.0)
    hop.receive(Linked(), 0.0)
    assert take(hop, step("d", 3, link=2)) == keys(first("abcd"))[1:]
