"""Who a node is: an Ed25519 key that lives in one file, and the peer id that follows from it.

Rules of this file: the key never leaves the file unprotected (mode 0600 in a folder of mode 0700),
a file is either complete or not there (it is written beside its place and linked into it), and
everything that can be wrong with the path is a ``ConfigError`` that says so. No libp2p here: a
peer id is the identity multihash of the public key in libp2p's protobuf form, in base58.
"""

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import base58
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from ..protocol.errors import ConfigError

# libp2p's PublicKey protobuf {type: Ed25519 (1), data: 32 bytes}, inside a multihash "identity".
_PUBLIC_KEY_PROTOBUF = b"\x08\x01\x12\x20"
_IDENTITY_MULTIHASH = b"\x00\x24"
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True)
class Identity:
    """A key pair and the peer id that it proves."""

    private_key: bytes = field(repr=False)
    """The raw 32-byte Ed25519 seed. Secret."""
    public_key: bytes = field(init=False)
    """The raw 32-byte public key."""
    peer_id: str = field(init=False)
    """libp2p's peer id of the public key, in base58 (``12D3Koo…``)."""

    def __post_init__(self) -> None:
        public = Ed25519PrivateKey.from_private_bytes(self.private_key).public_key()
        raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        object.__setattr__(self, "public_key", raw)
        peer_id = base58.b58encode(_IDENTITY_MULTIHASH + _PUBLIC_KEY_PROTOBUF + raw).decode()
        object.__setattr__(self, "peer_id", peer_id)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``message``."""
        return Ed25519PrivateKey.from_private_bytes(self.private_key).sign(message)


def new_identity() -> Identity:
    """A fresh identity that is kept nowhere."""
    return Identity(secrets.token_bytes(32))


def load_identity(path: Path) -> Identity:
    """The identity in ``path``, made now if the file is not there yet.

    Two processes that make the same file at once end up with the same identity. Raises ConfigError
    when the path cannot be read or written, or holds something else.
    """
    for _ in range(2):  # a second time if another process has made the file in between
        try:
            return _parse(path, _read(path))
        except FileNotFoundError:
            pass
        try:
            return _create(path)
        except FileExistsError:
            continue
    raise ConfigError(f"the identity file {path} appears and disappears; is something deleting it?")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(
            f"cannot read the identity file {path} ({error.strerror}); "
            "make it readable for this user, or name another one with --identity"
        ) from error


def _parse(path: Path, data: bytes) -> Identity:
    problem = ConfigError(
        f"{path} does not hold an Ed25519 private key (PEM, not encrypted); move it away to get a "
        "new identity, restore it to keep the old one, or name another file with --identity"
    )
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise problem from error
    if not isinstance(key, Ed25519PrivateKey):
        raise problem
    return Identity(key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))


def _create(path: Path) -> Identity:
    identity = new_identity()
    pem = Ed25519PrivateKey.from_private_bytes(identity.private_key).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(descriptor)
            # A link, unlike a rename, fails if somebody else was first: neither key is lost.
            os.link(draft, path)
        finally:
            draft.unlink()
    except FileExistsError:
        if path.parent.is_dir():
            raise
        raise ConfigError(
            f"cannot make the identity file {path}: {path.parent} is not a folder; "
            "name another place with --identity or --data-dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot write the identity file {path} ({error.strerror}); make its folder writable "
            "for this user, or name another place with --identity or --data-dir"
        ) from error
    return identity
