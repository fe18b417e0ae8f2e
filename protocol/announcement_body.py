"""An announcement's fields as they travel: few bytes, since thousands are kept, sent and sent again.

Names are short, what has its usual value is left out, keys of peers and fingerprints are bytes and not
text, and an address that ends in ``/p2p/`` means one that goes on with the announcement's own peer id.
With the names and texts written out, an entry would be nearly twice as long, and a record would hold
half as many.

Rule of this file: ``restored`` takes anything; what does not look as it should it leaves to the checks
of the fields.
"""

from collections.abc import Mapping
from typing import Any

import base58

from .checks import BadValueError
from .coordinates import Coordinate
from .span import Span

NAMES: Mapping[str, str] = {
    "peer_id": "id",
    "multiaddrs": "at",
    "model": "m",
    "model_name": "mn",
    "num_blocks": "n",
    "span": "b",
    "state": "st",
    "dtype": "dt",
    "decode_speed": "ds",
    "prefill_speed": "ps",
    "cache_tokens_left": "c",
    "sessions": "s",
    "version": "v",
    "sequence": "sq",
    "expires_at": "ex",
    "moving_to": "mv",
    "session_blocks": "sb",
    "public_name": "pn",
    "network_speed": "ns",
    "round_trips": "rt",
    "coordinate": "xy",
    "shards": "sh",
}
"""What the fields of ``Announcement`` are called on the wire."""
USUAL: Mapping[str, Any] = {
    "span": None,
    "moving_to": None,
    "session_blocks": 0,
    "public_name": None,
    "network_speed": None,
    "round_trips": {},
    "coordinate": None,
    "shards": (),
}
"""What a field says that is left out."""

KEY_BYTES = 32
_FIELDS = {short: name for name, short in NAMES.items()}
_ED25519_PEER_ID = bytes.fromhex("002408011220")
"""An identity multihash of 36 bytes: the protobuf of a public key, type Ed25519, 32 bytes."""
_MAX_PEER_ID = 64
_P2P = "/p2p/"


def public_key(peer_id: str) -> bytes:
    """The Ed25519 key that ``peer_id`` spells out."""
    try:
        decoded = base58.b58decode(peer_id) if len(peer_id) <= _MAX_PEER_ID else b""
    except ValueError:
        decoded = b""
    key = decoded[len(_ED25519_PEER_ID) :]
    # base58 skips blanks at the end: one peer must not have several spellings
    if len(key) != KEY_BYTES or _peer_id(key) != peer_id:
        raise BadValueError("the peer id of an Ed25519 key, such as 12D3KooW…")
    return key


def _peer_id(key: bytes) -> str:
    return base58.b58encode(_ED25519_PEER_ID + key).decode()


def plain(value: Any) -> Any:
    """A field's value in msgpack's own types."""
    if isinstance(value, Span):
        return [value.start, value.end]
    if isinstance(value, Coordinate):
        return value.plain()
    if isinstance(value, Mapping):
        return dict(value)
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def shortened(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an announcement, plain and in bounds, by their names on the wire."""
    body = {
        NAMES[name]: value
        for name, value in fields.items()
        if name not in USUAL or value != plain(USUAL[name])
    }
    own = fields["peer_id"]
    body["id"] = public_key(own)
    body["at"] = [
        address.removesuffix(own) if address.endswith(_P2P + own) else address
        for address in fields["multiaddrs"]
    ]
    if len(fields["model"]) % 2 == 0:
        body["m"] = bytes.fromhex(fields["model"])
    if fields["round_trips"]:
        body["rt"] = {public_key(peer): time for peer, time in fields["round_trips"].items()}
    return body


def restored(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields, not checked yet, and what else there was: fields of newer versions."""
    fields = {**USUAL, **{_FIELDS[key]: value for key, value in body.items() if key in _FIELDS}}
    unknown = {key: value for key, value in body.items() if key not in _FIELDS}
    own = fields["peer_id"] = _text_of(fields.get("peer_id"))
    match fields:
        case {"multiaddrs": list(addresses)} if isinstance(own, str):
            fields["multiaddrs"] = [
                address + own if isinstance(address, str) and address.endswith(_P2P) else address
                for address in addresses
            ]
    match fields:
        case {"model": bytes(digest)}:
            fields["model"] = digest.hex()
    match fields:
        case {"round_trips": dict(times)}:
            fields["round_trips"] = {_text_of(peer): time for peer, time in times.items()}
    return fields, unknown


def _text_of(key: Any) -> Any:
    return _peer_id(key) if isinstance(key, bytes) and len(key) == KEY_BYTES else key
