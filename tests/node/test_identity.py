"""The key in a file, and the peer id that follows from it."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import base58
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from petals.node.identity import Identity, load_identity, new_identity
from petals.protocol.errors import ConfigError

unless_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def test_peer_id_of_a_known_key() -> None:
    """Seed 01…01: the public key is fixed, and so is libp2p's name for it."""
    identity = Identity(b"\x01" * 32)
    assert identity.public_key.hex() == (
        "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c"
    )
    assert (
        identity.peer_id
        == base58.b58encode(bytes.fromhex("0024" + "08011220") + identity.public_key).decode()
    )
    assert identity.peer_id.startswith("12D3Koo")


def test_signatures_verify() -> None:
    identity = new_identity()
    public = Ed25519PublicKey.from_public_bytes(identity.public_key)
    public.verify(identity.sign(b"message"), b"message")


def test_the_key_is_not_in_its_repr() -> None:
    identity = new_identity()
    assert repr(identity.private_key) not in repr(identity)
    assert identity.peer_id in repr(identity)


def test_it_persists_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "identity.pem"
    first = load_identity(path)
    assert load_identity(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"
    assert b"PRIVATE KEY" in path.read_bytes()


def test_all_who_make_it_at_once_get_the_same(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    with ThreadPoolExecutor(8) as pool:
        identities = list(pool.map(load_identity, [path] * 8))
    assert len({identity.peer_id for identity in identities}) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAA==\n"])
def test_a_corrupt_file_is_kept_and_said_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="does not hold an Ed25519 private key") as caught:
        load_identity(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the identity file"):
        load_identity(tmp_path)


def test_a_file_where_its_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="identity file"):
        load_identity(tmp_path / "file" / "identity.pem")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_a_place_where_nothing_can_be_made() -> None:
    with pytest.raises(ConfigError, match="cannot write the identity file /proc/nowhere/key"):
        load_identity(Path("/proc/nowhere/key"))


@unless_root
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_identity(tmp_path / "identity.pem")


@unless_root
def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    load_identity(path)
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_identity(path)
