"""Whether to hold a round back for sessions that will be here in a moment.

Sessions that decode together come back one after another once their round has ended. Were the
first to come run alone at once, all others would wait for a whole pass over the weights, and two
groups would take turns for ever, at twice the cost. So a round waits for those that have been
coming back quickly: at most for half of what it costs to miss them.

A session is expected by its own habit. One that takes longer than that (its tokens go through
other hops, or somebody types) is not waited for, nor one that has been closed. Nobody is expected
back before it has come back once.

Of a session whose tokens are sampled on the thread of the rounds, and go nowhere else, only the
seconds count in which that thread was idle: while it runs a head, or a round of others, nothing is lost
by waiting for whom that work brings back.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass

from ..protocol.span import Span

_LONGEST = 0.05
"""Seconds, however long rounds are."""
_WORKING = 4
"""Times as long, if the thread works: work that goes on and on keeps nobody from a round."""
_WEIGHT = 0.3
"""Of a session's newest delay in its habit."""
_MARGIN = 2.0
"""Times its habitual delay, and"""
_JITTER = 0.002
"""seconds more, after which a session is no longer expected."""


@dataclass(slots=True)
class _Habit:
    span: Span
    left_at: float | None = None
    """When its last round ended; None while it waits or runs."""
    idle: float | None = None
    """How long the thread had been idle by then, if that is what counts."""
    delay: float | None = None
    """Average seconds until it is back that count; None until it was."""

    def gone(self, now: float, idle: float) -> float:
        """Seconds that count since its last round."""
        assert self.left_at is not None
        return now - self.left_at if self.idle is None else idle - self.idle


class Gathering:
    """The habits of the sessions that decode.

    ``now`` is in seconds of a clock as the schedule's; ``idle`` are the seconds for which the thread of
    the rounds has had nothing to do so far. Not thread-safe.
    """

    def __init__(self) -> None:
        self._habits: dict[Hashable, _Habit] = {}

    def left(self, session: Hashable, span: Span, now: float, idle: float | None = None) -> None:
        """A step of ``session`` was completed; ``idle`` is given if that is what counts."""
        habit = self._habits.setdefault(session, _Habit(span))
        habit.left_at, habit.idle = now, idle

    def came(self, session: Hashable, now: float, idle: float = 0.0) -> None:
        """A step of ``session`` was submitted."""
        habit = self._habits.get(session)
        if habit is None or habit.left_at is None:
            return
        delay = habit.gone(now, idle)
        if habit.delay is not None:
            delay = habit.delay + _WEIGHT * (delay - habit.delay)
        habit.delay, habit.left_at = delay, None

    def forget(self, session: Hashable) -> None:
        """``session`` was closed."""
        self._habits.pop(session, None)

    def wait(
        self, spans: Collection[Span], round_seconds: float, now: float, idle: float = 0.0
    ) -> float:
        """For how many seconds from ``now`` to hold back a round for one of ``spans``; 0: start.

        ``round_seconds`` is what a round costs whoever misses it.
        """
        patience = min(_LONGEST, round_seconds / 2)
        longest = 0.0
        for habit in self._habits.values():
            if habit.left_at is None or habit.delay is None or habit.span not in spans:
                continue
            if habit.delay < patience:
                left = min(patience, _MARGIN * habit.delay + _JITTER) - habit.gone(now, idle)
                most = _WORKING * patience - (now - habit.left_at)
                longest = max(longest, min(left, most))
        return longest
