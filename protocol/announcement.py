"""What a node tells the swarm about itself, as signed bytes, and how records of them merge.

An *announcement* is one node's signed, sequenced, expiring statement. Signed, it is an *entry*: the
msgpack array ``[body, signature]``, where the body is a msgpack map of the fields below, as
``announcement_body.py`` shortens them. The signature is Ed25519's over the body's bytes by the key that the peer id spells out, so an entry
proves itself wherever it was found. A *record* is what the DHT keeps under one key: a msgpack array
of entries, at most one for each peer, which every holder merges and nobody overwrites.

Rules of this file:

* Everything that decodes takes bytes from strangers, and raises only ``RemoteProtocolError``.
* Sizes are checked before anything is built from the bytes.
* Whatever will be shown to a person is printable: no terminal escapes, no line breaks.
* Fields that a newer version added are kept, and stay covered by the signature.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2b, sha256
from itertools import accumulate
from types import MappingProxyType
from typing import Any, ClassVar

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from . import checks, coordinates
from .announcement_body import plain, public_key, restored, shortened
from .checks import MAX_ADDRESS, MAX_ADDRESSES, MAX_BLOCKS, BadValueError, Check
from .coordinates import Coordinate
from .errors import LocalProtocolError, RemoteProtocolError
from .span import Span

MAX_ENTRY_BYTES = 4096
"""One entry with every field at its limit fits, with a little room for newer versions' fields."""
MAX_RECORD_BYTES = 64 * 1024
"""Some two hundred ordinary entries: enough good candidates for a lookup, and cheap to merge and send."""
MAX_RECORD_ENTRIES = 256
SAMPLE_SECONDS = 600.0
"""After which a holder that cannot keep all keeps others: their next announcements are at most a minute
away."""
REGION_BLOCKS = 8
"""Consecutive blocks under one DHT key, so that no record has to hold all nodes of a large model
and no node has to write one key for every block."""
MAX_TIME_TO_LIVE = 300.0
"""Seconds. A node that died is believed in for at most this long, whatever it announced."""
CLOCK_SKEW = 60.0
"""Seconds by which the announcing node's clock may be ahead of ours."""
MAX_PUBLIC_NAME = 64
MAX_MODEL_NAME = 96
MAX_DEPTH = 8
"""Of fields that newer versions may have added; deeper ones serve to exhaust somebody's stack."""
MAX_ROUND_TRIPS = 16
"""A node's nearest few successors. In a large swarm coordinates have to do (``upkeep.py``)."""
MAX_SHARD_RUNS = 12
"""Of a node that has moved about; of more, others learn when they ask it."""
MAX_ROUND_TRIP = 60.0
"""Seconds."""

SWARM_KEY = b"/petals/swarm"
"""The DHT key under which models of any name are listed."""

_SIGNED_AS = b"petals announcement 1\n"
"""Goes before the body when signing, so that no other protocol's signature can pass for one."""
_MAX_PEER_ID = 64
_ADDRESS = re.compile(rf"/[!-~]{{1,{MAX_ADDRESS - 1}}}")
_ENTRY_PREFIX = 3
_ROOM = MAX_RECORD_BYTES - _ENTRY_PREFIX
"""What the entries of a record may take: msgpack puts 3 bytes before each, and before the array."""
MAX_SPEED = 1e12


class PeerState(StrEnum):
    """Where a node is in its life."""

    JOINING = "joining"
    """Has chosen its span and is loading it."""
    ONLINE = "online"
    DRAINING = "draining"
    """Serves the sessions that it has, and takes no new ones."""
    OFFLINE = "offline"
    """Has left: said by the node itself, so that nobody has to wait for the expiry."""


def _peer_id(value: Any) -> str:
    peer_id: str = checks.text(_MAX_PEER_ID)(value)
    public_key(peer_id)
    return peer_id


def _matching(pattern: str | re.Pattern[str], described: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            raise BadValueError(described)
        return value

    return check


def _public_name(value: Any) -> str:
    if not isinstance(value, str) or value != as_public_name(value):
        raise BadValueError(f"1 to {MAX_PUBLIC_NAME} printable characters")
    return value


def _round_trips(value: Any) -> Mapping[str, float]:
    if not isinstance(value, Mapping) or len(value) > MAX_ROUND_TRIPS:
        raise BadValueError(f"a map of at most {MAX_ROUND_TRIPS} round-trip times")
    seconds = checks.number(0, MAX_ROUND_TRIP)
    return MappingProxyType({_peer_id(peer): seconds(time) for peer, time in value.items()})


def _state(value: Any) -> PeerState:
    try:
        return PeerState(value)
    except ValueError:
        raise BadValueError(f"one of {', '.join(PeerState)}") from None


def as_public_name(text: str) -> str:
    """``text`` made fit to be a public name: what cannot be printed becomes "?", the end is cut."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_PUBLIC_NAME]) or "?"


def as_model_name(text: str) -> str:
    """``text`` made fit to be a model's name: what is not ASCII becomes "?", the end is cut."""
    return "".join(char if " " <= char <= "~" else "?" for char in text[:MAX_MODEL_NAME]) or "?"


def as_multiaddrs(addresses: Iterable[str]) -> tuple[str, ...]:
    """Of ``addresses``, in order, those that an announcement can carry."""
    return tuple(address for address in addresses if _ADDRESS.fullmatch(address))[:MAX_ADDRESSES]


@dataclass(frozen=True, slots=True)
class Announcement:
    """One node's statement about itself."""

    peer_id: str
    multiaddrs: tuple[str, ...]
    """Where it can be dialled, best first."""
    model: str
    """The model's fingerprint, hexadecimal."""
    model_name: str
    """What people call the model; another model may have the same name."""
    num_blocks: int
    """Of the whole model."""
    span: Span | None
    """The blocks that it serves, or will when it is online; None: none."""
    state: PeerState
    dtype: str
    """What it computes in: an element type's name or a quantisation's."""
    decode_speed: float
    """Tokens per second through one block, one session alone; 0: not measured."""
    prefill_speed: float
    """Tokens per second through one block with many rows at once; 0: not measured."""
    cache_tokens_left: int
    """Positions that new sessions can still reserve."""
    sessions: int
    """Open now."""
    version: str
    """Of the node's software."""
    sequence: int
    """Of two announcements by one peer the one with the higher sequence is the newer."""
    expires_at: float
    """Unix seconds."""
    moving_to: Span | None = None
    """What it is loading to serve instead of ``span``, which it serves meanwhile."""
    session_blocks: int = 0
    """Over all open sessions, the blocks that they run here: what a step may have to wait for."""
    public_name: str | None = None
    network_speed: float | None = None
    """Bytes per second that it can send; None: not measured."""
    round_trips: Mapping[str, float] = field(default_factory=dict)
    """Seconds to the peers that it would send to, by peer id."""
    coordinate: Coordinate | None = None
    """Where it is in the space of round trips, if it knows."""
    shards: tuple[Span, ...] = ()
    """Of the model's shards (``manifest.py``), the runs that it gives to whoever asks."""
    unknown: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Fields of newer versions, as they came."""

    @property
    def serves_all(self) -> bool:
        """Whether it serves already what it has chosen to serve."""
        return self.state is PeerState.ONLINE and self.moving_to is None

    @property
    def relayed(self) -> bool:
        """Whether it can be reached through relays only: all its addresses lead through one."""
        for address in self.multiaddrs:
            if "/p2p-circuit" not in address:
                return False
        return bool(self.multiaddrs)

    CHECKS: ClassVar[Mapping[str, Check]] = {
        "peer_id": _peer_id,
        "multiaddrs": checks.tuple_of(
            _matching(_ADDRESS, f"multiaddrs of at most {MAX_ADDRESS} ASCII characters"),
            MAX_ADDRESSES,
        ),
        "model": _matching("[0-9a-f]{8,64}", "8 to 64 hexadecimal digits"),
        "model_name": _matching(
            f"[ -~]{{1,{MAX_MODEL_NAME}}}", f"1 to {MAX_MODEL_NAME} ASCII characters"
        ),
        "num_blocks": checks.integer(1, MAX_BLOCKS),
        "span": checks.optional(checks.span),
        "state": _state,
        "dtype": _matching("[a-z0-9_.+-]{1,24}", "the name of an element type"),
        "decode_speed": checks.number(0, MAX_SPEED),
        "prefill_speed": checks.number(0, MAX_SPEED),
        "cache_tokens_left": checks.counter,
        "sessions": checks.integer(0, 1 << 20),
        "version": _matching("[!-~]{1,24}", "a version of at most 24 ASCII characters"),
        "sequence": checks.counter,
        "expires_at": checks.number(0, 1e11),
        "moving_to": checks.optional(checks.span),
        "session_blocks": checks.counter,
        "public_name": checks.optional(_public_name),
        "network_speed": checks.optional(checks.number(0, MAX_SPEED)),
        "round_trips": _round_trips,
        "coordinate": checks.optional(coordinates.checked),
        "shards": checks.tuple_of(checks.span, MAX_SHARD_RUNS),
    }


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the fields of an Announcement. Raises BadValueError, naming the field."""
    values = {}
    for name, check in Announcement.CHECKS.items():
        try:
            values[name] = check(fields.get(name))
        except BadValueError as bad:
            raise BadValueError(f"an announcement's {name} must be {bad}") from None
    num_blocks = values["num_blocks"]
    for span in (values["span"], values["moving_to"]):
        if span is not None and span.end > num_blocks:
            raise BadValueError(f"the span {span} is not within the model's {num_blocks} blocks")
    return values


def encode_signed(announcement: Announcement, sign: Callable[[bytes], bytes]) -> bytes:
    """The entry of ``announcement``; ``sign`` signs with the key behind its peer id.

    Raises LocalProtocolError when a field is out of bounds.
    """
    fields = {name: plain(getattr(announcement, name)) for name in Announcement.CHECKS}
    try:
        _checked(fields)
    except BadValueError as bad:
        raise LocalProtocolError(str(bad)) from None
    packed: bytes = msgpack.packb({**announcement.unknown, **shortened(fields)})
    entry: bytes = msgpack.packb([packed, sign(_SIGNED_AS + packed)])
    if len(entry) > MAX_ENTRY_BYTES:
        raise LocalProtocolError(f"an announcement of {len(entry)} bytes is over {MAX_ENTRY_BYTES}")
    return entry


def _unpack(data: bytes, limit: int, what: str) -> Any:
    if len(data) > limit:
        raise RemoteProtocolError(f"{what} of {len(data)} bytes is over {limit}")
    try:
        value = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"{what} is not valid msgpack: {error}") from None
    layer = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in layer if isinstance(item, list | dict)]
        layer = [
            item
            for container in containers
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    if layer:
        raise RemoteProtocolError(f"{what} is nested more than {MAX_DEPTH} deep")
    return value


@lru_cache(maxsize=4096)  # a reader gets the same entry from every holder, a holder merges it again
def _parse(entry: bytes) -> Announcement:
    """The announcement in ``entry``, its signature verified, its time not yet looked at."""
    match _unpack(entry, MAX_ENTRY_BYTES, "an announcement"):
        case [bytes(body), bytes(signature)]:
            fields = _unpack(body, MAX_ENTRY_BYTES, "an announcement's body")
        case _:
            raise RemoteProtocolError("an announcement must be [body, signature]")
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise RemoteProtocolError("an announcement's body must be a map of fields by name")
    values, unknown = restored(fields)
    try:
        announcement = Announcement(**_checked(values), unknown=MappingProxyType(unknown))
        Ed25519PublicKey.from_public_bytes(public_key(announcement.peer_id)).verify(
            signature, _SIGNED_AS + body
        )
    except BadValueError as bad:
        raise RemoteProtocolError(str(bad)) from None
    except InvalidSignature:
        raise RemoteProtocolError("an announcement is not signed by the peer it names") from None
    return announcement


def decode_signed(data: bytes, now: float) -> Announcement:
    """The announcement in an entry. Raises RemoteProtocolError if it is not valid at ``now``."""
    announcement = _parse(data)
    if announcement.expires_at <= now:
        raise RemoteProtocolError(
            f"an announcement of {announcement.peer_id} expired "
            f"{now - announcement.expires_at:.0f} s ago (are both clocks right?)"
        )
    if announcement.expires_at > now + MAX_TIME_TO_LIVE + CLOCK_SKEW:
        raise RemoteProtocolError(
            f"an announcement of {announcement.peer_id} expires "
            f"{announcement.expires_at - now:.0f} s from now, over the {MAX_TIME_TO_LIVE:.0f} s "
            "that one may live (are both clocks right?)"
        )
    return announcement


def _digest(kind: bytes, name: str) -> bytes:
    return sha256(kind + b"\0" + name.encode()).hexdigest()[:32].encode()


def region_keys(fingerprint: str, span: Span) -> list[bytes]:
    """The DHT keys of the regions that ``span`` touches."""
    digest = _digest(b"model", fingerprint)
    first, last = span.start // REGION_BLOCKS, (span.end - 1) // REGION_BLOCKS
    return [b"/petals/%s/%d" % (digest, region) for region in range(first, last + 1)]


def weights_key(fingerprint: str) -> bytes:
    """The DHT key under which those are listed who have weights of a model to give."""
    return b"/petals/%s/weights" % _digest(b"model", fingerprint)


def model_key(model_name: str) -> bytes:
    """The DHT key under which models of that name are listed, whatever their fingerprint."""
    return b"/petals/" + _digest(b"name", model_name)


def merge_entries(
    existing: Iterable[bytes],
    incoming: Iterable[bytes],
    now: float,
    *,
    salt: bytes,
    whole: bool = False,
) -> list[bytes]:
    """The entries of both, each peer's newest only, ordered by peer id.

    Entries that are invalid at ``now`` are left out. When a record could not hold all, a fair sample
    stays: another one at each holder, which has a ``salt`` of its own, so that a reader of a few holders
    comes to know several times what one record holds; and another one after some minutes, so that
    everybody has a turn. ``whole``: all stay, for a reader.
    """
    newest: dict[str, tuple[int, bytes]] = {}
    for entries in (existing, incoming):
        for data in entries:
            try:
                made = decode_signed(data, now)
            except RemoteProtocolError:
                continue
            # a peer that signs two of one sequence contradicts itself; any order will do, if
            # every holder takes the same
            known = newest.get(made.peer_id, (-1, b""))
            newest[made.peer_id] = max(known, (made.sequence, data))
    kept = sorted(newest)
    sizes = {peer_id: _ENTRY_PREFIX + len(data) for peer_id, (_, data) in newest.items()}
    if not whole and (len(kept) > MAX_RECORD_ENTRIES or sum(sizes.values()) > _ROOM):
        turn = b"%s %d" % (salt, now // SAMPLE_SECONDS)
        drawn = sorted(kept, key=lambda peer_id: blake2b(peer_id.encode(), key=turn).digest())
        filled = accumulate(sizes[peer_id] for peer_id in drawn)
        fitting = sum(1 for size in filled if size <= _ROOM)
        kept = sorted(drawn[: min(fitting, MAX_RECORD_ENTRIES)])
    return [newest[peer_id][1] for peer_id in kept]
