"""Which chunk of a model is asked of which peer next.

Rules of this file:

* A chunk is asked of one peer at a time. Only what has been under way for long is asked of a second
  one, by whom there is nothing else to do for; whoever comes first counts.
* Rarest first: the chunks that fewest peers have. So those who fetch the same at once fetch different
  chunks from whoever has all, and have something to give to each other.
* The least loaded first; of those, whoever has least of what is wanted: the one who has everything is
  left alone as far as others can help.
* A peer is asked for as much at a time as it has shown that it sends in a moment. One that sends
  nothing for long has failed; one that sends what is wrong is never asked again.

Time and dice are arguments. What arrives is verified before it is told here.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice

from .dice import Dice
from .holdings import holds
from .manifest import Manifest

FIRST_WINDOW = 2
MAX_WINDOW = 32
"""Chunks that one peer is asked for at a time."""
REFILL = 0.75
"""A peer with no more than this of its window under way is asked for the rest at once: questions that
travel together cost both sides less."""
WINDOW_SECONDS = 0.25
"""What is under way from one peer; enough for any round trip, little to lose with it."""
FRONTIER = 512
"""Chunks that are put in order at a time: all of a large model's would take seconds."""
REORDER_SECONDS = 0.5
STALE_SECONDS = 2.0
"""After this, an idle peer is asked for what another one is still to send."""
PATIENCE = 10.0
"""Seconds that a peer may take for a chunk, and as long as it takes at the least rate beside."""
LEAST_RATE = 32_000.0
"""Bytes per second."""

Piece = tuple[int, int]
"""A shard's number and that of one of its chunks."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a peer for a chunk."""

    peer_id: str
    shard: int
    chunk: int


@dataclass(slots=True)
class _Holder:
    """A peer that is asked."""

    since: float
    """When it last sent something, or was first asked for something after a pause."""
    bits: dict[int, bytes] = field(default_factory=dict)
    """What it has, by shard."""
    asked: dict[Piece, float] = field(default_factory=dict)
    """What it was asked for and has not sent, and when."""
    pace: float = 0.0
    """Seconds per byte, smoothed."""
    wealth: int = 0
    """How many chunks it has."""
    lacks: set[Piece] = field(default_factory=set)
    """What it said it had, and had not."""

    def has(self, piece: Piece) -> bool:
        return holds(self.bits.get(piece[0], b""), piece[1]) and piece not in self.lacks


class Download:
    """What is still missing of some shards of a model, and who is asked for it."""

    def __init__(
        self, manifest: Manifest, missing: Mapping[int, Collection[int]], *, dice: Dice
    ) -> None:
        """``missing``: chunks, by shard."""
        self._manifest = manifest
        self._dice = dice
        self._missing = {shard: set(chunks) for shard, chunks in missing.items() if chunks}
        self._holders: dict[str, _Holder] = {}
        self._banned: set[str] = set()
        self._under_way: dict[Piece, list[str]] = {}
        self._order: list[Piece] = []
        self._ordered_at = -math.inf
        self._more = False
        """Whether there are chunks behind those that are in order."""
        self._luck = {shard: dice.random() for shard in self._missing}
        self.left = sum(
            manifest.chunk_size(shard, chunk)
            for shard, chunks in self._missing.items()
            for chunk in chunks
        )
        """Bytes that are missing."""
        self.received: dict[str, int] = {}
        """Bytes that each peer has sent, and that were right."""

    def __repr__(self) -> str:
        return (
            f"<Download: {self.left} bytes left, {len(self._under_way)} chunks under way, "
            f"{len(self._holders)} peers>"
        )

    @property
    def done(self) -> bool:
        """Whether nothing is missing."""
        return not self._missing

    @property
    def shards(self) -> tuple[int, ...]:
        """Those that something is missing of."""
        return tuple(sorted(self._missing))

    def usable(self, peer_id: str) -> bool:
        """Whether a peer may be asked for anything."""
        return peer_id not in self._banned

    def heard(self, peer_id: str, bits: Mapping[int, bytes], now: float) -> None:
        """A peer has said what it has of some shards."""
        if not self.usable(peer_id):
            return
        if peer_id not in self._holders:
            self._holders[peer_id] = _Holder(now)
            self._ordered_at = -math.inf
        holder = self._holders[peer_id]
        holder.bits.update(bits)
        holder.wealth = sum(_count(held) for held in holder.bits.values())

    def left_peer(self, peer_id: str) -> None:
        """A peer is gone, or has failed: what it was asked for is free again."""
        holder = self._holders.pop(peer_id, None)
        if holder is not None:
            self._ordered_at = -math.inf
            for piece in holder.asked:
                self._no_longer_asked(peer_id, piece)

    def lied(self, peer_id: str) -> None:
        """A peer has sent what is wrong."""
        self._banned.add(peer_id)
        self.left_peer(peer_id)

    def lacked(self, peer_id: str, shard: int, chunk: int) -> bool:
        """A peer has not what it was asked for. Returns whether it was asked for that."""
        if not self._answered(peer_id, (shard, chunk)):
            return False
        self._holders[peer_id].lacks.add((shard, chunk))
        return True

    def expects(self, peer_id: str, shard: int, chunk: int) -> bool:
        """Whether a peer was asked for a chunk and has not answered."""
        holder = self._holders.get(peer_id)
        return holder is not None and (shard, chunk) in holder.asked

    def arrived(self, peer_id: str, shard: int, chunk: int, now: float) -> bool:
        """A peer has sent a chunk, which is right. Returns whether it was missing."""
        size = self._manifest.chunk_size(shard, chunk)
        if self._answered(peer_id, (shard, chunk)):
            holder = self._holders[peer_id]
            pace = (now - holder.since) / max(size, 1)
            holder.pace = (7 * holder.pace + pace) / 8 if holder.pace else pace
            holder.since = now
        if not self.take(shard, chunk):
            return False
        self.received[peer_id] = self.received.get(peer_id, 0) + size
        return True

    def take(self, shard: int, chunk: int) -> bool:
        """A chunk is there, wherever from. Returns whether it was missing."""
        chunks = self._missing.get(shard, set())
        if chunk not in chunks:
            return False
        chunks.remove(chunk)
        if not chunks:
            del self._missing[shard]
        self.left -= self._manifest.chunk_size(shard, chunk)
        return True

    def unheld(self, besides: Collection[int] = ()) -> list[Piece]:
        """The chunks that no peer has that may be asked, in order, but for those of some shards."""
        return [
            (shard, chunk)
            for shard in self.shards
            if shard not in besides
            for chunk in sorted(self._missing[shard])
            if not any(holder.has((shard, chunk)) for holder in self._holders.values())
        ]

    def overdue(self, now: float) -> list[str]:
        """The peers that have sent nothing for so long that they have failed."""
        return [
            peer_id
            for peer_id, holder in self._holders.items()
            if holder.asked
            and now - holder.since > PATIENCE + self._manifest.chunk_bytes / LEAST_RATE
        ]

    def plan(self, now: float) -> list[Ask]:
        """What is to be asked now; from now on it counts as asked."""
        asks: list[Ask] = []
        if now - self._ordered_at >= REORDER_SECONDS:
            self._reorder(now)
        waiting = {
            peer_id: holder
            for peer_id, holder in self._holders.items()
            if self._load(holder) <= REFILL
        }
        while waiting:
            peer_id = min(
                waiting, key=lambda peer: (self._load(waiting[peer]), waiting[peer].wealth)
            )
            holder = waiting[peer_id]
            piece = self._next_for(holder, now) if self._load(holder) < 1 else None
            if piece is None:
                del waiting[peer_id]
                continue
            if not holder.asked:
                holder.since = now
            holder.asked[piece] = now
            self._under_way.setdefault(piece, []).append(peer_id)
            asks.append(Ask(peer_id, *piece))
        return asks

    def _next_for(self, holder: _Holder, now: float) -> Piece | None:
        if not self._order and self._more:
            self._reorder(now)
        for place, piece in enumerate(self._order):
            if self._is_free(piece) and holder.has(piece):
                del self._order[place]
                return piece
        for piece, peers in self._under_way.items():
            if len(peers) == 1 and self._is_missing(piece) and holder.has(piece):
                other = self._holders[peers[0]]
                if other is not holder and now - other.asked[piece] > STALE_SECONDS:
                    return piece
        return None

    def _is_free(self, piece: Piece) -> bool:
        return self._is_missing(piece) and piece not in self._under_way

    def _is_missing(self, piece: Piece) -> bool:
        return piece[1] in self._missing.get(piece[0], ())

    def _reorder(self, now: float) -> None:
        """Put the chunks that come next in order."""
        self._ordered_at = now
        holders = self._holders.values()
        shards = sorted(
            self._missing,
            key=lambda shard: (sum(shard in holder.bits for holder in holders), self._luck[shard]),
        )
        free = (
            (shard, chunk)
            for shard in shards
            for chunk in self._missing[shard]
            if (shard, chunk) not in self._under_way
        )
        held = ((piece, sum(holder.has(piece) for holder in holders)) for piece in free)
        next_ones = islice((item for item in held if item[1]), FRONTIER)
        ranked = sorted((count, self._dice.random(), piece) for piece, count in next_ones)
        self._order = [piece for _, _, piece in ranked]
        self._more = len(ranked) == FRONTIER

    def _answered(self, peer_id: str, piece: Piece) -> bool:
        holder = self._holders.get(peer_id)
        if holder is None or holder.asked.pop(piece, None) is None:
            return False
        self._no_longer_asked(peer_id, piece)
        return True

    def _no_longer_asked(self, peer_id: str, piece: Piece) -> None:
        peers = self._under_way[piece]
        peers.remove(peer_id)
        if not peers:
            del self._under_way[piece]

    def _load(self, holder: _Holder) -> float:
        """1 and more: it has enough to do."""
        window: float = FIRST_WINDOW
        if holder.pace > 0:
            window += WINDOW_SECONDS / (holder.pace * self._manifest.chunk_bytes)
        return len(holder.asked) / min(MAX_WINDOW, window)


def _count(bits: bytes) -> int:
    return int.from_bytes(bits).bit_count()
