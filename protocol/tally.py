"""How much throughput each block has, as those count it who hold the announcements.

A record is bounded: of a region that thousands serve it shows a sample, which says who is there, and
not how many. But whoever holds the record has been told by all of them. So beside the entries that it
keeps, a holder keeps a *tally*: what each peer gives to which blocks, and until when. A reader asks all
holders of a region for their sums and believes the median. That costs a hundredth of reading their
entries, and is exact to the second, where a sample of four hundred is wrong by a tenth.

Rules of this file:

* What counts is what ``placement.placed`` counts, once for each peer, by its newest announcement.
* A lying holder moves a median no further than honest ones differ. If half of them lied, they could as
  well withhold the announcements themselves.
* All ``Tallies`` of a node together remember a bounded number of peers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

import msgpack

from .announcement import (
    MAX_SPEED,
    REGION_BLOCKS,
    Announcement,
    decode_signed,
    region_keys,
)
from .checks import BadValueError, number, tuple_of
from .errors import RemoteProtocolError
from .placement import placed
from .span import Span

MAX_COUNTED = 65_536
"""Peers at all keys together: some 16 MB. In a swarm of ten thousand a holder counts three thousand."""
MAX_SUMS_BYTES = 160
"""Of what a holder answers: twice 9 bytes for each block, and a little room."""
FRESH = 1.0
"""Seconds for which sums are given out again: adding up thousands takes a millisecond."""
_MAX_SUM = MAX_SPEED * 1e4


@dataclass(frozen=True, slots=True)
class _Counted:
    sequence: int
    expires_at: float
    gives: tuple[int, int, float] | None
    """From which block of the region to which it gives how much to each; None: nothing."""
    serves: bool
    """Already, or only when it has loaded them."""


class Tallies:
    """What a node has counted, by key of a region."""

    def __init__(self) -> None:
        self._counted: dict[bytes, dict[str, _Counted]] = {}
        self._size = 0
        self._sums: dict[bytes, tuple[float, bytes]] = {}

    def __repr__(self) -> str:
        return f"<Tallies of {self._size} peers at {len(self._counted)} keys>"

    def count(self, key: bytes, entries: Iterable[bytes], now: float) -> None:
        """Entries were written at a key, which need not be a region's."""
        region = _region(key)
        if region is None:
            return
        for entry in entries:
            try:
                said = decode_signed(entry, now)
            except RemoteProtocolError:
                continue
            tally = self._counted.setdefault(key, {})
            known = tally.get(said.peer_id)
            if known is None and self._size >= MAX_COUNTED:
                self.sweep(now)
                if self._size >= MAX_COUNTED:
                    continue
                tally = self._counted.setdefault(key, {})
            if known is None or known.sequence < said.sequence:
                self._size += known is None
                tally[said.peer_id] = _Counted(
                    said.sequence,
                    said.expires_at,
                    _gives(said, key, region),
                    said.serves_all,
                )

    def sums(self, key: bytes, now: float) -> bytes | None:
        """What ``agreed`` reads, of the region at a key; None: it is not known here."""
        at, packed = self._sums.get(key, (now - FRESH, b""))
        if now - at < FRESH:
            return packed
        tally = self._counted.get(key)
        if tally is None:
            return None
        changes = {serves: [0.0] * (REGION_BLOCKS + 1) for serves in (True, False)}
        for counted in tally.values():
            if counted.gives is not None and counted.expires_at > now:
                start, end, share = counted.gives
                changes[counted.serves][start] += share
                changes[counted.serves][end] -= share
        sums = [max(0.0, total) for each in changes.values() for total in accumulate(each[:-1])]
        packed = bytes(msgpack.packb(sums))
        self._sums[key] = now, packed
        return packed

    def sweep(self, now: float) -> None:
        """Forget what has expired."""
        self._sums.clear()
        for key, tally in list(self._counted.items()):
            kept = {peer: counted for peer, counted in tally.items() if counted.expires_at > now}
            self._size -= len(tally) - len(kept)
            if kept:
                self._counted[key] = kept
            else:
                del self._counted[key]


def _region(key: bytes) -> int | None:
    """The number of the region whose key this is."""
    number_at_end = key.rsplit(b"/", 1)[-1]
    return int(number_at_end) if number_at_end.isdigit() and len(number_at_end) <= 4 else None


def _gives(said: Announcement, key: bytes, region: int) -> tuple[int, int, float] | None:
    blocks = Span(region * REGION_BLOCKS, (region + 1) * REGION_BLOCKS)
    for node in placed([said], said.num_blocks):
        shared = node.span.intersection(blocks)
        if shared is not None and region_keys(said.model, shared) == [key]:
            first = blocks.start
            return shared.start - first, shared.end - first, node.speed / len(node.span)
    return None


@dataclass(frozen=True, slots=True)
class Totals:
    """Tokens per second through each block of a model."""

    serving: tuple[float, ...]
    loading: tuple[float, ...]
    """To come, from nodes that have chosen these blocks and load them."""

    @property
    def throughput(self) -> list[float]:
        """Of all that have made their choice."""
        return [now + soon for now, soon in zip(self.serving, self.loading, strict=True)]


_checked_sums = tuple_of(number(0, _MAX_SUM), 2 * REGION_BLOCKS)


def agreed(answers: Sequence[Iterable[bytes]], num_blocks: int) -> Totals | None:
    """What the holders of a model's regions, in their order, together say.

    None if there is a region of which no holder says anything.
    """
    serving: list[float] = []
    loading: list[float] = []
    for answers_of_region in answers:
        said = [sums for answer in answers_of_region if (sums := _read(answer)) is not None]
        if not said:
            return None
        medians = [median(each) for each in zip(*said, strict=True)]
        serving += medians[:REGION_BLOCKS]
        loading += medians[REGION_BLOCKS:]
    return Totals(tuple(serving[:num_blocks]), tuple(loading[:num_blocks]))


def _read(answer: bytes) -> tuple[float, ...] | None:
    if len(answer) > MAX_SUMS_BYTES:
        return None
    try:
        sums: tuple[float, ...] = _checked_sums(msgpack.unpackb(answer))
    except (BadValueError, ValueError):
        return None
    return sums if len(sums) == 2 * REGION_BLOCKS else None
