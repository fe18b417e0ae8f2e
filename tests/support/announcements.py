"""Keys, peer ids and announcements for tests, made from small numbers."""

from collections.abc import Callable
from functools import cache
from random import Random  # noqa: TID251 - tests throw dice with known seeds
from typing import Any

import base58
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from petals.protocol.announcement import Announcement, PeerState, encode_signed
from petals.protocol.span import Span

NOW = 1_800_000_000.0
MODEL = "ab" * 32


@cache
def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


@cache
def peer_id(number: int) -> str:
    public = key(number).public_key().public_bytes_raw()
    return base58.b58encode(bytes.fromhex("002408011220") + public).decode()


def signer(number: int) -> Callable[[bytes], bytes]:
    return key(number).sign


def dice(seed: int = 1) -> Random:
    return Random(seed)


def announce(number: int, blocks: Span | None, **changes: Any) -> Announcement:
    """What peer ``number`` says about itself; ``changes`` are fields other than the usual."""
    fields: dict[str, Any] = {
        "peer_id": peer_id(number),
        "multiaddrs": (f"/ip4/10.0.0.{number % 250}/tcp/4001",),
        "model": MODEL,
        "model_name": "demo",
        "num_blocks": 8,
        "span": blocks,
        "state": PeerState.ONLINE,
        "dtype": "float32",
        "decode_speed": 100.0,
        "prefill_speed": 1000.0,
        "cache_tokens_left": 4096,
        "sessions": 0,
        "version": "0.1.0",
        "sequence": 1,
        "expires_at": NOW + 60,
    }
    return Announcement(**fields | changes)


def entry(number: int, blocks: Span | None, **changes: Any) -> bytes:
    """The same, signed."""
    return encode_signed(announce(number, blocks, **changes), signer(number))
