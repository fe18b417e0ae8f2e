"""Announcements of simulated nodes: the product's own, with peer ids that stand for numbers."""

from __future__ import annotations

from functools import cache

import base58
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from petals.protocol.announcement import Announcement, PeerState, encode_signed
from petals.protocol.coordinates import Coordinate
from petals.protocol.span import Span

from .population import NUM_BLOCKS

MODEL = "5a" * 32
FOREVER = 1_800_000_000.25


@cache
def peer_id(number: int) -> str:
    """A peer id of the usual form; only number 0 has a key."""
    public = number.to_bytes(32, "big")
    if number == 0:
        public = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
    return base58.b58encode(bytes.fromhex("002408011220") + public).decode()


def announcement(
    peer: str,
    start: int,
    end: int,
    speed: float,
    session_blocks: int,
    *,
    online: bool = True,
    coordinate: Coordinate | None = None,
    round_trips: int = 0,
) -> Announcement:
    """What a node says of itself, in as many bytes as it really needs."""
    return Announcement(
        peer_id=peer,
        multiaddrs=(
            f"/ip4/203.0.113.77/tcp/31330/p2p/{peer}",
            f"/ip4/192.168.178.23/tcp/31330/p2p/{peer}",
        ),
        model=MODEL,
        model_name="bigscience/bloom",
        num_blocks=NUM_BLOCKS,
        span=Span(start, end),
        state=PeerState.ONLINE if online else PeerState.JOINING,
        dtype="nf4",
        decode_speed=speed,
        prefill_speed=speed * 50,
        cache_tokens_left=65_536,
        sessions=min(session_blocks, 1),
        session_blocks=session_blocks,
        version="0.1.0",
        sequence=1_800_000_000_000,
        expires_at=FOREVER,
        public_name="a machine under a desk",
        round_trips={peer_id(number): 0.0123 for number in range(1, round_trips + 1)},
        coordinate=coordinate,
    )


@cache
def entry_bytes(round_trips: int) -> int:
    """Of an ordinary announcement, signed."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    place = Coordinate((0.05, -0.06, 0.04), 0.004, 0.05)
    said = announcement(peer_id(0), 10, 20, 256.3, 10, coordinate=place, round_trips=round_trips)
    return len(encode_signed(said, key.sign))
