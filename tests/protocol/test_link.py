import pytest
from petals.protocol.checks import MAX_PAST, Rewind
from petals.protocol.errors import RemoteProtocolError
from petals.protocol.frames import Resume
from petals.protocol.link import Due, LinkReceiver, LinkSender, Verdict
from petals.protocol.log import RewindHistory
from support.sessions import step

# --- the receiving end ----------------------------------------------------------------------------


def received(*rows: str) -> LinkReceiver:
    """A receiver that has taken steps of these rows in."""
    receiver = LinkReceiver()
    for sequence, letters in enumerate(rows):
        taken = receiver.take(step(letters, receiver.position, sequence=sequence))
        assert taken is Verdict.ACCEPT
    return receiver


def test_a_new_receiver_holds_nothing_and_needs_no_grant() -> None:
    receiver = LinkReceiver()
    assert receiver.take(step("ab")) is Verdict.ACCEPT
    assert receiver.position == 2


def test_the_first_link_is_granted_what_a_sender_may_assume() -> None:
    assert LinkReceiver().linked() == Resume(link=0, position=0, rewind=0)


def test_steps_in_order_are_taken() -> None:
    receiver = received("ab", "c", "def")
    assert (receiver.position, receiver.sequence) == (6, 3)


def test_a_duplicate_is_ignored() -> None:
    receiver = received("ab", "c")
    assert receiver.take(step("ab", 0, sequence=0)) is Verdict.IGNORE
    assert receiver.take(step("c", 2, sequence=1)) is Verdict.IGNORE
    assert receiver.position == 3


def test_a_step_too_many_ahead_is_a_gap() -> None:
    receiver = received("ab")
    assert receiver.take(step("d", 3, sequence=2)) is Verdict.GAP
    assert receiver.position == 2


def test_a_grant_makes_everything_under_way_stale() -> None:
    receiver = received("ab")
    assert receiver.grant() == Resume(link=1, position=2, rewind=0)
    assert receiver.take(step("c", 2, sequence=1)) is Verdict.IGNORE
    assert receiver.take(step("c", 2, link=1)) is Verdict.ACCEPT


def test_who_links_again_is_granted_anew() -> None:
    receiver = LinkReceiver()
    receiver.linked()
    receiver.take(step("ab"))
    assert receiver.linked() == Resume(link=1, position=2, rewind=0)
    assert receiver.linked() == Resume(link=2, position=2, rewind=0)


def test_the_first_step_of_a_rewind_cuts_what_is_held() -> None:
    receiver = received("abcd")
    assert receiver.take(step("x", 1, sequence=1, rewind=3)) is Verdict.ACCEPT
    assert (receiver.position, receiver.rewind) == (2, 3)
    assert receiver.grant() == Resume(link=1, position=2, rewind=3)


def test_a_rewind_may_start_where_the_receiver_is() -> None:
    receiver = received("ab")
    assert receiver.take(step("x", 2, sequence=1, rewind=1)) is Verdict.ACCEPT


@pytest.mark.parametrize(
    ("position", "rewind", "complaint"),
    [
        (3, 1, "a step of rewind 1 in order behind one of rewind 2"),
        (2, 2, "a step at position 2 where 3 comes next"),
        (4, 2, "a step at position 4 where 3 comes next"),
        (4, 3, "rewind 3 starts at 4, beyond 3"),
    ],
)
def test_a_sender_that_contradicts_itself_is_refused(
    position: int, rewind: int, complaint: str
) -> None:
    receiver = received("abcd")
    receiver.take(step("x", 2, sequence=1, rewind=2))
    with pytest.raises(RemoteProtocolError) as refusal:
        receiver.take(step("y", position, sequence=2, rewind=rewind))
    assert str(refusal.value) == complaint
    assert (receiver.position, receiver.sequence, receiver.rewind) == (3, 2, 2)


@pytest.mark.parametrize(
    ("past", "complaint"),
    [
        ((Rewind(2, 3),), "rewind 2 to 3, told of behind rewind 2 by a step at 2"),
        ((Rewind(4, 3), Rewind(4, 3)), "rewind 4 to 3, told of behind rewind 4 by a step at 2"),
        ((Rewind(3, 1), Rewind(4, 3)), "rewind 3 to 1, told of behind rewind 2 by a step at 2"),
        ((Rewind(3, 3),), "a step of rewind 4 that tells of rewinds up to 3"),
        ((Rewind(5, 3),), "a step of rewind 4 that tells of rewinds up to 5"),
    ],
)
def test_a_sender_that_tells_of_rewinds_that_cannot_be_is_refused(
    past: tuple[Rewind, ...], complaint: str
) -> None:
    receiver = received("abcd")
    receiver.take(step("x", 2, sequence=1, rewind=2))
    with pytest.raises(RemoteProtocolError) as refusal:
        receiver.take(step("y", 2, sequence=2, rewind=4, past=past))
    assert str(refusal.value) == complaint
    assert (receiver.position, receiver.sequence, receiver.rewind) == (3, 2, 2)


def test_a_step_that_begins_no_rewind_tells_of_none() -> None:
    receiver = received("ab")
    with pytest.raises(RemoteProtocolError, match="told of behind rewind 0"):
        receiver.take(step("c", 2, sequence=1, past=(Rewind(0, 2),)))


def test_a_receiver_shows_its_state() -> None:
    assert repr(received("ab")) == "LinkReceiver(link=0, sequence=1, position=2, rewind=0)"


# --- the sending end ------------------------------------------------------------------------------


def test_nothing_is_sent_before_the_receiver_has_said_where_to_start() -> None:
    sender = LinkSender(RewindHistory())
    assert sender.next(5, 10) is None
    assert sender.sent == 0
    before = sender.linked
    sender.resumed(Resume(link=2, position=3, rewind=0))
    assert (before, sender.linked) == (False, True)
    assert sender.next(5, 10) == Due(link=2, sequence=0, rewind=0, start=3, stop=5)


def test_a_fresh_receiver_needs_nothing_said() -> None:
    sender = LinkSender(RewindHistory())
    sender.assume_fresh()
    assert sender.next(5, 10) == Due(link=0, sequence=0, rewind=0, start=0, stop=5)


def test_a_long_log_goes_in_steps_of_at_most_max_rows_and_then_keeps_up() -> None:
    sender = LinkSender(RewindHistory())
    sender.assume_fresh()
    sent = [sender.next(5, 2) for _ in range(4)]
    assert [(due.sequence, due.start, due.stop) for due in sent if due] == [
        (0, 0, 2),
        (1, 2, 4),
        (2, 4, 5),
    ]
    assert sent[3] is None
    assert sender.sent == 5
    assert sender.next(6, 2) == Due(link=0, sequence=3, rewind=0, start=5, stop=6)


def test_a_new_grant_starts_again_from_its_position() -> None:
    sender = LinkSender(RewindHistory())
    sender.assume_fresh()
    sender.next(5, 10)
    sender.resumed(Resume(link=1, position=2, rewind=0))
    assert sender.next(5, 10) == Due(link=1, sequence=0, rewind=0, start=2, stop=5)


@pytest.mark.parametrize("link", [0, 1])
def test_a_grant_that_comes_late_changes_nothing(link: int) -> None:
    sender = LinkSender(RewindHistory())
    sender.resumed(Resume(link=1, position=2, rewind=0))
    sender.next(5, 10)
    sender.resumed(Resume(link=link, position=0, rewind=0))
    assert sender.next(5, 10) is None
    assert sender.next(6, 10) == Due(link=1, sequence=1, rewind=0, start=5, stop=6)


def test_a_receiver_beyond_our_log_is_waited_for_until_the_log_has_grown() -> None:
    """A hop that replaces another computes again what its successor holds already."""
    sender = LinkSender(RewindHistory())
    sender.resumed(Resume(link=1, position=4, rewind=0))
    assert sender.next(2, 10) is None
    assert sender.next(4, 10) is None
    assert sender.next(5, 10) == Due(link=1, sequence=0, rewind=0, start=4, stop=5)


def test_a_rewind_takes_the_cursor_back() -> None:
    history = RewindHistory()
    sender = LinkSender(history)
    sender.assume_fresh()
    sender.next(5, 10)
    history.record(1, 3)
    assert sender.next(3, 10) is None
    assert sender.next(4, 10) == Due(0, 1, 1, start=3, stop=4, past=(Rewind(1, 3),))


def test_a_rewind_beyond_the_cursor_leaves_it_alone() -> None:
    history = RewindHistory()
    sender = LinkSender(history)
    sender.assume_fresh()
    sender.next(9, 2)
    history.record(1, 5)
    assert sender.next(6, 10) == Due(0, 1, 1, start=2, stop=6, past=(Rewind(1, 5),))


def test_a_receiver_that_missed_a_rewind_gets_what_it_has_cut() -> None:
    history = RewindHistory()
    sender = LinkSender(history)
    history.record(1, 3)
    sender.resumed(Resume(link=1, position=5, rewind=0))
    assert sender.next(4, 10) == Due(1, 0, 1, start=3, stop=4, past=(Rewind(1, 3),))


def test_a_receiver_that_knows_a_later_rewind_waits_until_it_reaches_us() -> None:
    history = RewindHistory()
    sender = LinkSender(history)
    sender.resumed(Resume(link=1, position=4, rewind=1))
    assert sender.next(6, 10) is None
    history.record(1, 3)
    assert sender.next(6, 10) == Due(link=1, sequence=0, rewind=1, start=4, stop=6)


def test_every_receiver_is_told_of_the_orders_that_it_has_missed_and_of_no_other() -> None:
    history = RewindHistory()
    sender = LinkSender(history)
    sender.assume_fresh()
    sender.next(3, 10)
    history.record(1, 3, (0, 0))
    first = sender.next(4, 10)
    assert first == Due(0, 1, 1, start=3, stop=4, past=(Rewind(1, 3, (0, 0)),))
    history.record(2, 4, (1, 0))
    assert sender.next(4, 10) is None
    second = sender.next(5, 10)
    assert second == Due(0, 2, 2, start=4, stop=5, past=(Rewind(2, 4, (1, 0)),))
    sender.resumed(Resume(link=1, position=3, rewind=0))
    third = sender.next(5, 10)
    both = (Rewind(1, 3, (0, 0)), Rewind(2, 4, (1, 0)))
    assert third == Due(1, 0, 2, start=3, stop=5, past=both)


def test_a_receiver_that_has_missed_more_orders_than_are_known_gets_everything() -> None:
    history = RewindHistory()
    sender = LinkSender(history)
    for rewind in range(1, MAX_PAST + 2):
        history.record(rewind, 9, (1, 0))
    sender.resumed(Resume(link=1, position=9, rewind=0))
    due = sender.next(10, 100)
    assert due is not None and (due.start, len(due.past)) == (0, MAX_PAST)
    sender.resumed(Resume(link=2, position=9, rewind=1))
    due = sender.next(10, 100)
    assert due is not None and (due.start, len(due.past)) == (9, MAX_PAST)


def test_a_lost_link_sends_nothing_and_resumes_under_any_number() -> None:
    sender = LinkSender(RewindHistory())
    sender.resumed(Resume(link=4, position=0, rewind=0))
    sender.next(5, 10)
    sender.lost()
    assert not sender.linked
    assert sender.next(6, 10) is None
    sender.resumed(Resume(link=0, position=1, rewind=0))  # another receiver counts from 0
    assert sender.next(6, 10) == Due(link=0, sequence=0, rewind=0, start=1, stop=6)


def test_a_sender_shows_its_state() -> None:
    sender = LinkSender(RewindHistory())
    assert repr(sender) == "LinkSender(granted=None, cursor=None)"
    sender.assume_fresh()
    sender.next(5, 2)
    assert repr(sender) == ("LinkSender(granted=Resume(link=0, position=0, rewind=0), cursor=2)")
