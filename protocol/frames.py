"""The frames of the wire: what each carries, and what its fields may be.

Rules of this file: a frame is a frozen value; ``CHECKS`` has one entry for every field that travels
in the header, and the fields without one are the frame's tensors, or, if ``BYTES`` has them, plain
bytes. ``codec.py`` turns frames into
bytes and back. A stream carries one session, which its first frame (``Open`` or ``Link``) names;
the frames behind it need not repeat it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from . import checks
from .checks import (
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_PAST,
    MAX_REASON,
    MAX_TOKENS,
    SESSION_ID_BYTES,
    Check,
    Peer,
    Rewind,
)
from .errors import ErrorCode
from .log import combined
from .manifest import FIRST_BLOCK, MAX_MANIFEST
from .prefix import DIGEST_BYTES, MAX_PREFIXES
from .span import Span
from .tensor import DType, WireTensor

PROTOCOL_VERSION = 1
SESSION_PROTOCOL = "/petals/session/1"
DESCRIBE_PROTOCOL = "/petals/describe/1"
SHARD_PROTOCOL = "/petals/shard/1"

MAX_SHARDS_ASKED = 1024
"""Shards that are asked after at a time: their numbers fit a header, what is had of them a frame."""

_fingerprint = checks.text(64)
_shard = checks.integer(0, MAX_BLOCKS + FIRST_BLOCK)
_chunk = checks.integer(0, MAX_MANIFEST)
_digests = checks.tuple_of(checks.binary(DIGEST_BYTES, DIGEST_BYTES), MAX_PREFIXES)


@dataclass(frozen=True, slots=True)
class Frame:
    """Base of all frames. ``KIND`` is the name on the wire, ``CHECKS`` has one entry a field."""

    KIND: ClassVar[str]
    CHECKS: ClassVar[Mapping[str, Check]]
    BYTES: ClassVar[frozenset[str]] = frozenset()
    """The fields that are bytes of any length behind the header."""


@dataclass(frozen=True, slots=True)
class Hello(Frame):
    """First on every stream, in both directions."""

    version: int
    node_version: str
    features: tuple[str, ...] = ()

    KIND: ClassVar[str] = "hello"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "version": checks.integer(1, 1 << 16),
        "node_version": checks.text(64),
        "features": checks.tuple_of(checks.text(32), 32),
    }


@dataclass(frozen=True, slots=True)
class Open(Frame):
    """Originator to hop: take part in a session."""

    session: bytes
    epoch: int
    model: str
    """The model's fingerprint, hexadecimal."""
    span: Span
    """The blocks to run."""
    predecessor: str
    """Peer id of who will link to this hop: the hop before it, or the originator."""
    successor: Peer | None
    """The hop after it; None: outputs go back to the originator on this stream."""
    batch: int
    padding: tuple[int, ...]
    """Per sequence, how many of its first positions are left padding, never computed."""
    max_tokens: int
    """Positions that the session may grow to; its KV cache is reserved now."""
    wire_dtype: DType
    """What hidden states travel in, to and from this hop."""
    prefix: tuple[bytes, ...] = ()
    """The entry digests of the session's first 32, 64, … positions at this hop (``prefix.py``):
    what it holds of them already need not be sent. With an offer, no step may come before
    ``resume``."""

    KIND: ClassVar[str] = "open"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "session": checks.binary(SESSION_ID_BYTES, SESSION_ID_BYTES),
        "epoch": checks.counter,
        "model": checks.text(128),
        "span": checks.span,
        "predecessor": checks.peer_id,
        "successor": checks.optional(checks.peer),
        "batch": checks.integer(1, MAX_BATCH),
        "padding": checks.tuple_of(checks.position, MAX_BATCH),
        "max_tokens": checks.integer(1, MAX_TOKENS),
        "wire_dtype": checks.dtype,
        "prefix": _digests,
    }


@dataclass(frozen=True, slots=True)
class Ready(Frame):
    """Hop to originator: the session's cache is reserved."""

    epoch: int
    cache_tokens_left: int

    KIND: ClassVar[str] = "ready"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "epoch": checks.counter,
        "cache_tokens_left": checks.counter,
    }


@dataclass(frozen=True, slots=True)
class Refused(Frame):
    """The answer to an ``open`` or a ``link`` that will not be served."""

    code: ErrorCode
    reason: str
    retry_after: float | None = None
    """Seconds; None: asking again makes no sense."""

    KIND: ClassVar[str] = "refused"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "code": checks.error_code,
        "reason": checks.text(MAX_REASON),
        "retry_after": checks.optional(checks.number(0, 86_400)),
    }


@dataclass(frozen=True, slots=True)
class Link(Frame):
    """Sender to receiver: join my output log to you."""

    session: bytes
    epoch: int

    KIND: ClassVar[str] = "link"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "session": checks.binary(SESSION_ID_BYTES, SESSION_ID_BYTES),
        "epoch": checks.counter,
    }


@dataclass(frozen=True, slots=True)
class Resume(Frame):
    """Receiver to sender: I hold this much; send from there under this link number."""

    link: int
    """Steps of an older link number are stale and ignored."""
    position: int
    rewind: int
    """The rewind that ``position`` belongs to: of what I hold, only what no later rewind has cut
    off is still true."""

    KIND: ClassVar[str] = "resume"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "link": checks.counter,
        "position": checks.position,
        "rewind": checks.counter,
    }


@dataclass(frozen=True, slots=True)
class Step(Frame):
    """Sender to receiver: rows of hidden states, or of the embeddings in front of block 0."""

    link: int
    sequence: int
    """0, 1, 2, … within one link number."""
    rewind: int
    """How often the originator has gone back in this session. The first step of a new rewind cuts
    what the receiver holds to ``position``."""
    position: int
    """Of the first row."""
    want_from: int
    """The last hop returns the rows at this position and behind it to the originator."""
    hidden: WireTensor
    """[batch, rows, hidden_size] in the session's wire dtype."""
    vouched: tuple[bytes, ...] = ()
    """The sender's output digests of the boundaries at ``position``, in and behind the rows, as far
    as it can vouch for them (``prefix.py``)."""
    past: tuple[Rewind, ...] = ()
    """With the first step of a new rewind: those that the receiver has not heard of, the newest one
    last. At most the newest ``MAX_PAST``; older ones have cut at ``position`` or behind it."""

    KIND: ClassVar[str] = "step"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "link": checks.counter,
        "sequence": checks.counter,
        "rewind": checks.counter,
        "position": checks.position,
        "want_from": checks.position,
        "vouched": _digests,
        "past": checks.tuple_of(checks.rewind, MAX_PAST),
    }

    @property
    def order(self) -> tuple[int, ...]:
        """What becomes of the sequences of the batch in front of ``position``; () if nothing does."""
        return combined(self.past) if self.position else ()


@dataclass(frozen=True, slots=True)
class Output(Frame):
    """Last hop to originator: rows that it wanted."""

    rewind: int
    position: int
    hidden: WireTensor
    """[batch, rows, hidden_size] in the session's wire dtype."""

    KIND: ClassVar[str] = "output"
    CHECKS: ClassVar[Mapping[str, Check]] = {"rewind": checks.counter, "position": checks.position}


@dataclass(frozen=True, slots=True)
class Relink(Frame):
    """Originator to hop: from this epoch on, these are your neighbours."""

    epoch: int
    predecessor: str
    successor: Peer | None

    KIND: ClassVar[str] = "relink"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "epoch": checks.counter,
        "predecessor": checks.peer_id,
        "successor": checks.optional(checks.peer),
    }


@dataclass(frozen=True, slots=True)
class Probe(Frame):
    """Originator to hop: say that you are alive, and where you are."""

    nonce: int

    KIND: ClassVar[str] = "probe"
    CHECKS: ClassVar[Mapping[str, Check]] = {"nonce": checks.counter}


@dataclass(frozen=True, slots=True)
class State(Frame):
    """Hop to originator: the answer to a probe."""

    nonce: int
    position: int
    """Rows taken in."""
    rewind: int
    """The rewind that these belong to."""
    produced: int
    """Rows computed."""
    produced_rewind: int
    successor_linked: bool
    passes: int = 0
    """Blocks that this node has run so far, for whomever: a queue that moves is slow, one that does
    not is stuck."""

    KIND: ClassVar[str] = "state"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "nonce": checks.counter,
        "position": checks.position,
        "rewind": checks.counter,
        "produced": checks.position,
        "produced_rewind": checks.counter,
        "successor_linked": checks.boolean,
        "passes": checks.counter,
    }


@dataclass(frozen=True, slots=True)
class Failed(Frame):
    """Any to originator, or receiver to sender: this session cannot go on here."""

    code: ErrorCode
    reason: str
    peer_id: str | None = None
    """Whose fault it is, when not the sender's of this frame (a successor not reached)."""

    KIND: ClassVar[str] = "failed"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "code": checks.error_code,
        "reason": checks.text(MAX_REASON),
        "peer_id": checks.optional(checks.peer_id),
    }


@dataclass(frozen=True, slots=True)
class Close(Frame):
    """Originator to hop: the session is over, free its cache."""

    reason: str

    KIND: ClassVar[str] = "close"
    CHECKS: ClassVar[Mapping[str, Check]] = {"reason": checks.text(MAX_REASON)}


@dataclass(frozen=True, slots=True)
class Describe(Frame):
    """On the describe protocol: tell me about yourself."""

    blocks: int | None = None
    """How many of its blocks a session would run that the asker is about to open, if it is. Others
    who ask in that moment are told of it (``expected.py``)."""

    KIND: ClassVar[str] = "describe"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "blocks": checks.optional(checks.integer(1, MAX_BLOCKS)),
    }


@dataclass(frozen=True, slots=True)
class Description(Frame):
    """On the describe protocol: the node's fresh announcement and its load."""

    announcement: bytes
    """As in the DHT, signed; empty for a node that serves nothing."""
    figures: Mapping[str, float]
    """The node's statistics by name."""

    KIND: ClassVar[str] = "description"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "announcement": checks.binary(0, 8192),
        "figures": checks.figures,
    }


@dataclass(frozen=True, slots=True)
class WantManifest(Frame):
    """On the shard protocol: send me a model's manifest, from this byte on."""

    model: str
    """The model's fingerprint, hexadecimal."""
    offset: int

    KIND: ClassVar[str] = "want_manifest"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "model": _fingerprint,
        "offset": checks.integer(0, MAX_MANIFEST),
    }


@dataclass(frozen=True, slots=True)
class ManifestPart(Frame):
    """On the shard protocol: a piece of a manifest."""

    total: int
    """Bytes of the whole manifest."""
    offset: int
    data: bytes | memoryview

    KIND: ClassVar[str] = "manifest_part"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "total": checks.integer(1, MAX_MANIFEST),
        "offset": checks.integer(0, MAX_MANIFEST),
    }
    BYTES: ClassVar[frozenset[str]] = frozenset({"data"})


@dataclass(frozen=True, slots=True)
class WantHoldings(Frame):
    """On the shard protocol: say which chunks of these shards you have."""

    model: str
    shards: tuple[int, ...]

    KIND: ClassVar[str] = "want_holdings"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "model": _fingerprint,
        "shards": checks.tuple_of(_shard, MAX_SHARDS_ASKED),
    }


@dataclass(frozen=True, slots=True)
class Holdings(Frame):
    """On the shard protocol: which chunks I have, as bits, shard by shard (``holdings.py``)."""

    bits: bytes | memoryview

    KIND: ClassVar[str] = "holdings"
    CHECKS: ClassVar[Mapping[str, Check]] = {}
    BYTES: ClassVar[frozenset[str]] = frozenset({"bits"})


@dataclass(frozen=True, slots=True)
class WantChunk(Frame):
    """On the shard protocol: send me a chunk."""

    model: str
    shard: int
    chunk: int

    KIND: ClassVar[str] = "want_chunk"
    CHECKS: ClassVar[Mapping[str, Check]] = {
        "model": _fingerprint,
        "shard": _shard,
        "chunk": _chunk,
    }


@dataclass(frozen=True, slots=True)
class Chunk(Frame):
    """On the shard protocol: a chunk. Answers come in the order in which they were asked for."""

    shard: int
    chunk: int
    data: bytes | memoryview

    KIND: ClassVar[str] = "chunk"
    CHECKS: ClassVar[Mapping[str, Check]] = {"shard": _shard, "chunk": _chunk}
    BYTES: ClassVar[frozenset[str]] = frozenset({"data"})


@dataclass(frozen=True, slots=True)
class NoChunk(Frame):
    """On the shard protocol: I have no such chunk (any more)."""

    shard: int
    chunk: int

    KIND: ClassVar[str] = "no_chunk"
    CHECKS: ClassVar[Mapping[str, Check]] = {"shard": _shard, "chunk": _chunk}


FRAMES: dict[str, type[Frame]] = {
    frame.KIND: frame
    for frame in (
        Hello, Open, Ready, Refused, Link, Resume, Step, Output, Relink, Probe, State, Failed,
        Close, Describe, Description, WantManifest, ManifestPart, WantHoldings, Holdings, WantChunk,
        Chunk, NoChunk,
    )
}  # fmt: skip
