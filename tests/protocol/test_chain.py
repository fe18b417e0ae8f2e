import dataclasses

import pytest
from petals.protocol import prefix
from petals.protocol.chain import (
    MAX_CUTS,
    Chain,
    ChainHop,
    ChainState,
    Closed,
    Deliver,
    DropHop,
    Effect,
    HopCut,
    HopLost,
    HopReady,
    HopState,
    LinkCut,
    LinkFirst,
    OpenHop,
    ProbeHop,
    RelinkHop,
    Returned,
    Routed,
    SessionTerms,
    Ticked,
)
from petals.protocol.checks import Peer, Rewind
from petals.protocol.errors import LocalProtocolError, RemoteProtocolError
from petals.protocol.frames import Open, Relink, Resume, State
from petals.protocol.link import Due
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor
from petals.protocol.watch import LEAST, Pace
from support.sessions import HIDDEN_SIZE, SESSION, hidden, letters, output

NUM_BLOCKS = 6
ALL = Span(0, NUM_BLOCKS)


def make(
    *,
    batch: int = 1,
    padding: tuple[int, ...] = (),
    max_tokens: int = 20,
    span: Span = ALL,
    now: float = 0.0,
) -> Chain:
    terms = SessionTerms(
        session=SESSION,
        model="f00d",
        span=span,
        hidden_size=HIDDEN_SIZE,
        batch=batch,
        padding=padding or (0,) * batch,
        max_tokens=max_tokens,
        wire_dtype=DType.FLOAT16,
    )
    return Chain(terms, own_peer_id="me", now=now)


def hops(route: str) -> list[ChainHop]:
    """``a=0:2 b=2:6`` as hops."""
    pairs = [hop.split("=") for hop in route.split()]
    return [ChainHop(Peer(name), Span.parse(span)) for name, span in pairs]


def route(chain: Chain, hop_names: str, now: float = 0.0) -> list[Effect]:
    return chain.receive(Routed(hops(hop_names)), now)


def running(
    hop_names: str = "a=0:2 b=2:4 c=4:6", *, batch: int = 1, padding: tuple[int, ...] = ()
) -> Chain:
    chain = make(batch=batch, padding=padding)
    route(chain, hop_names)
    for hop in chain.hops:
        chain.receive(HopReady(hop.peer.peer_id), 0.0)
    assert state_of(chain) is ChainState.RUNNING
    return chain


def state_of(chain: Chain) -> ChainState:
    return chain.state  # to mypy a call is news, an attribute is what it was


def returned(chain: Chain, rows: str, position: int, *, rewind: int = 0, of: str = "c") -> str:
    """What of the last hop's rows is delivered, as letters."""
    effects = chain.receive(Returned(of, output(rows, position, rewind=rewind)), 0.0)
    delivered = [effect.hidden for effect in effects if isinstance(effect, Deliver)]
    assert len(delivered) == len(effects) <= 1
    return "".join(letters(tensor) for tensor in delivered)


def opening(effects: list[Effect]) -> dict[str, Open]:
    return {effect.peer.peer_id: effect.frame for effect in effects if isinstance(effect, OpenHop)}


# --- opening --------------------------------------------------------------------------------------


def test_a_session_starts_with_all_of_its_blocks_missing() -> None:
    chain = make()
    assert state_of(chain) is ChainState.ROUTING
    assert chain.missing == [Span(0, 6)]


def test_a_route_opens_every_hop_between_its_neighbours_and_links_to_the_first() -> None:
    chain = make(batch=2)
    effects = route(chain, "a=0:2 b=2:4 c=4:6")
    assert [type(effect) for effect in effects] == [OpenHop, OpenHop, OpenHop, LinkFirst]
    assert effects[-1] == LinkFirst(Peer("a"), epoch=1)
    frames = opening(effects)
    assert frames["b"] == Open(
        session=SESSION,
        epoch=1,
        model="f00d",
        span=Span(2, 4),
        predecessor="a",
        successor=Peer("c"),
        batch=2,
        padding=(0, 0),
        max_tokens=20,
        wire_dtype=DType.FLOAT16,
    )
    assert (frames["a"].predecessor, frames["a"].successor) == ("me", Peer("b"))
    assert (frames["c"].predecessor, frames["c"].successor) == ("b", None)
    assert state_of(chain) is ChainState.OPENING
    assert chain.missing == []


def test_a_session_runs_when_every_hop_is_ready() -> None:
    chain = make()
    route(chain, "a=0:2 b=2:6")
    assert chain.receive(HopReady("b"), 0.0) == []
    assert state_of(chain) is ChainState.OPENING
    chain.receive(HopReady("stranger"), 0.0)
    assert state_of(chain) is ChainState.OPENING
    chain.receive(HopReady("a"), 0.0)
    assert state_of(chain) is ChainState.RUNNING


def test_one_hop_may_serve_it_all() -> None:
    frame = opening(route(make(), "a=0:6"))["a"]
    assert (frame.predecessor, frame.successor) == ("me", None)


def test_hops_may_come_in_any_order() -> None:
    chain = make()
    route(chain, "c=4:6 a=0:2 b=2:4")
    assert [hop.peer.peer_id for hop in chain.hops] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "a=0:2",
        "a=0:2 b=3:6",
        "a=0:4 b=3:6",
        "a=0:2 b=2:7",
        "a=1:6",
        "a=0:2 b=2:4 a=4:6",
    ],
)
def test_a_route_that_is_no_chain_over_all_blocks_is_a_mistake(bad: str) -> None:
    chain = make()
    with pytest.raises(LocalProtocolError, match="do not form a chain of blocks 0:6"):
        route(chain, bad)
    assert (chain.epoch, chain.hops) == (0, ())


def test_a_route_through_a_peer_that_is_a_hop_already_is_a_mistake() -> None:
    chain = running()
    chain.receive(HopLost("b", "gone"), 0.0)
    with pytest.raises(LocalProtocolError, match="over different peers"):
        route(chain, "a=2:4")


# --- recovering -----------------------------------------------------------------------------------


def test_a_lost_hop_makes_its_blocks_missing_and_is_dropped() -> None:
    chain = running()
    assert chain.receive(HopLost("b", "gone"), 0.0) == [DropHop("b", "gone")]
    assert state_of(chain) is ChainState.ROUTING
    assert chain.missing == [Span(2, 4)]


def test_a_hop_is_lost_only_once() -> None:
    chain = running()
    chain.receive(HopLost("b", "gone"), 0.0)
    assert chain.receive(HopLost("b", "gone, says another stream"), 0.0) == []
    assert chain.receive(HopLost("stranger", "who?"), 0.0) == []


def test_a_middle_hop_is_replaced_between_its_neighbours() -> None:
    chain = running()
    chain.receive(HopLost("b", "gone"), 0.0)
    effects = route(chain, "d=2:4")
    frames = opening(effects)
    assert (frames["d"].epoch, frames["d"].predecessor, frames["d"].successor) == (
        2,
        "a",
        Peer("c"),
    )
    assert [effect for effect in effects if not isinstance(effect, OpenHop)] == [
        RelinkHop("a", Relink(2, "me", Peer("d"))),
        RelinkHop("c", Relink(2, "d", None)),
    ]
    assert state_of(chain) is ChainState.OPENING
    chain.receive(HopReady("d"), 0.0)
    assert state_of(chain) is ChainState.RUNNING


def test_a_hop_whose_neighbours_stay_is_left_alone() -> None:
    chain = running("a=0:1 b=1:3 c=3:4 d=4:6")
    chain.receive(HopLost("d", "gone"), 0.0)
    effects = route(chain, "e=4:5 f=5:6")
    assert opening(effects).keys() == {"e", "f"}
    relinks = [effect for effect in effects if isinstance(effect, RelinkHop)]
    assert relinks == [RelinkHop("c", Relink(2, "b", Peer("e")))]


def test_several_hops_may_be_replaced_at_once() -> None:
    chain = running()
    chain.receive(HopLost("a", "gone"), 0.0)
    chain.receive(HopLost("c", "gone"), 0.0)
    assert chain.missing == [Span(0, 2), Span(4, 6)]
    effects = route(chain, "d=0:1 e=1:2 f=4:6")
    assert opening(effects).keys() == {"d", "e", "f"}
    assert RelinkHop("b", Relink(2, "e", Peer("f"))) in effects
    assert effects[-1] == LinkFirst(Peer("d"), epoch=2)


def test_a_new_first_hop_gets_all_tokens_again() -> None:
    chain = running()
    chain.append(3, want_from=2, now=0.0)
    chain.next_due(10)
    chain.receive(HopLost("a", "gone"), 0.0)
    assert route(chain, "d=0:2")[-1] == LinkFirst(Peer("d"), epoch=2)
    assert chain.next_due(10) == Due(link=0, sequence=0, rewind=0, start=0, stop=3)


def test_the_link_to_a_first_hop_that_stays_goes_on() -> None:
    chain = running()
    chain.append(3, want_from=2, now=0.0)
    chain.next_due(10)
    chain.receive(HopLost("b", "gone"), 0.0)
    assert not any(isinstance(effect, LinkFirst) for effect in route(chain, "d=2:4"))
    assert chain.next_due(10) is None
    chain.append(1, want_from=3, now=0.0)
    assert chain.next_due(10) == Due(link=0, sequence=1, rewind=0, start=3, stop=4)


def test_recoveries_are_routes_after_the_first() -> None:
    chain = running()
    assert (chain.recoveries, chain.epoch) == (0, 1)
    chain.receive(HopLost("b", "gone"), 0.0)
    assert chain.recoveries == 0
    route(chain, "d=2:4")
    assert (chain.recoveries, chain.epoch) == (1, 2)


def test_a_peer_that_was_lost_may_come_back() -> None:
    chain = running()
    chain.receive(HopLost("b", "gone"), 0.0)
    effects = route(chain, "b=2:4")
    assert opening(effects).keys() == {"b"}
    assert RelinkHop("c", Relink(2, "b", None)) in effects
    assert state_of(chain) is ChainState.OPENING


# --- tokens out -----------------------------------------------------------------------------------


def test_appended_tokens_are_due_at_once_in_steps_of_at_most_max_rows() -> None:
    chain = running()
    assert chain.next_due(10) is None
    chain.append(3, want_from=2, now=0.0)
    assert chain.next_due(2) == Due(link=0, sequence=0, rewind=0, start=0, stop=2)
    assert (chain.sent, chain.length) == (2, 3)
    assert chain.next_due(2) == Due(link=0, sequence=1, rewind=0, start=2, stop=3)
    assert chain.next_due(2) is None


def test_nothing_is_due_before_there_is_a_first_hop() -> None:
    chain = make()
    chain.append(3, want_from=2, now=0.0)
    assert chain.next_due(10) is None
    route(chain, "a=0:6")
    assert chain.next_due(10) == Due(link=0, sequence=0, rewind=0, start=0, stop=3)


def test_the_first_hop_may_ask_for_tokens_again() -> None:
    chain = running()
    chain.append(5, want_from=4, now=0.0)
    chain.next_due(10)
    assert chain.receive(Resume(link=1, position=3, rewind=0), 0.0) == []
    assert chain.next_due(10) == Due(link=1, sequence=0, rewind=0, start=3, stop=5)


def test_a_session_does_not_grow_beyond_its_tokens() -> None:
    chain = running()
    chain.append(20, want_from=19, now=0.0)
    with pytest.raises(LocalProtocolError, match="21 tokens in a session of 20"):
        chain.append(1, want_from=20, now=0.0)
    assert chain.length == 20


@pytest.mark.parametrize("want_from", [2, 5, 6])
def test_only_rows_that_can_still_come_may_be_wanted(want_from: int) -> None:
    chain = running()
    chain.append(3, want_from=2, now=0.0)
    assert returned(chain, "C", 2) == "C"
    with pytest.raises(LocalProtocolError, match=rf"rows from {want_from} are not among 3\.\.5"):
        chain.append(2, want_from=want_from, now=0.0)
    assert (chain.length, chain.expected) == (3, 3)


# --- going back -----------------------------------------------------------------------------------


def test_sequences_take_the_place_of_others_with_the_next_step() -> None:
    chain = running(batch=2)
    chain.append(3, want_from=2, now=0.0)
    chain.next_due(10)
    chain.rewind(3, (1, 1))
    assert (chain.length, chain.expected) == (3, 3)
    chain.append(1, want_from=3, now=0.0)
    assert chain.next_due(10) == Due(0, 1, 1, start=3, stop=4, past=(Rewind(1, 3, (1, 1)),))


@pytest.mark.parametrize("order", [(), (0,), (0, 2), (1, 0)])
def test_an_order_that_cannot_be_is_a_mistake(order: tuple[int, ...]) -> None:
    chain = running(batch=2, padding=(0, 1))
    chain.append(3, want_from=2, now=0.0)
    with pytest.raises(LocalProtocolError, match="cannot"):
        chain.rewind(3, order)


def test_a_session_may_run_through_a_part_of_the_blocks() -> None:
    chain = make(span=Span(2, 5), max_tokens=80)
    assert chain.missing == [Span(2, 5)]
    chain.append(70, want_from=69, now=0.0)
    assert chain.offerable == 0
    route(chain, "a=2:3 b=3:5")
    assert chain.missing == []
    effects = chain.receive(LinkCut("reset"), 0.0)
    assert [type(effect) for effect in effects] == [LinkFirst]


def test_going_back_cuts_the_tokens_and_the_next_step_says_so() -> None:
    chain = running()
    chain.append(5, want_from=4, now=0.0)
    chain.next_due(10)
    assert returned(chain, "E", 4) == "E"
    chain.rewind(2)
    assert (chain.length, chain.expected) == (2, 2)
    assert chain.next_due(10) is None
    chain.append(2, want_from=3, now=0.0)
    assert chain.next_due(10) == Due(0, 1, 1, start=2, stop=4, past=(Rewind(1, 2),))


def test_what_has_not_come_back_is_not_awaited_after_going_back() -> None:
    """No step may be left that would ask for it: hops that had the rows already have sent none."""
    chain = running()
    chain.append(5, want_from=1, now=0.0)
    chain.rewind(3)
    assert (chain.length, chain.expected) == (3, 3)
    assert chain.next_deadline() is None


@pytest.mark.parametrize("position", [-1, 3, 4])
def test_nobody_goes_back_to_the_end_or_beyond(position: int) -> None:
    chain = running()
    chain.append(3, want_from=2, now=0.0)
    with pytest.raises(LocalProtocolError, match=rf"cannot go back to {position} in 0\.\.3"):
        chain.rewind(position)
    assert chain.length == 3


# --- rows back ------------------------------------------------------------------------------------


def test_wanted_rows_are_delivered_in_order() -> None:
    chain = running()
    chain.append(5, want_from=1, now=0.0)
    assert returned(chain, "BC", 1) == "BC"
    assert chain.expected == 3
    assert returned(chain, "DE", 3) == "DE"
    assert chain.expected == chain.length


def test_a_batch_is_delivered_as_a_batch() -> None:
    chain = running(batch=2)
    chain.append(3, want_from=1, now=0.0)
    assert returned(chain, "ABC/DEF", 0) == "BC/EF"


def test_rows_that_came_before_are_dropped() -> None:
    chain = running()
    chain.append(5, want_from=1, now=0.0)
    returned(chain, "BC", 1)
    assert returned(chain, "BC", 1) == ""
    assert returned(chain, "C", 2) == ""
    assert chain.expected == 3


def test_of_an_output_that_overlaps_what_came_before_the_rest_is_delivered() -> None:
    """A last hop that replaces another knows where the wanted rows start, not which came back."""
    chain = running()
    chain.append(5, want_from=1, now=0.0)
    returned(chain, "BC", 1)
    assert returned(chain, "BCDE", 1) == "DE"
    assert chain.expected == 5


def test_rows_that_are_not_wanted_any_more_are_dropped() -> None:
    chain = running()
    chain.append(2, want_from=0, now=0.0)
    chain.append(2, want_from=3, now=0.0)
    assert returned(chain, "AB", 0) == ""
    assert returned(chain, "BCD", 1) == "D"


def test_rows_of_an_older_rewind_are_dropped() -> None:
    chain = running()
    chain.append(5, want_from=4, now=0.0)
    chain.rewind(4)
    chain.append(1, want_from=4, now=0.0)
    assert returned(chain, "E", 4) == ""
    assert returned(chain, "X", 4, rewind=1) == "X"


def test_only_the_last_hop_returns_rows() -> None:
    chain = running()
    chain.append(1, want_from=0, now=0.0)
    assert returned(chain, "A", 0, of="b") == ""
    assert returned(chain, "A", 0, of="stranger") == ""
    chain.receive(HopLost("c", "gone"), 0.0)
    assert returned(chain, "A", 0) == ""
    route(chain, "d=4:6")
    assert returned(chain, "A", 0) == ""
    assert returned(chain, "A", 0, of="d") == "A"


def test_nobody_returns_rows_when_all_hops_are_lost() -> None:
    chain = running("a=0:6")
    chain.append(1, want_from=0, now=0.0)
    chain.receive(HopLost("a", "gone"), 0.0)
    assert returned(chain, "A", 0, of="a") == ""


@pytest.mark.parametrize(
    ("rows", "position", "rewind", "complaint"),
    [
        ("D", 3, 0, "outputs at 3 where 2 comes next"),
        ("CDEF", 2, 0, "outputs up to 6 of 5 tokens sent"),
        ("A", 0, 1, "outputs up to 1 of 5 tokens sent"),
    ],
)
def test_rows_that_cannot_be_are_the_peers_fault(
    rows: str, position: int, rewind: int, complaint: str
) -> None:
    chain = running()
    chain.append(5, want_from=2, now=0.0)
    with pytest.raises(RemoteProtocolError) as refusal:
        returned(chain, rows, position, rewind=rewind)
    assert str(refusal.value) == complaint
    assert chain.expected == 2


@pytest.mark.parametrize(
    "wrong",
    [
        hidden("A/A"),
        WireTensor(DType.FLOAT16, (1, 1, 3), bytes(6)),
        WireTensor(DType.BFLOAT16, (1, 1, 2), bytes(4)),
        WireTensor(DType.FLOAT16, (2,), bytes(4)),
        WireTensor(DType.FLOAT16, (1, 1, 2, 1), bytes(4)),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tensor.shape}",
)
def test_rows_of_another_shape_or_type_are_the_peers_fault(wrong: WireTensor) -> None:
    chain = running()
    chain.append(1, want_from=0, now=0.0)
    frame = output("A", 0)
    with pytest.raises(RemoteProtocolError) as refusal:
        chain.receive(Returned("c", type(frame)(0, 0, wrong)), 0.0)
    assert str(refusal.value) == (
        f"outputs must be float16 [1, rows, 2], got {wrong.dtype} {list(wrong.shape)}"
    )


# --- who lives ------------------------------------------------------------------------------------


HALF = LEAST / 2
"""Seconds to a question, and to its answer, where steps take next to nothing."""


def stalled() -> Chain:
    """A chain that has waited for a row since second 10, and asks its hops whether they live."""
    chain = running()
    chain.append(1, want_from=0, now=10.0)
    asked = chain.receive(Ticked(), 10.0 + HALF)
    assert asked == [ProbeHop("a", 1), ProbeHop("b", 1), ProbeHop("c", 1)]
    return chain


def states(chain: Chain, now: float, nonce: int, **produced: int) -> list[Effect]:
    """Hops answer that they have taken the row in, and computed so many of it."""
    effects: list[Effect] = []
    for peer_id, rows in produced.items():
        state = State(nonce, 1, 0, rows, 0, True)
        effects += chain.receive(HopState(peer_id, state), now)
    return effects


def test_a_ring_that_owes_nothing_has_no_deadline() -> None:
    chain = running()
    assert chain.next_deadline() is None
    chain.append(1, want_from=0, now=10.0)
    assert chain.next_deadline() == 10.0 + HALF
    returned(chain, "A", 0)
    assert chain.next_deadline() is None


def test_a_ring_that_is_not_whole_has_no_deadline() -> None:
    chain = running()
    chain.append(1, want_from=0, now=10.0)
    chain.receive(HopLost("b", "gone"), 11.0)
    assert chain.next_deadline() is None
    route(chain, "d=2:4", now=12.0)
    assert chain.next_deadline() is None
    chain.receive(HopReady("d"), 13.0)
    assert chain.next_deadline() == 13.0 + HALF


def test_rows_that_come_back_put_the_deadline_off() -> None:
    chain = running()
    chain.append(2, want_from=0, now=10.0)
    chain.receive(Returned("c", output("A", 0)), 15.0)
    assert chain.next_deadline() == 15.0 + HALF


def test_what_the_hops_announce_of_their_speed_is_waited_for() -> None:
    chain = make()
    paced = [
        ChainHop(Peer(name), span, pace=Pace(1.0, 0.25))
        for name, span in (("a", Span(0, 2)), ("b", Span(2, 6)))
    ]
    chain.receive(Routed(paced), 0.0)
    for hop in paced:
        chain.receive(HopReady(hop.peer.peer_id), 0.0)
    chain.append(5, want_from=4, now=10.0)
    assert chain.next_deadline() == 10.0 + 3 * (2 * 1.0 + 4 * 2 * 0.25) / 2


def test_a_tick_before_the_deadline_does_nothing() -> None:
    chain = running()
    assert chain.receive(Ticked(), 1e9) == []
    chain.append(1, want_from=0, now=10.0)
    assert chain.receive(Ticked(), 10.0 + HALF - 0.1) == []


def test_a_hop_that_does_not_answer_a_probe_is_lost() -> None:
    chain = stalled()
    deadline = chain.next_deadline()
    assert deadline == 10.0 + LEAST
    assert states(chain, 11.5, 1, b=1) == []
    assert chain.receive(Ticked(), deadline) == [
        DropHop("a", "did not answer a probe"),
        DropHop("c", "did not answer a probe"),
    ]
    assert chain.missing == [Span(0, 2), Span(4, 6)]


def test_a_hop_where_nothing_moves_is_lost() -> None:
    chain = stalled()
    assert states(chain, 11.5, 1, a=1, b=0, c=0) == []
    assert chain.receive(Ticked(), 12.5) == [ProbeHop("a", 2), ProbeHop("b", 2), ProbeHop("c", 2)]
    assert states(chain, 13.0, 2, a=1, b=0, c=0) == []
    chain.receive(Ticked(), 14.0)
    assert states(chain, 14.5, 3, a=1, b=0, c=0) == [DropHop("b", "nothing moves there")]


def test_a_hop_that_was_replaced_meanwhile_need_not_answer() -> None:
    chain = stalled()
    chain.receive(HopLost("b", "gone"), 11.5)
    route(chain, "d=2:4", now=11.5)
    chain.receive(HopReady("d"), 12.0)
    assert chain.next_deadline() == 12.0 + HALF


# --- streams that break ---------------------------------------------------------------------------


def test_a_hop_whose_stream_broke_is_opened_again_and_its_predecessor_told() -> None:
    chain = running()
    effects = chain.receive(HopCut("b", "reset"), 1.0)
    again = Open(SESSION, 2, "f00d", Span(2, 4), "a", Peer("c"), 1, (0,), 20, DType.FLOAT16)
    assert effects == [
        RelinkHop("a", Relink(2, "me", Peer("b"))),
        OpenHop(Peer("b"), again),
    ]
    assert state_of(chain) is ChainState.OPENING
    chain.receive(HopReady("b"), 1.0)
    assert state_of(chain) is ChainState.RUNNING
    assert (chain.reconnects, chain.recoveries) == (1, 0)


def test_the_first_hop_gets_its_link_again_as_well() -> None:
    chain = running()
    chain.append(2, want_from=1, now=0.0)
    chain.receive(Resume(0, 0, 0), 0.0)
    assert chain.next_due(5) == Due(0, 0, 0, 0, 2)
    opened, link = chain.receive(HopCut("a", "reset"), 1.0)
    assert isinstance(opened, OpenHop)
    assert link == LinkFirst(Peer("a"), 2)
    assert chain.next_due(5) is None  # until it has said what it holds
    chain.receive(Resume(1, 1, 0), 1.0)
    assert chain.next_due(5) == Due(1, 0, 0, 1, 2)


def test_a_stream_that_breaks_beside_a_gap_is_opened_again_when_the_gap_is_filled() -> None:
    """Not before: across the gap, the hop would be fed by the wrong blocks."""
    chain = running()
    chain.receive(HopLost("b", "gone"), 1.0)
    assert chain.receive(HopCut("c", "reset"), 1.0) == []
    assert chain.receive(HopCut("a", "reset"), 1.0) == []
    effects = route(chain, "d=2:4", now=2.0)
    opened = opening(effects)
    assert [(name, frame.predecessor, frame.successor) for name, frame in opened.items()] == [
        ("a", "me", Peer("d")),
        ("d", "a", Peer("c")),
        ("c", "d", None),
    ]
    assert effects[-1] == LinkFirst(Peer("a"), 2)
    assert len(effects) == 4


def test_our_link_leads_to_nobody_while_the_first_blocks_are_missing() -> None:
    chain = running()
    chain.receive(HopLost("a", "gone"), 1.0)
    assert chain.receive(LinkCut("reset"), 1.0) == []
    assert chain.missing == [Span(0, 2)]


def test_a_hop_that_breaks_before_it_is_ready_is_lost() -> None:
    chain = running()
    chain.receive(HopCut("b", "reset"), 1.0)
    assert chain.receive(HopCut("b", "refused"), 1.1) == [DropHop("b", "refused")]
    assert chain.missing == [Span(2, 4)]
    assert chain.receive(HopCut("b", "late news"), 1.2) == []


def test_a_hop_whose_stream_breaks_again_and_again_is_lost_unless_rows_come_back() -> None:
    chain = running()
    chain.append(2, want_from=0, now=0.0)

    def cut(times: int) -> list[Effect]:
        for _ in range(times):
            effects = chain.receive(HopCut("c", "reset"), 1.0)
            chain.receive(HopReady("c"), 1.0)
        return effects

    assert len(cut(MAX_CUTS)) == 2
    returned(chain, "A", 0)
    assert len(cut(MAX_CUTS)) == 2
    assert cut(1) == [DropHop("c", "reset")]


def test_our_own_link_is_dialled_again_a_few_times() -> None:
    chain = running()
    for _ in range(MAX_CUTS):
        assert chain.receive(LinkCut("reset"), 1.0) == [LinkFirst(Peer("a"), 1)]
    assert chain.receive(LinkCut("reset"), 1.0) == [DropHop("a", "reset")]
    for name in "bc":
        chain.receive(HopLost(name, "gone"), 1.0)
    assert chain.receive(LinkCut("reset"), 1.0) == []


# --- the end --------------------------------------------------------------------------------------


def test_a_closed_session_drops_its_hops_and_hears_nothing_more() -> None:
    chain = running()
    chain.append(1, want_from=0, now=0.0)
    assert chain.receive(Closed("done"), 0.0) == [
        DropHop("a", "done"),
        DropHop("b", "done"),
        DropHop("c", "done"),
    ]
    assert state_of(chain) is ChainState.CLOSED
    assert chain.hops == ()
    assert chain.missing == []  # nobody is to look for a route any more
    assert chain.next_deadline() is None
    for event in (Closed("again"), HopLost("a", "gone"), Ticked(), Routed(hops("d=0:6"))):
        assert chain.receive(event, 0.0) == []
    assert chain.receive(Returned("c", output("A", 0)), 0.0) == []
    assert state_of(chain) is ChainState.CLOSED


def test_a_chain_shows_its_state() -> None:
    chain = running("a=0:2 b=2:6")
    chain.append(3, want_from=2, now=0.0)
    assert repr(chain) == (
        "Chain(running, epoch=1, hops=[a[0:2], b[2:6]], length=3, expected=2, "
        "LinkSender(granted=Resume(link=0, position=0, rewind=0), cursor=None))"
    )
    chain.receive(HopLost("b", "gone"), 0.0)
    assert repr(chain).startswith("Chain(routing, epoch=1, hops=[a[0:2]], ")


# --- prefixes -------------------------------------------------------------------------------------

ENTRIES = [b"1" * 32, b"2" * 32, b"3" * 32]


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries at 4, 8, 12."""
    monkeypatch.setattr(prefix, "PREFIX_ROWS", 4)


def offering(chain: Chain, hop_names: str) -> dict[str, int]:
    """How many digests each new hop is offered."""
    effects = chain.receive(Routed(hops(hop_names), ENTRIES), 0.0)
    return {name: len(frame.prefix) for name, frame in opening(effects).items()}


@pytest.mark.usefixtures("_short")
def test_hops_are_offered_what_enters_them() -> None:
    chain = make()
    chain.append(10, want_from=9, now=0.0)
    frames = opening(chain.receive(Routed(hops("a=0:2 b=2:4 c=4:6"), ENTRIES), 0.0))
    path = [("a", Span(0, 2)), ("b", Span(2, 4)), ("c", Span(4, 6))]
    assert [frames[name].prefix for name in "abc"] == prefix.offers(
        ENTRIES[:2], path, DType.FLOAT16
    )


@pytest.mark.usefixtures("_short")
def test_a_first_hop_with_an_offer_has_to_say_what_it_holds() -> None:
    chain = make()
    chain.append(10, want_from=9, now=0.0)
    offering(chain, "a=0:6")
    assert chain.next_due(20) is None
    chain.receive(Resume(0, 8, 0), 0.0)
    assert chain.next_due(20) == Due(0, 0, 0, 8, 10)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize(("length", "offered"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (20, 3)])
def test_a_row_is_left_to_come_back(length: int, offered: int) -> None:
    chain = make()
    chain.append(length, want_from=length - 1, now=0.0)
    assert offering(chain, "a=0:6") == {"a": offered}
    assert (chain.next_due(20) is None) == (offered > 0)


@pytest.mark.usefixtures("_short")
def test_nothing_is_offered_before_there_are_tokens_or_after_a_rewind() -> None:
    chain = make()
    assert chain.offerable == 0
    assert offering(chain, "a=0:6") == {"a": 0}
    chain.append(10, want_from=9, now=0.0)
    assert chain.offerable == 8
    chain.rewind(9)
    chain.receive(HopLost("a", "gone"), 0.0)
    assert offering(chain, "b=0:6") == {"b": 0}


@pytest.mark.usefixtures("_short")
def test_nothing_is_offered_of_a_batch_or_of_padded_rows() -> None:
    batch = make(batch=2)
    padded = Chain(dataclasses.replace(make().terms, padding=(1,)), own_peer_id="me", now=0.0)
    for chain in (batch, padded):
        chain.append(10, want_from=9, now=0.0)
        assert offering(chain, "a=0:6") == {"a": 0}


@pytest.mark.usefixtures("_short")
def test_a_replacement_is_offered_what_enters_it_on_the_new_route() -> None:
    chain = make()
    chain.append(10, want_from=9, now=0.0)
    chain.receive(Routed(hops("a=0:2 b=2:4 c=4:6"), ENTRIES), 0.0)
    chain.append(6, want_from=15, now=0.0)
    chain.receive(HopLost("b", "gone"), 0.0)
    frames = opening(chain.receive(Routed(hops("d=2:3 e=3:4"), ENTRIES), 0.0))
    path = [("a", Span(0, 2)), ("d", Span(2, 3)), ("e", Span(3, 4)), ("c", Span(4, 6))]
    _, of_d, of_e, _ = prefix.offers(ENTRIES, path, DType.FLOAT16)
    assert {name: frame.prefix for name, frame in frames.items()} == {"d": of_d, "e": of_e}
