"""Private swarms: the key that all nodes of one share, and the peers that a node lets in.

The key's file is the one that libp2p's implementations share (``/key/swarm/psk/1.0.0/``): three
lines, of which the last is 32 bytes in hexadecimal. The list has one peer id a line; what stands
behind ``#`` is for people.

Rules of this file: whatever is wrong with a file is a ``ConfigError`` that names it and the line; a
key is never printed, and its file is made for its owner only and never overwritten.
"""

import base64
import binascii
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import base58

from ..protocol.errors import ConfigError

KEY_BYTES = 32
_HEADER = "/key/swarm/psk/1.0.0/"
_ENCODINGS: Mapping[str, Callable[[str], bytes]] = {
    "/base16/": bytes.fromhex,
    "/base64/": partial(base64.b64decode, validate=True),
}
_MAX_FILE_BYTES = 1024 * 1024
_ED25519_PEER_ID = bytes.fromhex("002408011220")


@dataclass(frozen=True)
class Privacy:
    """Who may take part."""

    swarm_key: bytes | None = field(default=None, repr=False)
    """What all nodes of the swarm share; None: anybody may connect."""
    allowed: frozenset[str] | None = None
    """Peer ids; None: anybody."""

    @classmethod
    def of_files(cls, swarm_key: Path | None, allow_peers: Path | None) -> "Privacy":
        """What the files say, where there are some. Raises ConfigError."""
        return cls(
            None if swarm_key is None else load_swarm_key(swarm_key),
            None if allow_peers is None else load_allowed_peers(allow_peers),
        )

    def allows(self, peer_id: str) -> bool:
        """Whether this node has to do with that peer."""
        return self.allowed is None or peer_id in self.allowed


def load_swarm_key(file: Path) -> bytes:
    """The key in a file. Raises ConfigError."""
    lines = _read(file, "swarm key").split()
    if len(lines) != 3 or lines[0] != _HEADER:
        raise ConfigError(
            f"{file} is no swarm key: its lines are {_HEADER}, /base16/ and 64 hexadecimal digits; "
            "`petals-node swarm-key FILE` makes one"
        )
    if lines[1] not in _ENCODINGS:
        raise ConfigError(f"{file}: {lines[1]!r} is neither {' nor '.join(_ENCODINGS)}")
    try:
        key = _ENCODINGS[lines[1]](lines[2])
    except (ValueError, binascii.Error):
        raise ConfigError(f"{file}: its third line is not what {lines[1]} promises") from None
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{file}: a swarm key has {KEY_BYTES} bytes, not {len(key)}")
    return key


def make_swarm_key(file: Path) -> None:
    """Write a fresh key to a file that is not there yet. Raises ConfigError."""
    text = f"{_HEADER}\n/base16/\n{secrets.token_hex(KEY_BYTES)}\n"
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{file} is there already; whoever has the key in it would be locked out"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)


def load_allowed_peers(file: Path) -> frozenset[str]:
    """The peer ids in a file. Raises ConfigError."""
    allowed = set()
    for number, line in enumerate(_read(file, "list of allowed peers").splitlines(), start=1):
        peer_id = line.partition("#")[0].strip()
        if not peer_id:
            continue
        if not _is_peer_id(peer_id):
            raise ConfigError(
                f"{file}, line {number}: {peer_id!r} is not a peer id, such as 12D3KooW…; a node "
                "prints its own when it starts"
            )
        allowed.add(peer_id)
    return frozenset(allowed)


def _is_peer_id(text: str) -> bool:
    try:
        decoded = base58.b58decode(text)
    except ValueError:
        return False
    return decoded.startswith(_ED25519_PEER_ID) and len(decoded) == len(_ED25519_PEER_ID) + 32


def _read(file: Path, what: str) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {file}: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{file} has more than {_MAX_FILE_BYTES} bytes, and is no {what}")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not text, and no {what}") from None
