"""Two ways to organise a swarm: petals-node's own, and Petals' as its paper and code have it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from petals.node.membership import INDEX_WRITERS
from petals.protocol.announcement import REGION_BLOCKS, Announcement, PeerState
from petals.protocol.errors import NoRoute
from petals.protocol.placement import (
    Placed,
    choose_span,
    choose_span_by,
    placed,
    should_level,
    should_move,
)
from petals.protocol.routing import LatencyEstimates, Route, plan_by_places, plan_route
from petals.protocol.span import Span
from petals.protocol.tally import Totals
from petals.protocol.upkeep import Upkeep, sampled, upkeep

from .announcing import announcement, entry_bytes, peer_id
from .places import Places
from .population import NUM_BLOCKS, Floats, Ints
from .records import (
    HOLDERS,
    QUESTION_BYTES,
    REGIONS,
    Records,
    Traffic,
    lookup_bytes,
    lookups_of_a_write,
    record_bytes,
    sums_bytes,
    write_bytes,
)
from .state import JOINING, MOVING, ONLINE, State

SNAPSHOT = 10.0
"""Seconds for which nodes that read at nearly the same time get to see the same."""
COUNTED = 2.0
"""The same for what holders have counted: an announcement takes a second, and their sums hold for one."""
MEASURING_BYTES = 4 * 2500 / 30
"""A second: four peers in half a minute, with a handshake each (``node/latency.py``)."""
SETTLING_MINUTES = (3, 15)
"""In which all nodes look for their places once more, a share of them each minute: while all are new, and
then. Real ones do so every half minute."""
NEW_MINUTES = 60
TRIES = 5
"""Of an originator whose hops turn out to be dead."""


@dataclass
class Planned:
    """A route, by nodes' numbers, and how long planning took."""

    route: Route
    numbers: list[int]
    planning_seconds: float
    dead_hops: int


class Policy(Protocol):
    """What decides where nodes go."""

    name: str
    traffic: Traffic

    def join(self, node: int, now: float) -> int: ...

    def look(self, node: int, now: float) -> int | None:
        """Where a node should move, if anywhere."""
        ...

    def look_interval(self, now: float) -> float: ...

    def changed(self, node: int) -> None: ...

    def minute(self, now: float) -> None:
        """A minute has passed: count what nodes have sent in it, whatever happened."""
        ...


class Ours:
    """protocol/placement.py, routing.py and upkeep.py, on what a node can know."""

    name = "petals-node"

    def __init__(self, state: State, dice: random.Random, numbers: np.random.Generator) -> None:
        self.traffic = Traffic()
        self.placement_seconds: list[float] = []
        self._state = state
        self._dice = dice
        self._records = Records(state, numbers)
        self._places = Places(state.population, dice)
        self._said: dict[int, Announcement] = {}
        self._numbers = {peer_id(node): node for node in range(len(state.population))}
        self._upkeep = upkeep(0)
        self._known = 0
        self._sizes = [0.0]
        self._snapshot: tuple[float, Ints] = (-1e9, np.zeros(0, dtype=np.int64))
        self._placement: tuple[float, list[Announcement], list[Placed]] = (0.0, [], [])
        self._sampled = False
        self._totals: tuple[float, Totals] = (-1e9, Totals((), ()))
        self._read_at: dict[int, float] = {}
        self._minutes = 0

    @property
    def upkeep(self) -> Upkeep:
        return self._upkeep

    def changed(self, node: int) -> None:
        self._said.pop(node, None)

    def look_interval(self, now: float) -> float:
        self._regions(now)
        return self._upkeep.look_interval

    def join(self, node: int, now: float) -> int:
        said, _ = self._placement_view(now)
        length = int(self._state.population.length[node])
        self._read_regions(now)  # as every node does when it starts
        there = self._state.there()
        if len(there) > 0:
            self._places.find(node, there)
        if self._sampled:
            totals = self._read_totals(now)
            return choose_span_by(totals.serving, totals.loading, length, self._dice).start
        return choose_span(said, NUM_BLOCKS, length, self._dice).start

    def look(self, node: int, now: float) -> int | None:
        _, nodes = self._placement_view(now)
        (own,) = placed([self._says(node)], NUM_BLOCKS)
        if self._sampled:
            # who holds the records was looked up too long ago
            self.traffic.reading += REGIONS * lookup_bytes(len(self._state.there()))
            throughput = self._read_totals(now).throughput
            began = time.process_time()
            move = should_level(own, throughput, len(own.span))
        else:
            first_gone = self._upkeep.time_to_live - self._upkeep.announce_interval
            if self._upkeep.refresh_interval > first_gone:  # what it has read has expired
                self._read_regions(now)
            others = [other for other in nodes if other.peer_id != peer_id(node)]
            began = time.process_time()
            move = should_move(own, others, NUM_BLOCKS, len(own.span))
        self.placement_seconds.append(time.process_time() - began)
        return None if move is None else move.span.start

    def plan(self, originator: int, now: float) -> Planned | None:
        """A route, by an originator that has read the regions lately, or does so now."""
        if now - self._read_at.get(originator, -1e9) > self._upkeep.time_to_live:
            self._read_at[originator] = now
            self._read_regions(now)
        seen = [int(node) for node in self._regions(now) if node != originator]
        candidates = [said for node in seen if (said := self._says(node)).state is PeerState.ONLINE]
        if self._state.status[originator] == ONLINE:
            candidates.append(self._says(originator))
        measured = {**self._places.round_trips(originator), peer_id(originator): 0.0}
        own = self._places.of(originator)
        dead: set[str] = set()
        for _ in range(TRIES):
            began = time.process_time()
            try:
                route = plan_by_places(
                    candidates,
                    partial(self._route, dead),
                    measured=measured,
                    own=own,
                    dice=self._dice,
                )
            except NoRoute:
                return None
            seconds = time.process_time() - began
            numbers = [self._numbers[hop.peer_id] for hop in route.hops]
            gone = {peer_id(node) for node in numbers if self._state.status[node] != ONLINE}
            if not gone:
                return Planned(route, numbers, seconds, len(dead))
            dead |= gone
        return None

    def _route(
        self, dead: set[str], peers: Sequence[Announcement], latency: LatencyEstimates
    ) -> Route:
        whole = Span(0, NUM_BLOCKS)
        return plan_route(peers, whole, latency=latency, dice=self._dice, exclude=dead)

    def minute(self, now: float) -> None:
        self._regions(now)
        self._settle()
        there = len(self._state.there())
        interval = self._upkeep.announce_interval
        touched = sum(self._touching()) / max(1, there)
        listed = 2 * min(1.0, INDEX_WRITERS / max(1, self._known))
        write = write_bytes(there, entry_bytes(self._upkeep.round_trips))
        write += lookups_of_a_write(
            there, interval, self._state.population.churn / 3600
        ) * lookup_bytes(there)
        self.traffic.announcing += 60 / interval * there * (touched + listed) * write
        self.traffic.measuring += 60 * MEASURING_BYTES * there
        for _ in range(round(60 / self._upkeep.refresh_interval * there)):
            self._read_regions(now)

    def _settle(self) -> None:
        """A share of all nodes looks for its place once more."""
        self._minutes += 1
        share = SETTLING_MINUTES[self._minutes > NEW_MINUTES]
        for node in self._state.there()[self._minutes % share :: share]:
            self._places.settle(int(node))
            self.changed(int(node))

    def busiest_holder(self, seconds: float) -> tuple[float, float]:
        """Bytes per second that a holder of the busiest region takes in, and gives out."""
        writes = max(self._touching()) / self._upkeep.announce_interval
        share = max(self._sizes) / max(1.0, sum(self._sizes))
        # a reading asks each holder of a region for its whole record
        out = self.traffic.record_bytes_read * share / HOLDERS / seconds
        return writes * (entry_bytes(self._upkeep.round_trips) + 2 * QUESTION_BYTES), out

    def _touching(self) -> list[int]:
        """How many nodes write to each region."""
        there = self._state.there()
        first = self._state.start[there] // REGION_BLOCKS
        last = (
            self._state.start[there] + self._state.population.length[there] - 1
        ) // REGION_BLOCKS
        return [int(((first <= region) & (region <= last)).sum()) for region in range(REGIONS)]

    def _read_regions(self, now: float) -> None:
        self._regions(now)
        there = len(self._state.there())
        entry = entry_bytes(self._upkeep.round_trips)
        records = sum(record_bytes(there, size, entry) for size in self._sizes)
        self.traffic.reading += records + REGIONS * lookup_bytes(there)
        self.traffic.record_bytes_read += records

    def _read_totals(self, now: float) -> Totals:
        there = len(self._state.there())
        self.traffic.reading += REGIONS * sums_bytes(there)  # of holders known by reading regions
        return self.counted(now)

    def counted(self, now: float) -> Totals:
        """What the holders of records have counted, as it is known at about this time."""
        if now - self._totals[0] >= COUNTED:
            self._totals = now, self._records.totals(now, self._upkeep)
        return self._totals[1]

    def _says(self, node: int) -> Announcement:
        said = self._said.get(node)
        if said is None:
            people, state = self._state.population, self._state
            start = int(state.start[node])
            said = self._said[node] = announcement(
                peer_id(node),
                start,
                start + int(people.length[node]),
                float(people.speed[node]),
                int(state.session_blocks[node]),
                online=state.status[node] not in (JOINING, MOVING),
                coordinate=self._places.of(node),
            )
        return said

    def _placement_view(self, now: float) -> tuple[list[Announcement], list[Placed]]:
        """What those who look at about this time see in the regions."""
        seen = self._regions(now)
        if self._placement[0] != self._snapshot[0]:
            said = [self._says(int(node)) for node in seen]
            self._sampled = sampled(said, NUM_BLOCKS)
            # whom nobody compares need not be placed
            self._placement = (
                self._snapshot[0],
                said,
                [] if self._sampled else placed(said, NUM_BLOCKS),
            )
        return self._placement[1:]

    def _regions(self, now: float) -> Ints:
        at, seen = self._snapshot
        if now - at >= SNAPSHOT:
            seen, self._sizes = self._records.regions(now, self._upkeep)
            self._snapshot = now, seen
            self._known = len(seen)
            self._upkeep = upkeep(self._known)
        return seen


class Petals:
    """The rules of arXiv 2312.08361 and of Petals 2.2's block_selection.py.

    Joining: the run whose throughputs, sorted, are the least. Rebalancing, every two minutes on
    average: if the throughput of the weakest block is under ``QUALITY`` of what it would be after
    all servers had moved one after another until nobody wants to, move. Every server sees all of
    them as they are now, and at no cost, which is kinder than the DHT is. That "after all" takes
    seconds of computing and comes out nearly the same for everybody, so one server works it out for
    all, every half hour.
    """

    name = "Petals' rules"
    QUALITY = 0.75
    CHECK_PERIOD = 120.0
    WORKED_OUT = 1800.0
    MAX_PASSES = 3

    def __init__(self, state: State, dice: random.Random, numbers: np.random.Generator) -> None:
        self.traffic = Traffic()
        self._state = state
        self._dice = dice
        self._numbers = numbers
        self._worked_out = (-1e9, 0.0)
        self._now_throughput: tuple[float, Floats] = (-1.0, np.zeros(NUM_BLOCKS))

    def changed(self, node: int) -> None:  # noqa: ARG002 - the protocol's
        self._now_throughput = (-1.0, self._now_throughput[1])

    def minute(self, now: float) -> None:
        pass

    def look_interval(self, now: float) -> float:  # noqa: ARG002 - the protocol's
        return self.CHECK_PERIOD

    def join(self, node: int, now: float) -> int:
        return best_start(self._throughput(now), int(self._state.population.length[node]))

    def look(self, node: int, now: float) -> int | None:
        throughput = self._throughput(now)
        least = float(throughput.min())
        if least >= self.QUALITY * self._reachable(now):
            return None
        start, length = int(self._state.start[node]), int(self._state.population.length[node])
        without = throughput.copy()
        without[start : start + length] -= self._state.share[node] * (1 + 1e-3)
        if least > 1e-3 and without.min() <= 0:
            return None  # it would leave a gap
        there = best_start(without, length)
        return None if there == start else there

    def _throughput(self, now: float) -> Floats:
        at, throughput = self._now_throughput
        if at < 0:
            throughput = self._state.throughput(self._state.there())
            self._now_throughput = (now, throughput)
        return throughput

    def _reachable(self, now: float) -> float:
        at, reachable = self._worked_out
        if now - at < self.WORKED_OUT:
            return reachable
        nodes = self._state.there()
        throughput = self._state.throughput(nodes)
        starts, lengths = self._state.start[nodes].copy(), self._state.population.length[nodes]
        shares = self._state.share[nodes]
        for _ in range(self.MAX_PASSES):
            moved = False
            for number in self._numbers.permutation(len(nodes)):
                start, length, share = int(starts[number]), int(lengths[number]), shares[number]
                throughput[start : start + length] -= share
                there = best_start(throughput, length)
                throughput[there : there + length] += share
                starts[number] = there
                moved |= there != start
            if not moved:
                break
        reachable = float(throughput.min())
        self._worked_out = now, reachable
        return reachable


class PetalsReading(Petals):
    """The same rules by what our nodes read, at the same cost: what the holders of records have counted.

    It is some seconds old, and whoever has died counts until it expires.
    """

    name = "Petals' rules, reading as we do"

    def __init__(self, state: State, dice: random.Random, numbers: np.random.Generator) -> None:
        super().__init__(state, dice, numbers)
        self._view = Ours(state, dice, numbers)

    def minute(self, now: float) -> None:
        self._view.look_interval(now)  # so that it knows how large the swarm is

    def _throughput(self, now: float) -> Floats:
        return np.array(self._view.counted(now).throughput)


def best_start(throughput: Floats, length: int) -> int:
    """The start of the run whose throughputs, sorted, come first."""
    least = np.flatnonzero(throughput == throughput.min())
    last = NUM_BLOCKS - length
    starts = range(max(0, int(least[0]) - length + 1), min(last, int(least[-1])) + 1)
    return min(starts, key=lambda start: np.sort(throughput[start : start + length]).tolist())
