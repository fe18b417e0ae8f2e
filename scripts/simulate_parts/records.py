"""What a reader of the DHT gets to see, and what it costs.

Modelled, not run: a record at a holder. The real one (``protocol/announcement.py``), when it is over its
size, keeps a sample that is drawn anew at each holder every ten minutes. So each entry is in with the same
probability, independently; a reader merges the records of a few holders. Beside its record each holder
counts all (``protocol/tally.py``). Sizes are those of real signed entries. Who has died is in until its
last announcement expires; who has left is out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from petals.node.libp2p_directory import DirectoryLimits
from petals.protocol.announcement import MAX_RECORD_BYTES, MAX_RECORD_ENTRIES, REGION_BLOCKS
from petals.protocol.tally import MAX_SUMS_BYTES, Totals
from petals.protocol.upkeep import Upkeep

from .announcing import entry_bytes
from .population import NUM_BLOCKS, Floats, Ints
from .state import ABSENT, GONE, ONLINE, State

LIMITS = DirectoryLimits()
HOLDERS = LIMITS.holders
READERS = LIMITS.readers
QUESTION_BYTES = 120
REPLY_BYTES = 20 * 90
"""The closer peers in an answer: id, two addresses, framing."""
PREFIX_BYTES = 3
"""Of an entry in a record."""
REGIONS = -(-NUM_BLOCKS // REGION_BLOCKS)


def full(round_trips: int) -> int:
    """Entries in a record that is full."""
    return min(MAX_RECORD_ENTRIES, MAX_RECORD_BYTES // (entry_bytes(round_trips) + PREFIX_BYTES))


@dataclass
class Traffic:
    """Bytes sent since the warm-up, by what for; each is received by somebody."""

    announcing: float = 0.0
    reading: float = 0.0
    measuring: float = 0.0
    record_bytes_read: float = field(default=0.0, repr=False)
    """Of region records alone: what their holders had to send."""

    def reset(self) -> None:
        """Count from here."""
        self.announcing = self.reading = self.measuring = self.record_bytes_read = 0.0


def lookup_bytes(nodes: int) -> float:
    """Of finding a key's holders: they themselves, and a few on the way to them."""
    asked = min(nodes, HOLDERS + math.log2(max(2, nodes)) / 3)
    return asked * (QUESTION_BYTES + REPLY_BYTES)


def write_bytes(nodes: int, entry: int) -> float:
    """Of writing an entry at one key, whose holders are known."""
    return min(nodes, HOLDERS) * (entry + 2 * QUESTION_BYTES)


def lookups_of_a_write(nodes: int, interval: float, gone_a_second: float) -> float:
    """How often holders have to be looked up for it: when they were last, long ago, or one is gone."""
    if nodes <= HOLDERS:
        return 1.0
    return min(1.0, interval / LIMITS.holders_seconds + HOLDERS * gone_a_second * interval)


def record_bytes(nodes: int, entries: float, entry: int) -> float:
    """Of the records in a reading of one key, of whose records each has so many entries."""
    readers = READERS if nodes > HOLDERS else nodes
    return readers * entries * (entry + PREFIX_BYTES)


def sums_bytes(nodes: int) -> float:
    """Of asking the holders of one key for what they have counted."""
    return min(nodes, HOLDERS) * (QUESTION_BYTES + REPLY_BYTES + MAX_SUMS_BYTES)


class Records:
    """The records of one model."""

    def __init__(self, state: State, dice: np.random.Generator) -> None:
        self._state = state
        self._dice = dice
        self._phase: Floats = dice.random(len(state.population))
        """Where in the interval a node announces."""

    def _announced(self, now: float, upkeep: Upkeep) -> Ints:
        """Whose last announcement holds."""
        state = self._state
        alive = (state.status > ABSENT) & (state.status < GONE)
        believed = (state.died <= now) & (state.died > now - upkeep.time_to_live)
        named = np.flatnonzero(alive | believed)
        died = state.died
        alive_until = np.minimum(now, died[named])
        interval = upkeep.announce_interval
        since = (alive_until + self._phase[named] * interval) % interval
        age = now - np.maximum(alive_until - since, state.population.comes[named])
        return named[age < upkeep.time_to_live]

    def regions(self, now: float, upkeep: Upkeep) -> tuple[Ints, list[float]]:
        """Whom a reading of all regions shows, and the entries in each record."""
        nodes = self._announced(now, upkeep)
        start = self._state.start[nodes]
        last = start + self._state.population.length[nodes] - 1
        most = full(upkeep.round_trips)
        seen, sizes = [], []
        for region in range(REGIONS):
            first = region * REGION_BLOCKS
            touching = (start < first + REGION_BLOCKS) & (last >= first)
            seen.append(self._kept(nodes[touching], most))
            sizes.append(float(min(most, touching.sum())))
        return np.unique(np.concatenate(seen)), sizes

    def totals(self, now: float, upkeep: Upkeep) -> Totals:
        """What the holders have counted."""
        nodes = self._announced(now, upkeep)
        # who is dead and believed in has said that it serves
        serves = np.isin(self._state.status[nodes], (ONLINE, GONE))
        return Totals(
            tuple(self._state.throughput(nodes[serves]).tolist()),
            tuple(self._state.throughput(nodes[~serves]).tolist()),
        )

    def _kept(self, nodes: Ints, most: int) -> Ints:
        if len(nodes) <= most:
            return nodes
        somewhere = 1 - (1 - most / len(nodes)) ** READERS
        return nodes[self._dice.random(len(nodes)) < somewhere]
