"""The event heap: nodes come, load, serve, look, move, go; sessions open and end."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np

from .policies import Ours, Planned, Policy
from .population import GROWTH, NUM_BLOCKS, Population
from .routes import best_seconds, true_seconds
from .state import GONE, JOINING, MOVING, ONLINE, State

WARM_UP = GROWTH + 1800.0
"""Seconds until the first nodes have come and loaded."""
WAIT = 60.0
"""The longest wait before a node that should move asks again."""
SESSIONS_PER_NODE_HOUR = 0.15
SESSION_SECONDS = 600.0
MEASURED_SESSIONS = 200
"""Of all sessions about so many are compared with the best route."""


@dataclass
class Outcome:
    """What came of it, after the warm-up."""

    name: str
    times: list[float] = field(default_factory=list)
    """Hours, once a minute from the start."""
    covered: list[float] = field(default_factory=list)
    """Of all blocks."""
    bottleneck: list[float] = field(default_factory=list)
    """Of the bound: all speed that is online, spread evenly."""
    uncovered_seconds: float = 0.0
    moves: int = 0
    node_hours: float = 0.0
    latency: list[float] = field(default_factory=list)
    """A token's time, of the best."""
    planning: list[float] = field(default_factory=list)
    sessions: int = 0
    without_route: int = 0
    dead_hops: int = 0
    nodes: list[int] = field(default_factory=list)

    def settled(self, values: Sequence[float]) -> list[float]:
        """Those of a series that come after the warm-up."""
        return [
            value for time, value in zip(self.times, values, strict=True) if time * 3600 >= WARM_UP
        ]


class Simulation:
    """One swarm under one policy."""

    def __init__(
        self,
        population: Population,
        make_policy: Callable[[State, random.Random, np.random.Generator], Policy],
        *,
        hours: float,
        seed: int,
    ) -> None:
        self._people = population
        self._end = hours * 3600
        self._dice = random.Random(seed)
        self.state = State(population)
        self.policy = make_policy(self.state, self._dice, np.random.default_rng(seed))
        self.outcome = Outcome(self.policy.name)
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._counts = np.zeros(NUM_BLOCKS, dtype=np.int64)
        self._gap_since: float | None = None
        first = int((population.comes <= GROWTH).sum())
        per_hour = first * SESSIONS_PER_NODE_HOUR
        self._session_interval = 3600 / per_hour
        expected = per_hour * max(0.0, self._end - WARM_UP) / 3600
        self._measured_share = min(1.0, MEASURED_SESSIONS / max(1.0, expected))

    def run(self) -> Outcome:
        for node in range(len(self._people)):
            self._at(self._people.comes[node], partial(self._come, node))
        self._at(60.0, self._minute)
        self._at(WARM_UP, lambda _: self.policy.traffic.reset())
        self._at(WARM_UP, self._session)
        while self._heap:
            now, _, event = heapq.heappop(self._heap)
            if now > self._end:
                break
            event(now)
        self._note_gap(self._end, gap=False)
        return self.outcome

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._heap, (float(time), next(self._order), event))

    def _come(self, node: int, now: float) -> None:
        self.state.start[node] = self.policy.join(node, now)
        self._become(node, JOINING, now)
        self._at(now + self._people.loading[node], lambda then: self._loaded(node, then))
        self._at(self._people.goes[node], lambda then: self._go(node, then))

    def _loaded(self, node: int, now: float) -> None:
        if self.state.status[node] == GONE:
            return
        first = self.state.status[node] == JOINING
        self._become(node, ONLINE, now)
        if first:
            self._look_later(node, now)

    def _go(self, node: int, now: float) -> None:
        if self._people.crashes[node]:
            self.state.died[node] = now
        self._become(node, GONE, now)

    def _look_later(self, node: int, now: float) -> None:
        interval = self.policy.look_interval(now)
        self._at(now + interval * self._dice.uniform(0.5, 1.5), lambda then: self._look(node, then))

    def _look(self, node: int, now: float) -> None:
        if self.state.status[node] == GONE:
            return
        if self.state.status[node] == ONLINE and self.policy.look(node, now) is not None:
            wait = self._dice.uniform(0, min(WAIT, self.policy.look_interval(now)))
            self._at(now + wait, lambda then: self._decide(node, then))
        self._look_later(node, now)

    def _decide(self, node: int, now: float) -> None:
        if self.state.status[node] != ONLINE:
            return
        start = self.policy.look(node, now)
        if start is None:
            return
        self._become(node, MOVING, now)
        self.state.start[node] = start
        self.policy.changed(node)
        self._at(now + self._people.loading[node], lambda then: self._loaded(node, then))
        self.outcome.moves += now >= WARM_UP

    def _become(self, node: int, status: int, now: float) -> None:
        before = self.state.status[node]
        self.state.status[node] = status
        self.policy.changed(node)
        change = int(status == ONLINE) - int(before == ONLINE)
        if change:
            start = self.state.start[node]
            self._counts[start : start + self._people.length[node]] += change
            self._note_gap(now, gap=bool(self._counts.min() == 0))

    def _note_gap(self, now: float, *, gap: bool) -> None:
        if gap and self._gap_since is None:
            self._gap_since = now
        elif not gap and self._gap_since is not None:
            self.outcome.uncovered_seconds += max(0.0, now - max(WARM_UP, self._gap_since))
            self._gap_since = None

    def _session(self, now: float) -> None:
        self._at(now + self._dice.expovariate(1 / self._session_interval), self._session)
        there = self.state.there()
        originator = int(there[self._dice.randrange(len(there))])
        compare = self._dice.random() < self._measured_share
        self.outcome.sessions += 1
        if not isinstance(self.policy, Ours):
            if compare:
                self._compare_star(originator)
            return
        planned = self.policy.plan(originator, now)
        if planned is None:
            self.outcome.without_route += 1
            return
        self.outcome.planning.append(planned.planning_seconds)
        self.outcome.dead_hops += planned.dead_hops
        if compare:
            best = best_seconds(self.state, self.state.online(), originator)
            seconds = true_seconds(self.state, planned.route, planned.numbers, originator)
            self.outcome.latency.append(seconds / best)
        self._load(planned, 1)
        lasting = self._dice.expovariate(1 / SESSION_SECONDS)
        self._at(now + lasting, lambda _: self._load(planned, -1))

    def _compare_star(self, originator: int) -> None:
        online = self.state.online()
        best = best_seconds(self.state, online, originator)
        star = best_seconds(self.state, online, originator, star=True)
        if np.isfinite(star):
            self.outcome.latency.append(star / best)
        else:
            self.outcome.without_route += 1

    def _load(self, planned: Planned, change: int) -> None:
        for node, hop in zip(planned.numbers, planned.route.hops, strict=True):
            self.state.session_blocks[node] += change * len(hop.span)
            self.policy.changed(node)

    def _minute(self, now: float) -> None:
        self._at(now + 60, self._minute)
        self.policy.minute(now)
        online = self.state.online()
        throughput = self.state.throughput(online)
        bound = float(self._people.speed[online].sum()) / NUM_BLOCKS
        self.outcome.times.append(now / 3600)
        self.outcome.covered.append(float((self._counts > 0).mean()))
        self.outcome.bottleneck.append(max(0.0, float(throughput.min())) / bound if bound else 0.0)
        self.outcome.nodes.append(len(self.state.there()))
        if now >= WARM_UP:
            self.outcome.node_hours += len(online) / 60
