from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from petals.protocol.announcement import Announcement
from petals.protocol.coordinates import Coordinate
from petals.protocol.errors import NoRoute
from petals.protocol.routing import (
    DEFAULT_LATENCY,
    MAX_CANDIDATES,
    MAX_LOOKED_AT,
    RELAY_SECONDS,
    THROUGHPUT_LATENCY,
    LatencyEstimates,
    Objective,
    Route,
    RouteHop,
    block_seconds,
    load_seconds,
    no_route,
    plan_by_places,
    plan_route,
)
from petals.protocol.span import Span
from support.announcements import announce, dice, peer_id

MODEL = Span(0, 8)


def nowhere(sender: str | None, receiver: str | None) -> float:
    return 0.0


def plan(
    candidates: list[Announcement], span: Span = MODEL, *, seed: int = 1, **settings: Any
) -> Route:
    settings.setdefault("latency", LatencyEstimates.of(candidates))
    return plan_route(candidates, span, dice=dice(seed), **settings)


def who(route: Route) -> list[tuple[str, str]]:
    return [(hop.peer_id, str(hop.span)) for hop in route.hops]


def test_one_peer_with_everything_beats_a_chain_of_equals() -> None:
    whole = announce(1, MODEL)
    parts = [announce(2, Span(0, 4)), announce(3, Span(4, 8))]
    route = plan([*parts, whole])
    assert route.hops == (RouteHop(whole.peer_id, whole.multiaddrs, MODEL),)
    assert route.cost == pytest.approx(8 / 100 + 2 * DEFAULT_LATENCY)
    assert str(route) == f"{peer_id(1)[-6:]} [0:8]"


def test_a_chain_of_fast_peers_beats_a_slow_one_with_everything() -> None:
    slow = announce(1, MODEL, decode_speed=10.0)
    parts = [announce(2, Span(0, 5)), announce(3, Span(3, 8), decode_speed=200.0)]
    route = plan([slow, *parts])
    # the faster of the two runs all that it can
    assert who(route) == [(peer_id(2), "0:3"), (peer_id(3), "3:8")]
    assert route.cost == pytest.approx(3 / 100 + 5 / 200 + 3 * DEFAULT_LATENCY)


def test_only_the_blocks_asked_for_are_routed() -> None:
    peers = [announce(1, Span(0, 4)), announce(2, Span(2, 8))]
    assert who(plan(peers, Span(3, 6))) == [(peer_id(2), "3:6")]


def test_a_busy_peer_is_left_to_others() -> None:
    busy, idle = announce(1, MODEL, session_blocks=6), announce(2, MODEL, decode_speed=90.0)
    assert load_seconds(busy) == pytest.approx(3 / 100)
    assert plan([busy, idle]).hops[0].peer_id == peer_id(2)


def test_a_peer_that_has_failed_us_ranks_below_one_that_is_somewhat_slower() -> None:
    flapping, steady = announce(1, MODEL), announce(2, MODEL, decode_speed=70.0)
    assert plan([flapping, steady]).hops[0].peer_id == peer_id(1)
    route = plan([flapping, steady], failures={peer_id(1): 1, peer_id(2): 0}.__getitem__)
    assert route.hops[0].peer_id == peer_id(2)


def test_a_hop_comes_with_the_speed_that_it_has_announced() -> None:
    peers = [announce(1, Span(0, 2), prefill_speed=400.0), announce(2, Span(2, 8))]
    first, second = plan(peers).hops
    assert first.pace.step == pytest.approx(DEFAULT_LATENCY + 2 / 100)
    assert first.pace.row == pytest.approx(2 / 400)
    assert second.pace.step == pytest.approx(DEFAULT_LATENCY + 6 / 100)


def test_a_step_waits_at_a_busy_peer_however_few_blocks_it_is_for() -> None:
    busy = announce(1, MODEL, decode_speed=1000.0, session_blocks=200)
    idle = announce(2, Span(0, 7), decode_speed=100.0)
    route = plan([busy, idle], latency=nowhere)
    assert who(route) == [(peer_id(1), "0:8")]  # having waited, it may as well run all
    assert route.cost == pytest.approx((100 + 8) / 1000)
    assert route.hops[0].pace.step == pytest.approx(0.108)


def test_an_unmeasured_peer_is_taken_for_a_slow_one() -> None:
    assert block_seconds(announce(1, MODEL, decode_speed=0.0)) == pytest.approx(0.01)


def test_throughput_wants_fast_prefill_and_cares_little_for_latency() -> None:
    near = announce(1, MODEL, prefill_speed=1000.0, decode_speed=1000.0)
    far = announce(2, MODEL, prefill_speed=4000.0, decode_speed=100.0)
    latency = LatencyEstimates({peer_id(1): 0.002, peer_id(2): 0.02})
    settings: Any = {"latency": latency}
    assert plan([near, far], **settings).hops[0].peer_id == peer_id(1)
    route = plan([near, far], objective=Objective.THROUGHPUT, **settings)
    assert route.hops[0].peer_id == peer_id(2)
    assert route.cost == pytest.approx(8 / 4000 + THROUGHPUT_LATENCY * 0.02)


def test_latency_is_that_which_either_end_has_measured() -> None:
    one = announce(1, MODEL, round_trips={peer_id(2): 0.02})
    estimate = LatencyEstimates.of([one, announce(2, MODEL)], {peer_id(1): 0.1})
    assert estimate(None, peer_id(1)) == estimate(peer_id(1), None) == pytest.approx(0.05)
    assert estimate(peer_id(1), peer_id(2)) == estimate(peer_id(2), peer_id(1)) == 0.01
    assert estimate(None, peer_id(2)) == estimate(peer_id(2), peer_id(3)) == DEFAULT_LATENCY
    assert estimate(peer_id(1), peer_id(1)) == estimate(None, None) == 0


def test_every_way_that_leads_over_a_relay_costs_more() -> None:
    circuit = (f"/ip4/10.0.0.9/tcp/4001/p2p/{peer_id(9)}/p2p-circuit/p2p/{peer_id(1)}",)
    hidden, other = announce(1, MODEL, multiaddrs=circuit), announce(2, MODEL)
    estimate = LatencyEstimates.of([hidden, other], {peer_id(1): 0.1, peer_id(2): 0.1})
    assert estimate(None, peer_id(1)) == pytest.approx(0.05 + RELAY_SECONDS)
    unmeasured = LatencyEstimates.of([hidden, other])
    assert unmeasured(peer_id(2), peer_id(1)) == pytest.approx(DEFAULT_LATENCY + RELAY_SECONDS)
    assert estimate(peer_id(1), None) == pytest.approx(0.05 + RELAY_SECONDS)
    assert unmeasured(peer_id(1), peer_id(2)) == DEFAULT_LATENCY  # the hidden one dials
    assert plan([hidden, other], latency=estimate).hops[0].peer_id == peer_id(2)


def test_a_recovery_runs_from_one_survivor_to_the_next() -> None:
    near_source = announce(1, Span(2, 6), round_trips={peer_id(8): 0.01})
    near_sink = announce(2, Span(2, 6), round_trips={peer_id(9): 0.05})
    survivors = [announce(8, Span(0, 4)), announce(9, Span(4, 8))]
    route = plan(
        [near_source, near_sink, *survivors], Span(2, 6), source=peer_id(8), sink=peer_id(9)
    )
    assert who(route) == [(peer_id(1), "2:6")]
    assert route.cost == pytest.approx(0.005 + 4 / 100 + DEFAULT_LATENCY)


def test_excluded_peers_and_peers_without_blocks_are_not_used() -> None:
    peers = [announce(1, MODEL), announce(2, MODEL, decode_speed=1.0), announce(3, None)]
    assert plan(peers, exclude={peer_id(1)}).hops[0].peer_id == peer_id(2)
    with pytest.raises(NoRoute) as caught:
        plan(peers, exclude={peer_id(1), peer_id(2)})
    assert caught.value.missing == (MODEL,)


def test_a_gap_is_named_with_what_to_do_about_it() -> None:
    peers = [announce(1, Span(0, 3)), announce(2, Span(4, 6))]
    with pytest.raises(NoRoute) as caught:
        plan(peers, Span(1, 8), model_name="demo")
    assert caught.value.missing == (Span(3, 4), Span(6, 8))
    assert str(caught.value) == (
        "blocks 3:4 and 6:8 of demo are served by nobody (2 peers seen); "
        "start a node with --blocks 3:4 and --blocks 6:8, or wait for one"
    )
    assert "(1 peer seen)" in str(no_route("demo", [MODEL], 1))


def test_equals_are_drawn_and_the_draw_can_be_repeated() -> None:
    peers = [announce(number, MODEL) for number in range(1, 9)]
    chosen = [plan(peers, seed=seed).hops[0].peer_id for seed in range(64)]
    assert set(chosen) == {peer.peer_id for peer in peers}
    assert chosen == [plan(peers, seed=seed).hops[0].peer_id for seed in range(64)]


def test_of_a_crowd_only_so_many_are_looked_at() -> None:
    crowd = [announce(n, MODEL, decode_speed=50.0 + n % 50) for n in range(1, 200)]
    crowd += [announce(200, Span(0, 4), decode_speed=1e6), announce(201, Span(4, 8))]
    asked: set[str | None] = set()

    def latency(sender: str | None, receiver: str | None) -> float:
        if sender is not None and receiver is not None:
            asked.update((sender, receiver))
        return 0.001

    route = plan(crowd, latency=latency)
    assert route.hops[0].peer_id == peer_id(200)  # far the fastest is among them
    assert len(asked) <= 2 * MAX_CANDIDATES
    assert route == plan(crowd, latency=latency)


def exhaustive(peers: list[Announcement], latency: Any, start: int, end: int) -> float:
    """The dumb twin: every chain of peers, every division of the blocks among them."""

    def onward(block: int, last: str | None, rest: list[Announcement]) -> float:
        if block == end:
            return float(latency(last, None))
        best = float("inf")
        for peer in rest:
            assert peer.span is not None
            others = [other for other in rest if other is not peer]
            for stop in range(block + 1, min(end, peer.span.end) + 1):
                if block in peer.span:
                    cost = latency(last, peer.peer_id) + load_seconds(peer)
                    cost += (stop - block) * block_seconds(peer)
                    best = min(best, cost + onward(stop, peer.peer_id, others))
        return best

    return onward(start, None, peers)


@st.composite
def swarms(draw: st.DrawFn) -> list[Announcement]:
    peers = []
    for number in range(1, draw(st.integers(1, 6)) + 1):
        start = draw(st.integers(0, 4))
        span = Span(start, draw(st.integers(start + 1, 5)))
        speed = draw(st.sampled_from([10.0, 30.0, 100.0, 1000.0]))
        load = draw(st.sampled_from([0, 0, 3, 40]))
        others = st.sampled_from([peer_id(other) for other in range(1, 7)])
        times = draw(st.dictionaries(others, st.floats(0, 0.2), max_size=4))
        peers.append(
            announce(
                number,
                span,
                decode_speed=speed,
                session_blocks=load,
                round_trips=times,
                num_blocks=5,
            )
        )
    return peers


@given(swarms(), st.dictionaries(st.sampled_from(range(1, 7)), st.floats(0, 0.2)))
@settings(max_examples=150)
def test_a_route_is_as_good_as_the_best_of_all(
    peers: list[Announcement], measured: dict[int, float]
) -> None:
    latency = LatencyEstimates.of(peers, {peer_id(n): time for n, time in measured.items()})
    best = exhaustive(peers, latency, 0, 5)
    try:
        route = plan(peers, Span(0, 5), latency=latency)
    except NoRoute:
        assert best == float("inf")
        return
    assert route.cost == pytest.approx(best)
    assert [hop.span.start for hop in route.hops[:1]] == [0]
    assert all(one.span.end == two.span.start for one, two in pairwise(route.hops))
    assert route.hops[-1].span.end == 5
    held = {peer.peer_id: peer.span for peer in peers}
    assert all((span := held[hop.peer_id]) and span.covers(hop.span) for hop in route.hops)


def test_two_that_have_not_measured_each_other_are_as_far_as_our_own_distances_say() -> None:
    near, far = peer_id(1), peer_id(2)
    estimate = LatencyEstimates({near: 0.006, far: 0.2, peer_id(3): 0.008})
    assert estimate(near, peer_id(3)) == pytest.approx(0.005)
    assert estimate(near, far) == pytest.approx(0.1, rel=0.01)
    assert estimate(near, peer_id(4)) == DEFAULT_LATENCY
    assert estimate(peer_id(4), None) == DEFAULT_LATENCY


def test_a_crowd_at_some_blocks_hides_nobody_at_others() -> None:
    crowd = [announce(number, Span(0, 4), decode_speed=1000.0) for number in range(1, 41)]
    alone = announce(50, Span(3, 8), decode_speed=10.0)
    route = plan([*crowd, alone], latency=nowhere)
    assert [hop.span for hop in route.hops] == [Span(0, 4), Span(4, 8)]
    assert route.hops[1].peer_id == peer_id(50)


def test_what_nobody_has_measured_follows_from_coordinates() -> None:
    near, far = Coordinate((0.01, 0.0, 0.0), 0.002, 0.1), Coordinate((0.11, 0.0, 0.0), 0.002, 0.1)
    unsure = Coordinate((0.01, 0.0, 0.0), 0.002, 0.9)
    peers = [
        announce(1, MODEL, coordinate=near),
        announce(2, MODEL, coordinate=far, round_trips={peer_id(1): 0.3}),
        announce(3, MODEL, coordinate=far),
        announce(4, MODEL, coordinate=unsure),
    ]
    ours = Coordinate((0.0, 0.0, 0.0), 0.004, 0.1)
    latency = LatencyEstimates.of(peers, {peer_id(3): 0.5}, ours)
    assert latency(None, peer_id(1)) == pytest.approx(0.008)
    assert latency(peer_id(1), peer_id(3)) == pytest.approx(0.052)
    assert latency(peer_id(1), peer_id(2)) == 0.15, "what was measured counts for more"
    assert latency(peer_id(3), None) == 0.25
    assert latency(peer_id(1), peer_id(4)) == DEFAULT_LATENCY
    assert latency(None, peer_id(4)) == DEFAULT_LATENCY


def test_of_very_many_the_best_at_a_glance_are_looked_at_and_whoever_is_needed() -> None:
    here, far = Coordinate((0.0, 0.0, 0.0), 0.002, 0.1), Coordinate((9.0, 0.0, 0.0), 0.002, 0.1)
    crowd = [
        announce(1, Span(0, 7), decode_speed=50.0 + number % 100)
        for number in range(2 * MAX_LOOKED_AT)
    ]
    crowd = [replace(peer, peer_id=f"peer {number}") for number, peer in enumerate(crowd)]
    idle = replace(crowd[0], peer_id="idle", span=None)
    fastest = replace(crowd[0], peer_id="fastest", decode_speed=9000.0, coordinate=here)
    behind = replace(fastest, peer_id="behind", decode_speed=9900.0, coordinate=far)
    alone = replace(crowd[0], peer_id="alone", span=Span(7, 8), decode_speed=1.0)

    def route(
        *peers: Announcement, blocks: Span, own: Coordinate = here, source: str | None = None
    ) -> list[str]:
        def plan(peers: Sequence[Announcement], latency: LatencyEstimates) -> Route:
            looked.append(len(peers))
            return plan_route(peers, blocks, latency=latency, dice=dice(), source=source)

        planned = plan_by_places(peers, plan, measured={}, own=own, dice=dice(), source=source)
        return [hop.peer_id for hop in planned.hops]

    looked: list[int] = []
    assert route(*crowd, fastest, behind, blocks=Span(0, 7)) == ["fastest"]
    assert looked.pop() < 1.3 * MAX_LOOKED_AT
    for unsure in (Coordinate(), here):
        hops = route(*crowd, idle, fastest, blocks=Span(0, 7), own=unsure, source="idle")
        assert hops == ["fastest"]
    assert route(*crowd, fastest, blocks=Span(0, 7), source="unknown") == ["fastest"]
    for seed in range(3):
        rolls = dice(seed)
        shuffled = sorted([*crowd, idle, fastest, alone], key=lambda _: rolls.random())
        assert route(*shuffled, blocks=MODEL) == ["fastest", "alone"]
    with pytest.raises(NoRoute, match="blocks 7:8"):
        route(*crowd, blocks=MODEL)
    assert route(fastest, alone, blocks=MODEL) == ["fastest", "alone"], "few need no glance"
