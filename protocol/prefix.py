"""Shared prefixes: how hops agree, without believing one another too much, that they have seen this.

Sessions that begin with the same tokens and run through the same hops compute the same rows. A hop
that still has the KV cache and the outputs of such rows need not compute them again. Rules of this
file:

* A **boundary** is a position that is a multiple of ``PREFIX_ROWS``. Everything here is said of the
  rows before a boundary, of one sequence without padding.
* An **entry digest** names what has entered a hop up to a boundary. What enters the first hop are
  the embeddings; it hashes their bytes itself (``HashedInputs``), chunk by chunk, each digest over
  the one before it. Nobody is believed: whoever has other embeddings has another digest.
* A hop cannot be told by bytes that it has seen its inputs before (float arithmetic differs from
  machine to machine). Its predecessor **vouches**: its steps carry the **output digest** of every
  boundary, which is at the same time the entry digest of the hop behind it (``VouchedInputs``).
* A **storage key** is what a hop keeps its rows under: the entry digest and the storage key of the
  boundary before, together with everything else that the rows depend on: who the predecessor is (as
  the transport has proved it; nobody for the first hop), the blocks, the wire dtype. So who knows
  one storage key has offered the right entry digests for all boundaries up to it. The output digest
  is made of the storage key.
* The originator knows its embeddings and its route, so it can work out the entry digests of every
  hop (``offers``). It offers them in ``open``; a hop looks for the longest that it knows.

**Why a liar harms only himself.** An originator that lies in its offer gets rows that do not fit
its text; what it sends next is hashed (first hop), or must be vouched for by a predecessor that
proves to go on where the restored rows end (the others), so no row is kept under a wrong key. A hop
that lies can vouch for anything, but the keys made of it contain its own peer id: only sessions
that run through the liar find them, and those it could have lied to directly. An originator that
poses as a predecessor is such a hop, too.

**Why continuity must be proved.** Within one link, rows and digests come from one session of one
predecessor, in order. A new link may lead to another session of the same predecessor (an originator
may open it anew with another text). So the first step on a link must start at 0, or at a boundary
whose output digest, which it carries, is the entry digest that is known; otherwise the hop keeps
what it has and names nothing beyond it (``VouchedInputs.take``).

What this reveals: who can guess the first 32 tokens of somebody else's prompt can find out, by the
time it takes, that the hops have seen them.
"""

import hashlib
from collections.abc import Iterable, Sequence

from .span import Span
from .tensor import DType

PREFIX_ROWS = 32
"""Positions between two boundaries: fewer would cost a longer ``open``, more would miss short
prompts."""
MAX_PREFIXES = 128
"""Boundaries that are named: prompts of 4,096 tokens, an ``open`` of 4.4 KB."""
DIGEST_BYTES = 32

Label = tuple[int, bytes]
"""A boundary, and the storage key of the rows before it."""


def boundaries(start: int, stop: int) -> range:
    """The boundaries that are named with ``start < boundary <= stop``."""
    last = min(stop, MAX_PREFIXES * PREFIX_ROWS)
    return range((start // PREFIX_ROWS + 1) * PREFIX_ROWS, last + 1, PREFIX_ROWS)


def last_boundary(length: int) -> int:
    """The last named boundary below ``length``, so that a row is left to be computed; or 0."""
    return min(max(length - 1, 0) // PREFIX_ROWS, MAX_PREFIXES) * PREFIX_ROWS


def named_boundaries(position: int) -> int:
    """How many boundaries there are up to and with ``position``, 0 not among them."""
    return position // PREFIX_ROWS


def storage_keys(
    entries: Iterable[bytes],
    *,
    predecessor: str | None,
    span: Span,
    wire_dtype: DType,
    before: bytes = b"",
) -> list[bytes]:
    """What rows of consecutive ``entries`` digests are kept under.

    ``predecessor``: None for the first hop. ``before``: the storage key of the boundary in front of
    the first of them, if there is one.
    """
    sender = b"embeddings" if predecessor is None else b"peer " + predecessor.encode()
    keys = []
    for entry in entries:
        before = _digest(b"in", before, entry, sender, str(span).encode(), wire_dtype.encode())
        keys.append(before)
    return keys


def output_digest(key: bytes, span: Span) -> bytes:
    """What a hop of blocks ``span`` vouches with for the outputs of rows of a storage key."""
    return _digest(b"out", key, str(span).encode())


def offers(
    entries: Sequence[bytes], route: Sequence[tuple[str, Span]], wire_dtype: DType
) -> list[tuple[bytes, ...]]:
    """The entry digests of each hop of ``route`` (peer id, blocks), from those of the first."""
    offered = []
    predecessor: str | None = None
    for peer_id, span in route:
        offered.append(tuple(entries))
        keys = storage_keys(entries, predecessor=predecessor, span=span, wire_dtype=wire_dtype)
        entries = [output_digest(key, span) for key in keys]
        predecessor = peer_id
    return offered


def vouched_from(start: int, stop: int, outputs: Sequence[bytes]) -> tuple[bytes, ...]:
    """What a step with rows ``start..stop-1`` carries of the ``outputs`` digests known from 32 on.

    That of ``start`` itself, if that is a boundary, and those of all boundaries in and behind the
    rows, as far as they are known.
    """
    first = max(1, -(-start // PREFIX_ROWS))
    return tuple(outputs[first - 1 : stop // PREFIX_ROWS])


class HashedInputs:
    """The entry digests of a first hop, and of its originator: hashes of the embeddings' bytes."""

    def __init__(self, hidden_size: int, wire_dtype: DType, known: Sequence[bytes] = ()) -> None:
        """``known``: the digests of rows that need not be hashed again."""
        self.digests = list(known)
        self._row_bytes = wire_dtype.row_bytes(hidden_size)
        self._seed = _digest(b"embeddings", wire_dtype.encode(), str(hidden_size).encode())
        self._partial = bytearray()
        """The rows behind the last digest, which a rewind may cut: fewer than PREFIX_ROWS."""
        self.rows = PREFIX_ROWS * len(self.digests)
        """Rows counted in."""
        self._lost = False
        """Whether a rewind has ended within rows whose bytes are not here any more."""

    def take(self, position: int, rows: int, data: bytes | memoryview) -> None:
        """Count in ``rows`` rows at ``position``, which is at most what was counted before."""
        if position < self.rows:
            self._truncate(position)
        self.rows = position + rows
        view = memoryview(data).cast("B")
        while view and not self._lost and len(self.digests) < MAX_PREFIXES:
            missing = PREFIX_ROWS * self._row_bytes - len(self._partial)
            if len(view) < missing:
                self._partial += view
                return
            hasher = hashlib.sha256(b"rows " + (self.digests or [self._seed])[-1])
            hasher.update(self._partial)
            hasher.update(view[:missing])
            self.digests.append(hasher.digest())
            self._partial.clear()
            view = view[missing:]

    def _truncate(self, position: int) -> None:
        whole = PREFIX_ROWS * len(self.digests)
        if position > whole:
            del self._partial[(position - whole) * self._row_bytes :]
            return
        del self.digests[position // PREFIX_ROWS :]
        self._partial.clear()
        self._lost = position % PREFIX_ROWS != 0


class VouchedInputs:
    """The entry digests of any other hop: what its predecessor has vouched for."""

    def __init__(self, known: Sequence[bytes] = ()) -> None:
        """``known``: the digests of rows that were restored."""
        self.digests = list(known)
        self._following = False
        """Whether the rows before the next step are those that its sender has before it."""
        self._severed = False

    def linked(self) -> None:
        """A link begins: its first step has to prove that it goes on where our rows end."""
        self._following = False

    def sever(self) -> None:
        """From now on the rows are somebody else's: what we have is all that we can name."""
        self._severed = True

    def take(self, position: int, rows: int, vouched: Sequence[bytes]) -> None:
        """Count in ``rows`` rows at ``position`` with the output digests that came with them."""
        if not self._following:
            self._following = not self._severed and self._proves(position, vouched)
        del self.digests[position // PREFIX_ROWS :]
        if self._following:
            if position and position % PREFIX_ROWS == 0:
                vouched = vouched[1:]
            named = boundaries(position, position + rows)
            self.digests += vouched[: len(named)]
            self._following = len(vouched) >= len(named)

    def _proves(self, position: int, vouched: Sequence[bytes]) -> bool:
        if position == 0:
            return True
        index, beyond = divmod(position, PREFIX_ROWS)
        return not beyond and list(vouched[:1]) == self.digests[index - 1 : index] != []


def _digest(domain: bytes, *parts: bytes) -> bytes:
    """SHA-256 over parts that cannot run into one another."""
    hasher = hashlib.sha256(b"petals prefix " + domain)
    for part in parts:
        hasher.update(len(part).to_bytes(4, "big") + part)
    return hasher.digest()
