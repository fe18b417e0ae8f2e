"""Who is in the next round: a machine without a clock, asked anew before every round.

A round takes the waiting one-row steps of all sessions for the same blocks, up to a bound, and a
piece of at most one longer step (a prefill). Whatever does not fit is chosen by

1. **priority**: a step of a better class goes first. Whoever is passed over moves up by one class
   for every period that it has waited, without end, so nobody starves;
2. **fairness**: within a class, originators take turns by the work that they have received, however
   many sessions they have. This is start-time fair queueing (Goyal, Vin, Cheng 1996): an originator
   that comes back or is new starts at the virtual time of what is being served, so it is neither
   paid for its absence nor punished for what it got while nobody else wanted it;
3. **age**: within an originator, the oldest first.

A node serves spans, and sessions may use a part of its blocks: rounds for different spans take
turns by the same three rules.
"""

import heapq
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

from ..protocol.span import Span
from .pace import Limits, Pace

_MAX_ACCOUNTS = 512
"""Originators remembered. Peers choose their names; a forgotten one starts as a new one does."""


class Priority(IntEnum):
    """Classes of steps; a smaller one goes first."""

    OWN = 0
    """This node's own sessions."""
    NORMAL = 1
    BACKGROUND = 2


@dataclass(slots=True, eq=False)
class Waiting:
    """A step, or what is left of it, as the schedule sees it."""

    session: Hashable
    """Only the oldest step of a session is ever shown to the schedule."""
    originator: str
    priority: Priority
    span: Span
    batch: int
    rows: int
    """Of the whole step, per sequence of the batch."""
    since: float
    """When it came, or when its last piece was taken."""
    done: int = 0
    """Rows that earlier rounds have taken."""


W = TypeVar("W", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Share(Generic[W]):
    """What a round computes of a step: the next ``rows`` rows of each sequence."""

    step: W
    rows: int


class _Turn(IntEnum):
    """What originators wait for, each for itself: who is served with one still waits for others."""

    LEAD = 0
    """To choose whose blocks a round is for."""
    SINGLE = 1
    LONGER = 2


@dataclass(slots=True)
class _Account:
    """What an originator has received."""

    work: float
    """Virtual time: rows times blocks, and where it started."""
    served_at: list[float] = field(default_factory=lambda: [-math.inf] * len(_Turn))
    """When it last had a turn of each kind."""


class Schedule:
    """Chooses rounds. ``now`` is in seconds of any clock that never goes back."""

    def __init__(self, limits: Limits, pace: Pace) -> None:
        self._limits = limits
        self._pace = pace
        self._accounts: dict[str, _Account] = {}
        self._present: set[str] = set()
        """Who had a step waiting at the last round."""
        self._virtual_time = 0.0

    def take(self, waiting: Sequence[W], now: float) -> list[Share[W]]:
        """The next round of ``waiting`` (not empty): all of one span, one-row steps first."""
        self._enter(waiting)
        span = waiting[0].span
        singles: list[W] = []
        longer: list[W] = []
        anchor: W | None = None
        if any(step.span != span for step in waiting):
            anchor = next(self._in_turn(_Turn.LEAD, waiting, now))
            self._accounts[anchor.originator].served_at[_Turn.LEAD] = now
            span = anchor.span
        for step in waiting:
            if step.span == span and step is not anchor:
                (longer if step.rows > 1 else singles).append(step)
        shares: list[Share[W]] = []
        starts: list[float] = []
        if anchor is not None and anchor.rows == 1:
            self._serve(Share(anchor, 1), now, shares, starts)
        self._take_singles(singles, now, shares, starts)
        prefill = anchor if anchor is not None and anchor.rows > 1 else None
        if prefill is None and longer:
            prefill = next(self._in_turn(_Turn.LONGER, longer, now))
        if prefill is not None:
            rows = self._pace.prefill_rows(prefill.session, len(span), now) // prefill.batch
            rows = min(prefill.rows - prefill.done, max(1, rows))
            self._serve(Share(prefill, rows), now, shares, starts)
        self._virtual_time = max(self._virtual_time, min(starts))
        return shares

    def _take_singles(
        self, singles: Sequence[W], now: float, shares: list[Share[W]], starts: list[float]
    ) -> None:
        """Add one-row steps to a round until it is full; a round takes one, however large."""
        taken = sum(share.step.batch for share in shares)
        everybody = taken + sum(step.batch for step in singles) <= self._limits.single_rows
        for step in singles if everybody else self._in_turn(_Turn.SINGLE, singles, now):
            if shares and taken + step.batch > self._limits.single_rows:
                return
            taken += step.batch
            self._serve(Share(step, 1), now, shares, starts)

    def _serve(
        self, share: Share[W], now: float, shares: list[Share[W]], starts: list[float]
    ) -> None:
        step = share.step
        account = self._accounts[step.originator]
        starts.append(account.work)
        account.work += share.rows * step.batch * len(step.span)
        account.served_at[_Turn.LONGER if step.rows > 1 else _Turn.SINGLE] = now
        if step.rows == 1:
            self._pace.decoded(step.session, now)
        shares.append(share)

    def _enter(self, waiting: Iterable[Waiting]) -> None:
        """Bring whoever comes anew to the virtual time."""
        present = {step.originator for step in waiting}
        for originator in present - self._present:
            account = self._accounts.get(originator)
            if account is None:
                self._accounts[originator] = _Account(self._virtual_time)
            else:
                account.work = max(account.work, self._virtual_time)
        self._present = present
        if len(self._accounts) > max(_MAX_ACCOUNTS, 2 * len(present)):
            self._accounts = {name: self._accounts[name] for name in present}

    def _in_turn(self, turn: _Turn, steps: Iterable[W], now: float) -> Iterator[W]:
        """All of ``steps``, by priority, fairness and age.

        One that is drawn is served before the next one is drawn.
        """
        queues: dict[str, list[W]] = {}
        for step in steps:
            queues.setdefault(step.originator, []).append(step)
        order = itertools.count()
        heap = []
        for originator, queue in queues.items():
            # Within an originator a step ages by its own wait; the next one is the last.
            queue.sort(key=lambda step: (self._class(step, step.since, now), step.since))
            queue.reverse()
            heap.append((self._rank(turn, originator, queue, now), next(order), originator))
        heapq.heapify(heap)
        while heap:
            _, _, originator = heapq.heappop(heap)
            queue = queues[originator]
            yield queue.pop()
            if queue:
                item = (self._rank(turn, originator, queue, now), next(order), originator)
                heapq.heappush(heap, item)

    def _rank(
        self, turn: _Turn, originator: str, queue: Sequence[Waiting], now: float
    ) -> tuple[int, float, float]:
        """Smaller goes first.

        Between originators a step ages only since the originator last had such a turn: the many
        that wait of one originator must not outrank the only one of another.
        """
        account = self._accounts[originator]
        served = account.served_at[turn]
        best = min(self._class(step, max(step.since, served), now) for step in queue)
        return best, account.work, queue[-1].since

    def _class(self, step: Waiting, since: float, now: float) -> int:
        return step.priority - int((now - since) / self._limits.ageing)
