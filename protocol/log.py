"""Logs: what a sender has produced, by position, and what of it a receiver may keep.

Rules of this file:

* A **position** counts tokens of a session; a log holds the rows of positions ``0..end-1``.
* A **rewind** is the originator going back: it cuts every log on the ring at a position and counts
  one up. Position alone is no authority once a link breaks around a rewind: a receiver that missed
  it still holds rows that are no longer true. So a receiver states its position together with the
  rewind that it belongs to, and ``RewindHistory`` says how much of that still stands.
* A rewind may also put the sequences of a batch in another **order**, as beam search does with every
  token: those that go on take the place of those that don't, in all logs and caches. A receiver that
  missed one holds true rows in the wrong order; it is told what it has missed (``Step.past``).
"""

from collections.abc import Iterable, Sequence

from .checks import MAX_PAST, Rewind
from .tensor import DType, WireTensor


def combined(past: Iterable[Rewind]) -> tuple[int, ...]:
    """One order for several, one after the other; () if every sequence stays what it was."""
    combination: tuple[int, ...] = ()
    for _, _, order in past:
        if order:
            combination = tuple(combination[lane] for lane in order) if combination else order
    return () if combination == tuple(range(len(combination))) else combination


def fits(order: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether sequences of a batch can take each other's places: those with as much padding."""
    return len(order) == len(padding) and all(
        lane < len(padding) and padding[lane] == own
        for lane, own in zip(order, padding, strict=True)
    )


class RewindHistory:
    """Which prefix of what a peer held at an earlier rewind is still true, and in what order.

    Keeps only cuts that a later, deeper one has not made irrelevant: positions strictly increase,
    so it never has more entries than the log has rows. Of orders it knows the last few; who has
    missed more holds nothing that can be used.
    """

    def __init__(self) -> None:
        self.current = 0
        self._cuts: list[tuple[int, int]] = []
        self._recent: list[Rewind] = []
        self._forgotten = 0
        """The newest rewind with an order that is not among the recent ones any more."""

    def __repr__(self) -> str:
        return f"RewindHistory(current={self.current}, cuts={self._cuts})"

    def record(self, rewind: int, position: int, order: tuple[int, ...] = ()) -> None:
        """``rewind`` (newer than ``current``) has cut the log at ``position``."""
        if rewind <= self.current:
            raise ValueError(f"rewind {rewind} is not newer than {self.current}")
        while self._cuts and self._cuts[-1][1] >= position:
            self._cuts.pop()
        self._cuts.append((rewind, position))
        self._recent.append(Rewind(rewind, position, order))
        if len(self._recent) > MAX_PAST:
            oldest = self._recent.pop(0)
            if oldest.order:
                self._forgotten = oldest.number
        self.current = rewind

    def adopt(self, rewind: int, position: int, past: Sequence[Rewind]) -> None:
        """The first step of ``rewind`` has come; it begins at ``position`` and tells of ``past``."""
        untold = past[0].number - 1 if past else rewind
        if untold > self.current:
            self.record(untold, position)
        for later in past:
            self.record(*later)

    def since(self, rewind: int) -> tuple[Rewind, ...]:
        """The rewinds behind ``rewind``, the newest one last, and at most ``MAX_PAST`` of them."""
        return tuple(later for later in self._recent if later.number > rewind)

    def valid_prefix(self, rewind: int, position: int) -> int:
        """How many of ``position`` rows held at ``rewind`` are still true at ``current``.

        True in the order that ``since`` leads to.
        """
        if rewind < self._forgotten:
            return 0
        later = (cut for when, cut in self._cuts if when > rewind)
        return min(position, next(later, position))


class OutputLog:
    """The hidden states that a hop has produced, in wire dtype, by position.

    Rows are [batch, rows, hidden_size] in each chunk; the log joins chunks again when it is read,
    so that a prefix grown token by token is replayed as a few large steps.
    """

    def __init__(self, batch: int, hidden_size: int, dtype: DType) -> None:
        self._batch = batch
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._row_bytes = dtype.row_bytes(hidden_size)
        self._lanes = tuple(range(batch))
        self._chunks: list[tuple[int, int, memoryview, tuple[int, ...]]] = []
        """(start, rows, bytes, where each sequence is in them), contiguous from position 0."""
        self.end = 0

    def append(self, hidden: WireTensor) -> None:
        """Add rows [batch, rows, hidden_size] at the end."""
        batch, rows, hidden_size = hidden.shape
        if (batch, hidden_size, hidden.dtype) != (self._batch, self._hidden_size, self._dtype):
            raise ValueError(f"a log of {self!r} cannot take {hidden.dtype} {hidden.shape}")
        data = memoryview(hidden.data).cast("B")
        self._chunks.append((self.end, rows, data, self._lanes))
        self.end += rows

    def truncate(self, position: int) -> None:
        """Forget the rows at ``position`` and behind it."""
        while self._chunks and self._chunks[-1][0] >= position:
            self._chunks.pop()
        if self._chunks:
            start, rows, data, lanes = self._chunks[-1]
            if start + rows > position:
                kept = self._slice(rows, data, self._lanes, 0, position - start)
                data = memoryview(b"".join(kept))
                self._chunks[-1] = (start, position - start, data, lanes)
        self.end = min(self.end, position)

    def reorder(self, order: tuple[int, ...]) -> None:
        """Let sequence b be what ``order[b]`` was; () changes nothing. Copies no rows."""
        if not order:
            return
        # Most chunks are in the same order: after a while all but the latest.
        orders = {lanes: tuple(lanes[lane] for lane in order) for *_, lanes in self._chunks}
        self._chunks = [
            (start, rows, data, orders[lanes]) for start, rows, data, lanes in self._chunks
        ]

    def read(self, start: int, stop: int) -> WireTensor:
        """The rows ``start..stop-1`` as one tensor. Needs ``0 <= start < stop <= end``."""
        if not 0 <= start < stop <= self.end:
            raise ValueError(f"rows {start}..{stop} of a log that holds 0..{self.end}")
        lanes: list[list[memoryview]] = [[] for _ in range(self._batch)]
        for first, rows, data, order in self._chunks[self._chunk_at(start) :]:
            if first >= stop:
                break
            low, high = max(start, first) - first, min(stop, first + rows) - first
            for lane, piece in zip(lanes, self._slice(rows, data, order, low, high), strict=True):
                lane.append(piece)
        pieces = [piece for lane in lanes for piece in lane]
        joined = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return WireTensor(self._dtype, (self._batch, stop - start, self._hidden_size), joined)

    def __repr__(self) -> str:
        return f"OutputLog(0..{self.end}, {self._dtype} [{self._batch}, rows, {self._hidden_size}])"

    def _chunk_at(self, position: int) -> int:
        low, high = 0, len(self._chunks) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._chunks[middle][0] <= position:
                low = middle
            else:
                high = middle - 1
        return low

    def _slice(
        self, rows: int, data: memoryview, lanes: Iterable[int], low: int, high: int
    ) -> list[memoryview]:
        """Rows ``low..high-1`` of ``lanes`` of a chunk of ``rows`` rows."""
        size = self._row_bytes
        return [data[(lane * rows + low) * size : (lane * rows + high) * size] for lane in lanes]
