"""What a reader of the DHT gets to see, and what it costs.

Modelled, not run: a record at a holder. The real one (``protocol/announcement.py``) takes each entry
that arrives and, when it is over its size, drops one at random. So an entry survives each later
arrival with the same probability, and the record is the latest entries, thinned out the further one
goes back. That law is applied here to the times of the nodes' last announcements, independently at
each of the holders; a reader merges them. Sizes are those of a real signed entry. Who has died is in
until its last announcement expires; who has left is out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from petals.node.membership import INDEX_WRITERS
from petals.protocol.announcement import (
    MAX_RECORD_BYTES,
    MAX_RECORD_ENTRIES,
    REGION_BLOCKS,
    encode_signed,
)
from petals.protocol.upkeep import Upkeep

from .announcing import announcement, peer_id
from .population import NUM_BLOCKS, Floats, Ints
from .state import ABSENT, GONE, State

HOLDERS = 12
"""``DirectoryLimits.holders``."""
QUESTION_BYTES = 120
REPLY_BYTES = 20 * 90
"""The closer peers in an answer: id, two addresses, framing."""
REGIONS = -(-NUM_BLOCKS // REGION_BLOCKS)


def entry_bytes() -> int:
    """Of an ordinary announcement, signed."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    entry = encode_signed(announcement(peer_id(0), 10, 20, 250.0, 1), key.sign)
    return len(entry)


ENTRY_BYTES = entry_bytes()
FULL = min(MAX_RECORD_ENTRIES, MAX_RECORD_BYTES // (ENTRY_BYTES + 3))
"""Entries in a record that is full."""


@dataclass
class Traffic:
    """Bytes sent since the warm-up, by what for; each is received by somebody."""

    announcing: float = 0.0
    reading: float = 0.0
    record_bytes_read: float = field(default=0.0, repr=False)
    """Of region records alone: what their holders had to send."""

    def reset(self) -> None:
        """Count from here."""
        self.announcing = self.reading = self.record_bytes_read = 0.0


def lookup_bytes(nodes: int) -> float:
    """Of finding a key's holders: they themselves, and a few on the way to them."""
    asked = HOLDERS + math.log2(max(2, nodes)) / 3
    return asked * (QUESTION_BYTES + REPLY_BYTES)


def write_bytes(nodes: int) -> float:
    """Of writing an entry at one key."""
    return lookup_bytes(nodes) + HOLDERS * (ENTRY_BYTES + 2 * QUESTION_BYTES)


def read_bytes(nodes: int, entries: float) -> float:
    """Of reading one key at all holders, of which each has so many entries."""
    return lookup_bytes(nodes) + HOLDERS * entries * (ENTRY_BYTES + 3)


class Records:
    """The records of one model."""

    def __init__(self, state: State, dice: np.random.Generator) -> None:
        self._state = state
        self._dice = dice
        self._phase: Floats = dice.random(len(state.population))
        """Where in the interval a node announces."""

    def _announced(self, now: float, upkeep: Upkeep) -> tuple[Ints, Floats]:
        """Whose last announcement holds, and how old it is."""
        state = self._state
        alive = (state.status > ABSENT) & (state.status < GONE)
        believed = (state.died <= now) & (state.died > now - upkeep.time_to_live)
        named = np.flatnonzero(alive | believed)
        died = state.died
        alive_until = np.minimum(now, died[named])
        interval = upkeep.announce_interval
        since = (alive_until + self._phase[named] * interval) % interval
        age = now - np.maximum(alive_until - since, state.population.comes[named])
        holds = age < upkeep.time_to_live
        return named[holds], age[holds]

    def regions(self, now: float, upkeep: Upkeep) -> tuple[Ints, list[float]]:
        """Whom a reading of all regions shows, and the entries in each record."""
        nodes, age = self._announced(now, upkeep)
        start = self._state.start[nodes]
        last = start + self._state.population.length[nodes] - 1
        seen, sizes = [], []
        for region in range(REGIONS):
            first = region * REGION_BLOCKS
            touching = (start < first + REGION_BLOCKS) & (last >= first)
            seen.append(self._kept(nodes[touching], age[touching]))
            sizes.append(float(min(FULL, touching.sum())))
        return np.unique(np.concatenate(seen)), sizes

    def listed(self, now: float, upkeep: Upkeep, known: int) -> Ints:
        """Whom a reading of the list by name shows: written by a sample, at each announcement."""
        nodes, age = self._announced(now, upkeep)
        written = self._dice.random(len(nodes)) * known < INDEX_WRITERS
        return np.sort(self._kept(nodes[written], age[written]))

    def _kept(self, nodes: Ints, age: Floats) -> Ints:
        if len(nodes) <= FULL:
            return nodes
        order = np.argsort(age)
        survives = (FULL / (FULL + 1)) ** np.arange(len(nodes))
        somewhere = 1 - (1 - survives) ** HOLDERS
        return nodes[order[self._dice.random(len(nodes)) < somewhere]]
