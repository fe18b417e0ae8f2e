"""Many originators at once: what they get together, of what the swarm could give at most."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import compress, product
from statistics import mean

import pytest
from petals.protocol.announcement import Announcement
from petals.protocol.choice import Choice
from petals.protocol.dice import pick
from petals.protocol.expected import Expected
from petals.protocol.placement import choose_span
from petals.protocol.routing import Route, RouteHop, plan_route
from petals.protocol.span import Span
from support.announcements import announce, dice

BLOCKS = 8
NODES = 12
ORIGINATORS = 48
SPEEDS = (50.0, 100.0, 200.0, 400.0)
CAPACITIES = (2, 3, 4, 5, 8)
STALE = 20.0
"""Seconds in which all of them open a session, and nothing is announced."""
SEEDS = range(10)

Hops = Sequence[RouteHop]


def swarm(seed: int) -> list[Announcement]:
    """Unequal nodes that have joined one after another, each where it was needed."""
    drawn, peers = dice(seed), list[Announcement]()
    while len(peers) < NODES or max_flow(peers) == 0.0:
        span = choose_span(peers, BLOCKS, CAPACITIES[pick(len(CAPACITIES), drawn)], drawn)
        speed = SPEEDS[pick(len(SPEEDS), drawn)] * (0.8 + 0.4 * drawn.random())
        peers.append(announce(len(peers) + 1, span, decode_speed=speed))
    return peers


def max_flow(peers: list[Announcement]) -> float:
    """Tokens per second at most: no set of blocks lets more through than its holders can compute.

    (Hall's condition; a bound that needs no solver where all 255 sets can be looked at.)
    """
    bound = float("inf")
    for chosen in list(product((False, True), repeat=BLOCKS))[1:]:
        blocks = set(compress(range(BLOCKS), chosen))
        speeds = (p.decode_speed for p in peers if any(block in held(p) for block in blocks))
        bound = min(bound, sum(speeds) / len(blocks))
    return bound


def held(peer: Announcement) -> Span:
    assert peer.span is not None
    return peer.span


def throughput(peers: list[Announcement], sessions: list[Hops]) -> float:
    """Tokens per second of all, where each node's speed is shared among its sessions.

    All get faster together; whoever goes through a node that is fully used gets no faster.
    """
    left = {peer.peer_id: peer.decode_speed for peer in peers}
    growing, total = list(sessions), 0.0
    while growing:
        use: Counter[str] = Counter()
        for hops in growing:
            use.update({hop.peer_id: len(hop.span) for hop in hops})
        step = min(left[peer] / blocks for peer, blocks in use.items())
        total += step * len(growing)
        left |= {peer: left[peer] - step * blocks for peer, blocks in use.items()}
        full = {peer for peer in use if left[peer] < 1e-9}
        growing = [hops for hops in growing if not any(hop.peer_id in full for hop in hops)]
    return total


class World:
    """Nodes that know what they carry, and originators that know what was announced before."""

    def __init__(self, seed: int) -> None:
        self.announced = swarm(seed)
        self.dice = dice(seed)
        self.sessions: list[Hops] = []
        self.now = 0.0
        self._carried = {peer.peer_id: peer for peer in self.announced}
        self._expected = {peer.peer_id: Expected() for peer in self.announced}

    def plan(self, candidates: Collection[Announcement]) -> Route:
        return plan_route(candidates, Span(0, BLOCKS), latency=lambda *_: 0.005, dice=self.dice)

    def ask(self, choice: Choice, originator: int) -> bool:
        """Let an originator ask whom it wants to; whether it wanted to."""
        asked = choice.to_ask()
        answers = []
        for hop in asked:
            peer, expected = self._carried[hop.peer_id], self._expected[hop.peer_id]
            load = peer.session_blocks + expected.blocks(self.now)
            answers.append(replace(peer, session_blocks=load))
            expected.asked(str(originator), len(hop.span), self.now)
        if asked:
            choice.heard(asked, answers)
        return bool(asked)

    def open(self, hops: Hops, originator: int) -> None:
        for hop in hops:
            peer = self._carried[hop.peer_id]
            load = peer.session_blocks + len(hop.span)
            self._carried[hop.peer_id] = replace(peer, session_blocks=load)
            self._expected[hop.peer_id].came(str(originator))
        self.sessions.append(hops)

    def used(self) -> float:
        """The share of what the swarm could give."""
        return throughput(self.announced, self.sessions) / max_flow(self.announced)


def one_after_another(world: World) -> None:
    for originator in range(ORIGINATORS):
        world.now = originator * STALE / ORIGINATORS
        choice = Choice(world.announced, world.plan)
        while world.ask(choice, originator):
            pass
        world.open(choice.route.hops, originator)


def at_the_same_moment(world: World) -> None:
    choices = {number: Choice(world.announced, world.plan) for number in range(ORIGINATORS)}
    while choices:
        for originator in sorted(choices, key=lambda _: world.dice.random()):
            if not world.ask(choices[originator], originator):
                world.open(choices.pop(originator).route.hops, originator)


def by_what_was_announced(world: World) -> None:
    for originator in range(ORIGINATORS):
        world.open(world.plan(world.announced).hops, originator)


@pytest.mark.parametrize("opening", [one_after_another, at_the_same_moment])
def test_together_they_use_what_the_swarm_has(opening: Callable[[World], None]) -> None:
    used = []
    for seed in SEEDS:
        world = World(seed)
        opening(world)
        used.append(world.used())
    assert mean(used) >= 0.8
    assert min(used) >= 0.6


def test_without_asking_they_would_crowd_on_the_fastest_chain() -> None:
    used = []
    for seed in SEEDS:
        world = World(seed)
        by_what_was_announced(world)
        used.append(world.used())
    assert mean(used) < 0.4


def test_the_bound_is_one_that_can_be_reached() -> None:
    halves = [announce(1, Span(0, 4)), announce(2, Span(4, 8)), announce(3, Span(0, 8))]
    assert max_flow(halves) == pytest.approx(300 / 8)
    world_of_one = [announce(1, Span(0, 8))]
    route = plan_route(world_of_one, Span(0, 8), latency=lambda *_: 0.0, dice=dice())
    assert throughput(world_of_one, [route.hops] * 5) == pytest.approx(max_flow(world_of_one))
