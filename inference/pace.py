"""How long rounds take, and what follows: how much prefill fits into one.

A session that decodes waits, at worst, for the end of a round that began without it, and then for
the round that it is in. So the prefill in two rounds may take what the stall budget leaves beside
the decoding rows. The costs are averages of the engine's own rounds: they follow the machine's
speed, the length of contexts and the number of sessions.
"""

from collections.abc import Hashable
from dataclasses import dataclass

_WEIGHT = 0.5
"""Of the newest measurement of a prefill row; costs per row rise with the context."""
_SINGLES_WEIGHT = 0.3
_MOST = 0.75
"""Of the stall budget, for a piece beside decoding rows that alone take it all."""
_TILE = 8
"""Pieces are of a multiple of so many rows, and of no fewer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a round. Rows are counted over all sequences of a batch."""

    single_rows: int = 64
    """One-row steps that share a round; beyond that, weights are no longer what a round costs."""
    prefill_rows: int = 512
    """Rows of a longer step in one round when nobody else decodes: enough for full speed."""
    least_prefill_rows: int = 16
    """The same when rounds alone take the stall budget, if so many rows don't take most of it again."""
    stall: float = 0.1
    """Seconds that prefills may add to the time between two tokens of somebody else."""
    quiet: float = 2.0
    """Seconds after its last one-row step for which a session counts as decoding."""
    ageing: float = 2.0
    """Seconds for which a step waits before it moves up one class."""


class Pace:
    """Learns from rounds that have run. Costs are per block, since sessions may use fewer."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._singles_seconds = 0.0
        """A round of one-row steps only; 0 until there was one."""
        self._row_seconds: float | None = None
        """A row of prefill; None until there was one."""
        self._proven_rows = 0
        """Rows in the last measured piece: a cost measured on few rows may be wrong for many."""
        self._last: tuple[Hashable, float] | None = None
        """The session that decoded last, and when."""
        self._other: tuple[Hashable, float] | None = None
        """The last one that was not the same."""

    def decoded(self, session: Hashable, now: float) -> None:
        """A one-row step of ``session`` goes into a round."""
        if self._last is not None and self._last[0] != session:
            self._other = self._last
        self._last = session, now

    def ran(self, *, prefill_rows: int, blocks: int, seconds: float) -> None:
        """A round through ``blocks`` blocks with so many rows of a longer step took ``seconds``."""
        cost = seconds / blocks
        if not prefill_rows:
            old = self._singles_seconds or cost
            self._singles_seconds = old + _SINGLES_WEIGHT * (cost - old)
        elif prefill_rows >= min(_TILE, self._limits.least_prefill_rows):
            # A pass over the weights costs about a round of one-row steps, with them or without.
            # It may have become cheaper since it was measured: never take all of a round for it.
            alone = max(cost - self._singles_seconds, cost / 10)
            measured = alone / prefill_rows
            old_row = measured if self._row_seconds is None else self._row_seconds
            self._row_seconds = old_row + _WEIGHT * (measured - old_row)
            self._proven_rows = prefill_rows

    def singles_seconds(self, blocks: int) -> float:
        """About what a round of one-row steps through ``blocks`` blocks takes; 0 if unknown."""
        return self._singles_seconds * blocks

    def prefill_rows(self, session: Hashable, blocks: int, now: float) -> int:
        """How many rows of a longer step of ``session`` go into the next round."""
        limits = self._limits
        if not self._somebody_else_decodes(session, now):
            return limits.prefill_rows
        if self._row_seconds is None:
            return min(limits.least_prefill_rows, limits.prefill_rows)
        row_seconds = self._row_seconds * blocks
        left = (limits.stall - self.singles_seconds(blocks)) / 2
        rows = _in_tiles(min(left / row_seconds, 2 * self._proven_rows))
        least = max(_TILE, _in_tiles(_MOST * limits.stall / row_seconds))
        return min(limits.prefill_rows, max(rows, min(least, limits.least_prefill_rows)))

    def _somebody_else_decodes(self, session: Hashable, now: float) -> bool:
        seen = self._last if self._last is None or self._last[0] != session else self._other
        return seen is not None and now - seen[1] <= self._limits.quiet


def _in_tiles(rows: float) -> int:
    return int(rows) // _TILE * _TILE
