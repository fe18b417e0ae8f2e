from typing import Any

import pytest
from petals.protocol.checks import Peer, Rewind
from petals.protocol.errors import ErrorCode, RemoteProtocolError
from petals.protocol.frames import Open, Output, Probe, Relink, Resume, State, Step
from petals.protocol.hop import (
    IDLE_TIMEOUT,
    Compute,
    Computed,
    DialSuccessor,
    Hop,
    Linked,
    Refusal,
    Reply,
    SuccessorLost,
    Welcome,
    check_open,
)
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor
from support.sessions import HIDDEN_SIZE, hidden, letters, opened, output, step


def make(frame: Open | None = None) -> Hop:
    return Hop(frame or opened(), hidden_size=HIDDEN_SIZE, now=0.0)


def last_hop(**terms: Any) -> Hop:
    return make(opened(successor=None, **terms))


def computed(step: Step) -> Computed:
    """What this span makes of a step: capital letters."""
    return Computed(step, hidden(letters(step.hidden).upper()))


def run(hop: Hop, *steps: Step) -> None:
    """Let the hop take steps in and compute them."""
    for taken in steps:
        assert hop.receive(taken, 0.0) == [Compute(taken)]
        assert hop.receive(computed(taken), 0.0) == []


def granted(hop: Hop, position: int = 0, link: int = 0, rewind: int = 0) -> None:
    assert hop.receive(Resume(link, position, rewind), 0.0) == []


# --- in -------------------------------------------------------------------------------------------


def test_a_step_behind_open_is_computed_without_waiting_for_a_link() -> None:
    hop = make()
    first = step("abc")
    assert hop.receive(first, 0.0) == [Compute(first)]
    assert (hop.position, hop.produced) == (3, 0)
    hop.receive(computed(first), 0.0)
    assert (hop.position, hop.produced) == (3, 3)


def test_who_links_hears_what_the_hop_holds() -> None:
    hop = make()
    assert hop.receive(Linked(), 0.0) == [Reply(Resume(0, 0, 0))]
    run(hop, step("abc"))
    assert hop.receive(Linked(), 0.0) == [Reply(Resume(1, 3, 0))]


def test_what_is_taken_in_counts_for_a_new_link_before_it_is_computed() -> None:
    hop = make()
    hop.receive(Linked(), 0.0)
    hop.receive(step("abc"), 0.0)
    assert hop.receive(Linked(), 0.0) == [Reply(Resume(1, 3, 0))]


def test_a_duplicate_is_ignored() -> None:
    hop = make()
    run(hop, step("abc"))
    assert hop.receive(step("abc"), 0.0) == []


def test_a_gap_is_answered_with_a_new_grant() -> None:
    hop = make()
    run(hop, step("abc"))
    assert hop.receive(step("e", 4, sequence=2), 0.0) == [Reply(Resume(1, 3, 0))]
    assert hop.receive(step("f", 5, sequence=3), 0.0) == []  # of the old link number
    run(hop, step("de", 3, link=1))


def test_a_sender_that_contradicts_itself_is_refused() -> None:
    hop = make()
    run(hop, step("abc"))
    with pytest.raises(RemoteProtocolError, match="position 4 where 3 comes next"):
        hop.receive(step("e", 4, sequence=1), 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        hidden("ab/AB"),
        WireTensor(DType.FLOAT16, (1, 2, 3), bytes(12)),
        WireTensor(DType.BFLOAT16, (1, 2, 2), bytes(8)),
        WireTensor(DType.FLOAT16, (4,), bytes(8)),
        WireTensor(DType.FLOAT16, (1, 2, 2, 1), bytes(8)),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tensor.shape}",
)
def test_hidden_states_of_another_shape_or_type_are_refused(wrong: WireTensor) -> None:
    hop = make()
    with pytest.raises(RemoteProtocolError) as refusal:
        hop.receive(Step(0, 0, 0, 0, 0, wrong), 0.0)
    assert str(refusal.value) == (
        f"hidden states must be float16 [1, rows, 2], got {wrong.dtype} {list(wrong.shape)}"
    )
    assert hop.position == 0


def test_rows_beyond_what_the_session_may_grow_to_are_refused() -> None:
    hop = make(opened(max_tokens=4))
    run(hop, step("abc"), step("d", 3, sequence=1))
    with pytest.raises(RemoteProtocolError, match="up to position 5 in a session of 4 tokens"):
        hop.receive(step("e", 4, sequence=2), 0.0)


# --- onward ---------------------------------------------------------------------------------------


def test_nothing_goes_to_a_successor_that_has_not_said_where_to_start() -> None:
    hop = make()
    run(hop, step("abc"))
    assert hop.next_outgoing(10) is None
    before = hop.successor_linked
    granted(hop)
    assert (before, hop.successor_linked) == (False, True)
    assert hop.next_outgoing(10) == step("ABC")


def test_outputs_go_on_in_steps_of_at_most_max_rows() -> None:
    hop = make()
    granted(hop, position=1)
    run(hop, step("abcd", want_from=3))
    assert hop.next_outgoing(2) == step("BC", 1, want_from=3)
    assert hop.next_outgoing(2) == step("D", 3, sequence=1, want_from=3)
    assert hop.next_outgoing(2) is None


def test_a_link_that_broke_goes_on_from_what_the_successor_holds() -> None:
    hop = make()
    granted(hop)
    run(hop, step("abcd"))
    hop.next_outgoing(10)
    assert hop.receive(SuccessorLost(), 0.0) == []
    assert not hop.successor_linked
    assert hop.next_outgoing(10) is None
    granted(hop, link=1, position=2)
    assert hop.next_outgoing(10) == step("CD", 2, link=1)


def test_a_rewind_takes_effect_when_its_first_step_is_computed() -> None:
    hop = make()
    granted(hop)
    run(hop, step("abcd"))
    assert hop.next_outgoing(10) == step("ABCD")
    back = step("xy", 2, sequence=1, rewind=1, want_from=3)
    assert hop.receive(back, 0.0) == [Compute(back)]
    assert (hop.position, hop.produced) == (4, 4)
    assert hop.next_outgoing(10) is None
    hop.receive(computed(back), 0.0)
    past = (Rewind(1, 2),)
    assert hop.next_outgoing(10) == step("XY", 2, sequence=1, rewind=1, want_from=3, past=past)


def test_a_new_order_puts_the_log_in_it_and_goes_to_the_successor() -> None:
    hop = make(opened(batch=2, padding=(0, 0)))
    granted(hop)
    run(hop, step("ab/kl"))
    hop.next_outgoing(10)
    past = (Rewind(1, 2, (1, 1)),)
    run(hop, step("x/y", 2, sequence=1, rewind=1, past=past))
    assert hop.next_outgoing(10) == step("X/Y", 2, sequence=1, rewind=1, past=past)
    granted(hop, position=0, link=1)
    assert hop.next_outgoing(10) == step("KLX/KLY", link=1, rewind=1, past=past)


def test_a_replacement_knows_what_the_hop_behind_it_has_missed() -> None:
    """What the hop before it knows comes with the first step, though nothing is held to reorder."""
    hop = make(opened(batch=2, padding=(0, 0)))
    past = (Rewind(6, 1, (0, 1)), Rewind(7, 2, (1, 0)))
    run(hop, step("abc/klm", rewind=7, past=past))
    granted(hop, position=2, rewind=6)
    assert hop.next_outgoing(10) == step("C/M", 2, rewind=7, past=past[1:])
    granted(hop, position=2, rewind=4, link=1)
    everything = (Rewind(5, 0), *past)
    assert hop.next_outgoing(10) == step("ABC/KLM", 0, link=1, rewind=7, past=everything)


def test_a_replacement_that_was_told_of_nothing_sends_everything_again() -> None:
    hop = make(opened(batch=2, padding=(0, 0)))
    run(hop, step("abc/klm", rewind=7))
    granted(hop, position=2, rewind=6)
    assert hop.next_outgoing(10) == step("ABC/KLM", 0, rewind=7, past=(Rewind(7, 0),))


@pytest.mark.parametrize("order", [(0,), (0, 1), (0, 1, 2, 3), (0, 1, 3), (1, 1, 2), (1, 0, 2)])
def test_an_order_that_the_batch_cannot_take_is_refused(order: tuple[int, ...]) -> None:
    hop = make(opened(batch=3, padding=(0, 1, 1)))
    run(hop, step("abc/klm/uvw"))
    bad = step("x/y/z", 3, sequence=1, rewind=1, past=(Rewind(1, 3, order),))
    with pytest.raises(RemoteProtocolError, match="cannot take the places of a batch") as refusal:
        hop.receive(bad, 0.0)
    assert str(list(order)) in str(refusal.value)
    assert hop.position == 3


def test_a_successor_that_missed_a_rewind_is_cut_to_what_is_still_true() -> None:
    hop = make()
    granted(hop)
    run(hop, step("abcd"))
    hop.next_outgoing(10)
    hop.receive(SuccessorLost(), 0.0)
    run(hop, step("x", 1, sequence=1, rewind=1))
    granted(hop, link=1, position=4, rewind=0)
    assert hop.next_outgoing(10) == step("X", 1, link=1, rewind=1, past=(Rewind(1, 1),))


# --- back to the originator -----------------------------------------------------------------------


def test_the_last_hop_returns_the_rows_that_are_wanted() -> None:
    hop = last_hop()
    assert hop.next_outgoing(10) is None
    run(hop, step("abcd", want_from=2))
    assert hop.next_outgoing(10) == output("CD", 2)
    assert hop.next_outgoing(10) is None
    run(hop, step("e", 4, sequence=1, want_from=4))
    assert hop.next_outgoing(10) == output("E", 4)


def test_many_wanted_rows_come_back_in_outputs_of_at_most_max_rows() -> None:
    hop = last_hop()
    run(hop, step("abcde"))
    assert [hop.next_outgoing(2) for _ in range(4)] == [
        output("AB", 0),
        output("CD", 2),
        output("E", 4),
        None,
    ]


def test_rows_before_the_wanted_ones_stay() -> None:
    hop = last_hop()
    run(hop, step("ab", want_from=3), step("c", 2, sequence=1, want_from=3))
    assert hop.next_outgoing(10) is None


def test_after_a_rewind_the_new_rows_come_back() -> None:
    hop = last_hop()
    run(hop, step("abcd", want_from=3))
    assert hop.next_outgoing(10) == output("D", 3)
    run(hop, step("xy", 2, sequence=1, rewind=1, want_from=2))
    assert hop.next_outgoing(10) == output("XY", 2, rewind=1)


def test_after_a_rewind_rows_that_are_still_wanted_come_back_again() -> None:
    """What was on its way when the originator went back, it has dropped as stale."""
    hop = last_hop()
    run(hop, step("abcd", want_from=0))
    assert hop.next_outgoing(10) == output("ABCD", 0)
    run(hop, step("x", 3, sequence=1, rewind=1, want_from=0))
    assert hop.next_outgoing(10) == output("ABCX", 0, rewind=1)


def test_a_batch_comes_back_as_a_batch() -> None:
    hop = last_hop(batch=2, padding=(0, 1))
    run(hop, step("abc/def", want_from=1))
    first, second = hop.next_outgoing(1), hop.next_outgoing(9)
    assert isinstance(first, Output) and isinstance(second, Output)
    assert (letters(first.hidden), letters(second.hidden)) == ("B/E", "C/F")


# --- who may link ---------------------------------------------------------------------------------


def test_only_the_named_predecessor_may_link() -> None:
    hop = make(opened(epoch=3))
    assert hop.link_welcome("before", 3) is Welcome.ACCEPT
    assert hop.link_welcome("before", 4) is Welcome.ACCEPT
    assert hop.link_welcome("stranger", 3) is Welcome.REFUSE
    assert hop.link_welcome("stranger", 2) is Welcome.REFUSE
    assert hop.link_welcome("after", 3) is Welcome.REFUSE


def test_who_knows_a_newer_epoch_waits_for_the_relink() -> None:
    hop = make(opened(epoch=3))
    assert hop.link_welcome("newcomer", 4) is Welcome.WAIT
    hop.receive(Relink(4, "newcomer", Peer("after")), 0.0)
    assert hop.link_welcome("newcomer", 4) is Welcome.ACCEPT
    assert hop.link_welcome("before", 4) is Welcome.REFUSE


def test_a_predecessor_may_not_link_with_what_it_knew_before_it_was_named() -> None:
    hop = make(opened(epoch=3))
    hop.receive(Relink(5, "newcomer", Peer("after")), 0.0)
    assert hop.link_welcome("newcomer", 4) is Welcome.REFUSE


def test_a_predecessor_that_stays_may_link_with_the_epoch_it_was_named_in() -> None:
    hop = make(opened(epoch=3))
    hop.receive(Relink(5, "before", Peer("other")), 0.0)
    assert hop.link_welcome("before", 3) is Welcome.ACCEPT


# --- other neighbours -----------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_relink_of_an_epoch_that_is_not_newer_changes_nothing(epoch: int) -> None:
    hop = make(opened(epoch=2))
    assert hop.receive(Relink(epoch, "stranger", None), 0.0) == []
    assert (hop.epoch, hop.predecessor, hop.successor) == (2, "before", Peer("after"))


def test_a_new_predecessor_makes_what_the_old_one_sent_stale() -> None:
    hop = make()
    granted(hop)
    hop.receive(Linked(), 0.0)
    run(hop, step("abc"))
    assert hop.receive(Relink(2, "newcomer", Peer("after")), 0.0) == []
    assert hop.receive(step("d", 3, sequence=1), 0.0) == []
    assert hop.receive(Linked(), 0.0) == [Reply(Resume(2, 3, 0))]
    run(hop, step("d", 3, link=2))


def test_a_new_predecessor_leaves_the_link_to_the_successor_alone() -> None:
    hop = make()
    granted(hop)
    run(hop, step("abc"))
    hop.receive(Relink(2, "newcomer", Peer("after")), 0.0)
    assert hop.successor_linked
    assert hop.next_outgoing(10) == step("ABC")


def test_a_new_successor_is_dialled_and_gets_what_it_lacks() -> None:
    hop = make()
    granted(hop)
    run(hop, step("abc"))
    hop.next_outgoing(10)
    newcomer = Peer("newcomer", ("/ip4/127.0.0.1/tcp/1",))
    assert hop.receive(Relink(2, "before", newcomer), 0.0) == [DialSuccessor()]
    assert hop.successor == newcomer
    assert hop.next_outgoing(10) is None
    granted(hop)
    assert hop.next_outgoing(10) == step("ABC")
    run(hop, step("d", 3, sequence=1))  # the predecessor's link has stayed as it was


def test_a_successor_that_is_opened_anew_is_dialled_again_if_its_link_was_lost() -> None:
    hop = make()
    granted(hop)
    hop.receive(SuccessorLost(), 0.0)
    assert hop.receive(Relink(2, "before", Peer("after")), 0.0) == [DialSuccessor()]
    granted(hop)
    assert hop.receive(Relink(3, "before", Peer("after")), 0.0) == []


def test_a_hop_that_becomes_the_last_returns_what_is_wanted() -> None:
    hop = make()
    granted(hop)
    run(hop, step("abc", want_from=1))
    hop.next_outgoing(10)
    assert hop.receive(Relink(2, "before", None), 0.0) == [DialSuccessor()]
    assert hop.next_outgoing(10) == output("BC", 1)


def test_a_hop_that_is_the_last_again_returns_again_what_is_wanted() -> None:
    hop = last_hop()
    run(hop, step("abc", want_from=0))
    assert hop.next_outgoing(10) == output("ABC", 0)
    hop.receive(Relink(2, "before", Peer("after")), 0.0)
    assert hop.next_outgoing(10) is None
    hop.receive(Relink(3, "before", None), 0.0)
    assert hop.next_outgoing(10) == output("ABC", 0)


# --- who lives ------------------------------------------------------------------------------------


def test_a_probe_is_answered_with_where_the_hop_is() -> None:
    hop = make()
    granted(hop)
    run(hop, step("abc"))
    hop.receive(step("d", 3, sequence=1), 0.0)
    assert hop.receive(Probe(7), 0.0) == [Reply(State(7, 4, 0, 3, 0, True))]
    hop.receive(SuccessorLost(), 0.0)
    assert hop.receive(Probe(8), 0.0) == [Reply(State(8, 4, 0, 3, 0, False))]


def test_a_session_that_nobody_uses_has_a_deadline() -> None:
    hop = Hop(opened(), hidden_size=HIDDEN_SIZE, now=100.0)
    assert hop.next_deadline() == 100.0 + IDLE_TIMEOUT
    hop.receive(Probe(1), 150.0)
    assert hop.next_deadline() == 150.0 + IDLE_TIMEOUT


def test_a_hop_shows_its_state() -> None:
    hop = make(opened(epoch=4))
    granted(hop)
    run(hop, step("abc"))
    assert repr(hop) == (
        "Hop(epoch=4, predecessor='before', successor=Peer(peer_id='after', multiaddrs=()), "
        "LinkReceiver(link=0, sequence=1, position=3, rewind=0), "
        "OutputLog(0..3, float16 [1, rows, 2]), "
        "LinkSender(granted=Resume(link=0, position=0, rewind=0), cursor=None))"
    )


# --- whether to take part -------------------------------------------------------------------------


def check(frame: Open, *, max_rows: int = 100) -> None:
    check_open(frame, model="f00d", span_served=Span(2, 6), max_rows=max_rows)


def test_a_hop_takes_part_in_what_it_serves() -> None:
    check(opened(span=Span(2, 6)), max_rows=1)
    check(opened(span=Span(3, 4), batch=2, padding=(0, 7), max_tokens=8))


@pytest.mark.parametrize(
    ("frame", "code", "reason"),
    [
        (
            opened(model="c0ffee" * 10),
            ErrorCode.WRONG_MODEL,
            "this node serves model f00d…, not c0ffeec0ffee…",
        ),
        (
            opened(span=Span(1, 3)),
            ErrorCode.WRONG_SPAN,
            "this node serves blocks 2:6, not 1:3",
        ),
        (
            opened(batch=2, padding=(0,)),
            ErrorCode.BAD_REQUEST,
            "a batch of 2 needs as many paddings, each below max_tokens",
        ),
        (
            opened(batch=2, padding=(0, 8), max_tokens=8),
            ErrorCode.BAD_REQUEST,
            "a batch of 2 needs as many paddings, each below max_tokens",
        ),
        *(
            (
                frame,
                ErrorCode.BAD_REQUEST,
                "a prefix may be offered for one sequence without padding that has room for more",
            )
            for frame in (
                opened(prefix=(bytes(32),), max_tokens=32),
                opened(prefix=(bytes(32),) * 3, max_tokens=96),
                opened(prefix=(bytes(32),), max_tokens=100, batch=2, padding=(0, 0)),
                opened(prefix=(bytes(32),), max_tokens=100, padding=(1,)),
            )
        ),
    ],
)
def test_a_hop_refuses_what_it_cannot_do(frame: Open, code: ErrorCode, reason: str) -> None:
    with pytest.raises(Refusal) as refusal:
        check(frame)
    assert (refusal.value.code, str(refusal.value)) == (code, reason)


def test_a_hop_refuses_a_batch_of_which_no_row_fits_a_frame() -> None:
    with pytest.raises(Refusal, match="one row of a batch of 1 does not fit a frame") as refusal:
        check(opened(), max_rows=0)
    assert refusal.value.code is ErrorCode.BAD_REQUEST


def test_a_hop_takes_part_in_a_session_that_offers_a_prefix() -> None:
    check(opened(prefix=(bytes(32),) * 3, max_tokens=97))
