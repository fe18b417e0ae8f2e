"""The best ring of peers through a run of blocks.

A route is a shortest path. Its cost adds up, hop by hop, the latency from the hop before it, what a
step waits there for those of other sessions, and the time that its peer takes for the blocks used;
and at the end the latency to where the last hop sends its output.

Rules of this file:

* A hop may use any part of a peer's span. A peer is on a route at most once.
* Whether a candidate fits (model, dtype, state, cache) is for ``Swarm.candidates`` to say.
* At most ``MAX_CANDIDATES`` peers are considered for each block, so that planning costs the same
  in a swarm of a hundred nodes and of ten thousand.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain, groupby

from .announcement import Announcement
from .coordinates import Coordinate
from .dice import Dice
from .errors import NoRoute
from .shortest_path import Costs, shortest_path
from .span import Span, gaps
from .watch import Pace

MAX_CANDIDATES = 16
MAX_LOOKED_AT = 400
"""Peers, and some, that are looked at closely. More than this are known in large swarms only."""
OTHERS_LOOKED_AT = 0.0625
"""Of those that are no good at a glance: there may be blocks that nobody else serves, and many originators."""
DEFAULT_LATENCY = 0.05
"""Seconds one way between two peers of whom nothing is known: the middle of the Internet's."""
SURE = 0.4
"""The relative error that a peer may see in its coordinate for it to be of use."""
RELAY_SECONDS = 0.05
"""What each way over a relay costs on top: as much as another hop across the Internet. A measured
round trip has the detour in it, but neither the relay's bandwidth, which others share, nor that one
more machine can fail."""
NOMINAL_SPEED = 100.0
"""Tokens per second through one block, of a peer that has not measured its own: a slow one."""
LOAD_PER_BLOCK = 0.5
"""What a block that an open session runs at the peer adds to a step there, in times of that block
alone. Half of it is the wait for that session: they share each read of the weights, and most of them
wait for somebody most of the time. As much again is what that session will wait for us: originators
who count the cost to others spread as is best for all (the marginal price, as on roads)."""
FAILURE_SECONDS = 0.05
"""What it costs to go through a peer for each time that it failed us lately: as much as another
hop across the Internet. A recovery costs more, but a past failure is no certain one."""
MAX_FAILURES = 20
"""Beyond, a peer is at the end of any ranking."""
THROUGHPUT_LATENCY = 0.05
"""The weight of latency when throughput is wanted: many rows are under way at once, so it is paid
once for many, and still decides between peers of equal speed."""

_NOTHING: Mapping[str, float] = {}
_Candidate = tuple[Announcement, int, int]
"""A peer, and the first and the end of the blocks that it could run."""
Latency = Callable[[str | None, str | None], float]
"""Estimated seconds one way from one peer to another; None is the originator."""


class Objective(StrEnum):
    """What a route is to be best at."""

    LATENCY = "latency"
    """The shortest time around the ring: one person waits for the next token."""
    THROUGHPUT = "throughput"
    """The least machine time for a row: many rows are under way."""


@dataclass(frozen=True, slots=True)
class RouteHop:
    """A peer and the blocks that it is to run."""

    peer_id: str
    multiaddrs: tuple[str, ...]
    span: Span
    pace: Pace = field(default_factory=Pace, repr=False, compare=False)
    """What it has announced of its speed for these blocks, the way to it included."""


@dataclass(frozen=True, slots=True)
class Route:
    """Hops whose spans follow one another, and the estimated seconds around them."""

    hops: tuple[RouteHop, ...]
    cost: float

    def __str__(self) -> str:
        return " → ".join(f"{hop.peer_id[-6:]} [{hop.span}]" for hop in self.hops)


@dataclass(frozen=True, slots=True)
class LatencyEstimates:
    """One-way latencies from round trips that we measured and that peers announced.

    Call it with two peer ids (None: the originator). What neither end has measured follows from where
    both say that they are, or else from our own distances to both, or is taken to be
    ``DEFAULT_LATENCY``; a peer is at no distance from itself.
    """

    measured: Mapping[str, float] = field(default_factory=dict)
    """Round trips from this node, in seconds, by peer id."""
    announced: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For each peer, the round trips from it, in seconds, by peer id."""
    relayed: frozenset[str] = frozenset()
    """Peers that can be reached through relays only."""
    coordinates: Mapping[str | None, Coordinate] = field(default_factory=dict)
    """Of those that are sure enough of theirs, by peer id; None: ours."""

    @classmethod
    def of(
        cls,
        candidates: Iterable[Announcement],
        measured: Mapping[str, float] | None = None,
        own: Coordinate | None = None,
    ) -> "LatencyEstimates":
        """Estimates from what announcements say of round trips and places, and from our own."""
        announced: dict[str, Mapping[str, float]] = {}
        relayed: list[str] = []
        places: dict[str | None, Coordinate] = {}
        if own is not None and own.error <= SURE:
            places[None] = own
        for peer in candidates:  # in one go: there may be thousands
            place = peer.coordinate
            if place is not None and place.error <= SURE:
                places[peer.peer_id] = place
            if peer.round_trips:
                announced[peer.peer_id] = peer.round_trips
            if peer.relayed:
                relayed.append(peer.peer_id)
        return cls(measured or {}, announced, frozenset(relayed), places)

    def __call__(self, sender: str | None, receiver: str | None) -> float:
        """The estimated seconds one way."""
        if sender == receiver:
            return 0.0
        # in one piece, because planning asks for thousands
        round_trip = None
        if sender is None or receiver is None:
            round_trip = self.measured.get(sender or receiver or "")
        elif self.announced:  # nobody announces any in a large swarm
            round_trip = self.announced.get(sender, _NOTHING).get(receiver)
            if round_trip is None:
                round_trip = self.announced.get(receiver, _NOTHING).get(sender)
        if round_trip is None:
            here, there = self.coordinates.get(sender), self.coordinates.get(receiver)
            if here is not None and there is not None:
                round_trip = here.distance(there)
            else:
                round_trip = self._by_way_of_us(sender, receiver)
        # who sends has dialled, except the last hop: it answers on the originator's stream to it
        dialled = sender if receiver is None else receiver
        return round_trip / 2 + (RELAY_SECONDS if dialled in self.relayed else 0.0)

    def _by_way_of_us(self, sender: str | None, receiver: str | None) -> float:
        # as if they stood at a right angle, seen from us: two that are near to us are near to each
        # other, one near and one far are far, and of two that are far too little is known
        there, back = self.measured.get(sender or ""), self.measured.get(receiver or "")
        return 2 * DEFAULT_LATENCY if there is None or back is None else math.hypot(there, back)


def block_seconds(peer: Announcement, objective: Objective = Objective.LATENCY) -> float:
    """The time that ``peer`` takes for one row through one block, alone."""
    speed = peer.decode_speed if objective is Objective.LATENCY else peer.prefill_speed
    return 1 / (speed or NOMINAL_SPEED)


def load_seconds(peer: Announcement, objective: Objective = Objective.LATENCY) -> float:
    """What the sessions at ``peer`` add to a step there, whatever blocks it is for."""
    return LOAD_PER_BLOCK * peer.session_blocks * block_seconds(peer, objective)


def plan_route(
    candidates: Iterable[Announcement],
    span: Span,
    *,
    latency: Latency,
    dice: Dice,
    exclude: Collection[str] = (),
    failures: Callable[[str], int] = lambda _: 0,
    objective: Objective = Objective.LATENCY,
    source: str | None = None,
    sink: str | None = None,
    model_name: str = "the model",
) -> Route:
    """The cheapest route through the blocks of ``span``; peers with ``failures`` are dearer.

    It leads from ``source`` to ``sink``: None is the originator, and a recovery names the hops
    that have survived before and behind the gap. Peers in ``exclude`` are not used, neither are
    those two. Raises NoRoute with the blocks that no candidate serves.
    """
    seen = list(candidates)
    useful = _useful(seen, span, {source, sink, *exclude})
    costs = _costs(useful, len(span), latency, dice, failures, objective, source, sink)
    if not all(costs.holders):
        missing = gaps([Span(start, end) for _, start, end in useful], len(span))
        raise no_route(
            model_name,
            [Span(gap.start + span.start, gap.end + span.start) for gap in missing],
            len(seen),
        )
    path = shortest_path(costs)
    hops: list[RouteHop] = []
    before, start = source, span.start
    for number, run in groupby(path):
        peer, end = useful[number][0], start + len(list(run))
        pace = _pace(peer, end - start, latency(before, peer.peer_id))
        hops.append(RouteHop(peer.peer_id, peer.multiaddrs, Span(start, end), pace))
        before, start = peer.peer_id, end
    return Route(tuple(hops), costs.total(path))


def _pace(peer: Announcement, blocks: int, latency: float) -> Pace:
    row = blocks * block_seconds(peer, Objective.THROUGHPUT)
    return Pace(latency + load_seconds(peer) + blocks * block_seconds(peer), row)


def no_route(model_name: str, missing: Sequence[Span], peers_seen: int) -> NoRoute:
    """The error that says which blocks nobody serves, and what to do about it."""
    blocks = " and ".join(str(gap) for gap in missing)
    nodes = " and ".join(f"--blocks {gap}" for gap in missing)
    peers = "1 peer" if peers_seen == 1 else f"{peers_seen} peers"
    return NoRoute(
        f"blocks {blocks} of {model_name} are served by nobody ({peers} seen); "
        f"start a node with {nodes}, or wait for one",
        missing=missing,
    )


def plan_by_places(
    candidates: Iterable[Announcement],
    plan: Callable[[Sequence[Announcement], LatencyEstimates], Route],
    *,
    measured: Mapping[str, float],
    own: Coordinate,
    dice: Dice,
    source: str | None = None,
    sink: str | None = None,
) -> Route:
    """``plan`` with estimates of the latencies, among the best at a glance where there are thousands.

    Raises NoRoute as ``plan`` does when it is given all of them.
    """
    seen = list(candidates)
    if len(seen) > MAX_LOOKED_AT:
        ends = {peer.peer_id: peer for peer in seen if peer.peer_id in (source, sink)}
        here = own if source is None else ends[source].coordinate if source in ends else None
        promising = _promising(seen, here, dice)
        latency = LatencyEstimates.of([*promising, *ends.values()], measured, own)
        with suppress(NoRoute):
            return plan(promising, latency)
    return plan(seen, LatencyEstimates.of(seen, measured, own))


def _promising(
    peers: Sequence[Announcement], here: Coordinate | None, dice: Dice
) -> list[Announcement]:
    """Of very many, those to look at closely: the best at a glance, and some of the others.

    All of them are looked at once, and no more of each than it takes: they come from memory, not from
    a cache, which takes longer than computing.
    """
    here = here or Coordinate()
    sure, dist = here.error <= SURE, math.dist
    scores = [
        (
            (
                2 * DEFAULT_LATENCY
                if not sure or (there := peer.coordinate) is None
                else dist(here.position, there.position) + here.height + there.height
            )
            * speed
            + LOAD_PER_BLOCK * peer.session_blocks
        )
        / (speed * (span.end - span.start))
        + 1 / speed
        if (span := peer.span) is not None and (speed := peer.decode_speed or NOMINAL_SPEED)
        else math.inf
        for peer in peers
    ]
    most = sorted(scores)[MAX_LOOKED_AT]
    random = dice.random
    return [
        peer
        for peer, score in zip(peers, scores, strict=True)
        if score <= most or random() < OTHERS_LOOKED_AT
    ]


def _useful(
    peers: Iterable[Announcement], span: Span, unusable: Collection[str | None]
) -> list[_Candidate]:
    """Those that hold blocks of ``span``; runs of blocks count from its start."""
    first, last = span.start, span.end
    return [
        (peer, max(held.start, first) - first, min(held.end, last) - first)
        for peer in peers
        if (held := peer.span) is not None
        and held.start < last
        and held.end > first
        and peer.peer_id not in unusable
    ]


def _costs(
    useful: Sequence[_Candidate],
    num_blocks: int,
    latency: Latency,
    dice: Dice,
    failures: Callable[[str], int],
    objective: Objective,
    source: str | None,
    sink: str | None,
) -> Costs:
    """What the search needs to know; blocks count from the start of ``span``."""
    weight = 1.0 if objective is Objective.LATENCY else THROUGHPUT_LATENCY
    ids = [peer.peer_id for peer, _, _ in useful]
    seconds, entry, risk, scores = [], [], [], []
    for peer, start, end in useful:
        alone = block_seconds(peer, objective)
        dearer = LOAD_PER_BLOCK * peer.session_blocks * alone
        if failed := failures(peer.peer_id):
            dearer += FAILURE_SECONDS * min(failed, MAX_FAILURES)
        way_in = weight * latency(source, peer.peer_id) + dearer
        way_out = way_in if sink == source else weight * latency(peer.peer_id, sink)
        seconds.append(alone)
        risk.append(dearer)
        entry.append(way_in)
        # what a block costs at a peer if the route goes there and uses all that it has
        scores.append(alone + (way_in + way_out) / (end - start))
    holders: list[list[int]] = [[] for _ in range(num_blocks)]
    room = num_blocks * MAX_CANDIDATES
    for number in _by_rank(scores, dice):
        _, start, end = useful[number]
        for block_holders in holders[start:end]:
            if len(block_holders) < MAX_CANDIDATES:
                block_holders.append(number)
                room -= 1
        if room == 0:
            break

    leave = {number: weight * latency(ids[number], sink) for number in holders[-1]}

    def between(sender: int, receiver: int) -> float:
        return weight * latency(ids[sender], ids[receiver]) + risk[receiver]

    return Costs(holders, seconds, entry, leave, between)


def _by_rank(scores: Sequence[float], dice: Dice) -> list[int]:
    """The order in which peers are considered: the best one, one drawn, the next best one, ….

    The best alone would leave out whoever is good for a few blocks only, and would send all
    originators to the same few. One order for all blocks, so that a peer that is considered for
    one block is seldom left out at the next.
    """
    # smallest first, exponential variables with these means are draws with weights 1 / score²
    random, log = dice.random, math.log
    waits = [-log(1 - random()) * score * score for score in scores]
    drawn = sorted(range(len(scores)), key=waits.__getitem__)
    # equals stay in the order in which they were drawn, so that originators do not all take the same
    best_first = sorted(drawn, key=scores.__getitem__)
    return list(dict.fromkeys(chain.from_iterable(zip(best_first, drawn, strict=True))))
