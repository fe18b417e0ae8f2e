"""Members of a swarm whose directory is one table in memory, on trio's own clock."""

from dataclasses import dataclass, field
from typing import Any

import trio
from petals.node.membership import Membership
from petals.protocol.announcement import (
    Announcement,
    PeerState,
    decode_signed,
    merge_entries,
)
from petals.protocol.errors import PeerError
from petals.protocol.span import Span
from petals.protocol.swarm import Swarm
from petals.protocol.tally import Tallies
from support.announcements import NOW, announce, dice, peer_id, signer

BLOCKS = 20


def clock() -> float:
    return NOW + trio.current_time()


@dataclass
class Directory:
    """All holders as one table in memory. It can be down, and it can freeze."""

    table: dict[bytes, list[bytes]] = field(default_factory=dict)
    puts: list[tuple[float, bytes]] = field(default_factory=list)
    gets: list[bytes] = field(default_factory=list)
    down: bool = False
    frozen: bool = False
    seconds: float = 0.0
    holders: int = 3
    shown: int | None = None
    """How many entries of each key a reader gets to see; None: all."""
    busy: int = 0
    busiest: int = 0

    async def _answer(self) -> None:
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            await trio.sleep(float("inf") if self.frozen else self.seconds)
        finally:
            self.busy -= 1
        if self.down:
            raise PeerError("no peer could be reached")

    async def put(self, key: bytes, entry: bytes) -> int:
        self.puts.append((trio.current_time(), key))
        await self._answer()
        self.table[key] = merge_entries(self.table.get(key, []), [entry], clock(), salt=b"salt")
        return self.holders

    async def get(self, key: bytes) -> list[bytes]:
        self.gets.append(key)
        await self._answer()
        return self.table.get(key, [])[: self.shown]

    async def sums(self, key: bytes) -> list[bytes]:
        await self._answer()
        told = Tallies()
        told.count(key, self.table.get(key, []), clock())
        sums = told.sums(key, clock())
        return [] if sums is None else [sums] * self.holders

    def said(self, key: bytes) -> list[Announcement]:
        return [decode_signed(data, clock()) for data in self.table.get(key, [])]


class Node:
    """A member with what it says of itself."""

    def __init__(
        self, directory: Directory, number: int, blocks: Span | None, **changes: Any
    ) -> None:
        self.changes = {"num_blocks": BLOCKS, "state": PeerState.JOINING, **changes}
        self.blocks = blocks
        self.swarm = Swarm(peer_id(number))

        def describe(sequence: int, expires_at: float) -> Announcement | None:
            if self.blocks is None:
                return None
            moment = {"sequence": sequence, "expires_at": expires_at}
            return announce(number, self.blocks, **self.changes | moment)

        self.membership = Membership(
            directory,
            self.swarm,
            sign=signer(number),
            describe=describe,
            clock=clock,
            dice=dice(number),
        )

    def others(self) -> list[str]:
        return [known.peer_id for known in self.swarm.peers(clock())]
