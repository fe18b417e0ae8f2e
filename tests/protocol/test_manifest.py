"""What a manifest says, that it comes out as it went in, and that nothing else does."""

import hashlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.protocol.errors import LocalProtocolError, RemoteProtocolError
from petals.protocol.manifest import (
    ELEMENT_BYTES,
    FILE_NAMES,
    FIRST_BLOCK,
    HASH_BYTES,
    MAX_CHUNK,
    MAX_MANIFEST,
    MAX_TABLE,
    MIN_CHUNK,
    File,
    Manifest,
    Shard,
    Tensor,
    chunk_bytes_for,
    chunks_of,
    decode_manifest,
    parse_model,
    shards_of,
    stored_order,
)
from petals.protocol.span import Span

CONFIG = File("config.json", 700)
NORM = Tensor("h.0.norm.weight", "float32", (48,))
MATRIX = Tensor("h.0.mlp.weight", "float16", (400, 200))


def shard(*entries: Any, chunk_bytes: int = MIN_CHUNK) -> Shard:
    size = sum(entry.size for entry in entries)
    return Shard(tuple(entries), b"#" * HASH_BYTES * chunks_of(size, chunk_bytes))


def manifest(*blocks: Shard, files: Shard | None = None, ends: Shard | None = None) -> Manifest:
    return Manifest(
        MIN_CHUNK,
        files or shard(CONFIG),
        ends or shard(Tensor("ln_f.weight", "float32", (48,))),
        blocks or (shard(NORM, MATRIX),),
    )


def plain(*, version: Any = 1, chunk_bytes: Any = MIN_CHUNK, table: Any, hashes: int = 0) -> bytes:
    packed: bytes = msgpack.packb(
        [version, chunk_bytes, msgpack.packb(table), b"#" * HASH_BYTES * hashes]
    )
    return packed


def refused(data: bytes) -> str:
    """What is said of bytes whose hash is the one asked for."""
    with pytest.raises(RemoteProtocolError) as refusal:
        decode_manifest(data, hashlib.sha256(data).hexdigest())
    return str(refusal.value)


def tensors(prefix: str) -> st.SearchStrategy[Shard]:
    drawn = st.builds(
        Tensor,
        st.text("abc.", min_size=1, max_size=5).map(lambda name: prefix + name),
        st.sampled_from(sorted(ELEMENT_BYTES)),
        st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple),
    )
    unique = st.lists(drawn, min_size=1, max_size=5, unique_by=lambda tensor: tensor.name)
    return unique.map(lambda entries: shard(*sorted(entries, key=stored_order)))


file_shards = st.dictionaries(st.sampled_from(sorted(FILE_NAMES)), st.integers(0, 200_000)).map(
    lambda sizes: shard(*(File(*item) for item in sorted((sizes | {"config.json": 9}).items())))
)
manifests = st.builds(
    Manifest,
    st.just(MIN_CHUNK),
    file_shards,
    tensors("ends."),
    st.lists(tensors("h."), min_size=1, max_size=4).map(tuple),
)


@given(manifests)
def test_a_manifest_comes_out_as_it_went_in(made: Manifest) -> None:
    assert decode_manifest(made.encoded, made.fingerprint) == made


@given(manifests, st.integers(0), st.integers(0, 255))
def test_one_that_was_tampered_with_is_not_the_one_asked_for(
    made: Manifest, place: int, value: int
) -> None:
    data = bytearray(made.encoded)
    data[place % len(data)] = value
    if bytes(data) != made.encoded:
        with pytest.raises(RemoteProtocolError, match="is not the manifest of"):
            decode_manifest(bytes(data), made.fingerprint)


@given(st.binary(max_size=200))
def test_nonsense_is_refused(data: bytes) -> None:
    refused(data)


@given(manifests, st.integers(0), st.binary(max_size=4))
def test_whatever_a_hostile_author_makes_up_is_refused_or_has_one_encoding(
    made: Manifest, place: int, value: bytes
) -> None:
    place %= len(made.encoded)
    data = made.encoded[:place] + value + made.encoded[place + len(value) :]
    try:
        decoded = decode_manifest(data, hashlib.sha256(data).hexdigest())
    except RemoteProtocolError:
        return
    assert decoded.encoded == data


def test_what_it_says() -> None:
    made = manifest()
    assert made.size == 700 + 192 + 192 + 160_000
    assert made.blocks[0].num_chunks == 3
    assert [made.chunk_size(FIRST_BLOCK, chunk) for chunk in range(3)] == [65536, 65536, 29120]
    assert made.blocks[0].hash_of(1) == b"#" * 32
    assert repr(made) == f"<Manifest {made.fingerprint[:16]} of 1 blocks, 161084 bytes>"
    assert repr(made.ends) == "<Shard of 1 entries, 192 bytes>"
    assert shards_of(Span(3, 5)) == range(5, 7)


def test_shards_are_filed_by_what_they_contain() -> None:
    assert shard(NORM).digest == shard(NORM).digest
    assert shard(NORM).digest != Shard((NORM,), b"!" * 32).digest
    assert shard(NORM).digest != shard(Tensor("another", "float32", (48,))).digest


@pytest.mark.parametrize(
    ("size", "chunk_bytes"),
    [
        (0, MIN_CHUNK),
        (15_000_000, MIN_CHUNK),
        (4096 * MIN_CHUNK, MIN_CHUNK),
        (4096 * MIN_CHUNK + 4096, 2 * MIN_CHUNK),
        (1 << 31, 1 << 19),
        (352_000_000_000, MAX_CHUNK),
    ],
)
def test_larger_models_have_larger_chunks(size: int, chunk_bytes: int) -> None:
    assert chunk_bytes_for(size) == chunk_bytes


def test_a_model_is_called_by_its_fingerprint() -> None:
    assert parse_model("petals:" + "0af" * 21 + "b") == "0af" * 21 + "b"
    assert parse_model("demo") is None
    for wrong in ("petals:", "petals:demo", "petals:" + "A" * 64, "petals:" + "a" * 65):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            parse_model(wrong)


FILES, ENDS, BLOCK = [["config.json", 1]], [["a", "float32", [1]]], [["b", "float32", [1]]]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes(MAX_MANIFEST + 1), "is over"),
        (b"\xc1", "not valid msgpack"),
        (msgpack.packb({"a": 1}), "not valid msgpack"),
        (b"\x91" * 5000, "not valid msgpack"),
        (msgpack.packb([1, MIN_CHUNK, [], b""]), r"must be \[version"),
        (msgpack.packb([1, MIN_CHUNK, bytes(MAX_TABLE + 1), b""]), r"must be \[version"),
        (plain(version=2, table=[]), "version 2 is not understood"),
        (plain(version=1.0, table=[FILES, ENDS, BLOCK], hashes=3), "one encoding"),
        (plain(table=[FILES, ENDS, BLOCK], hashes=3) + b"\0", "not valid msgpack"),
        (plain(chunk_bytes=MIN_CHUNK - 1, table=[FILES, ENDS, BLOCK], hashes=3), "chunks must"),
        (plain(chunk_bytes=True, table=[FILES, ENDS, BLOCK], hashes=3), "chunks must"),
        (plain(table=7), "shards must be the files"),
        (plain(table=[FILES, ENDS]), "shards must be the files"),
        (plain(table=[FILES, ENDS, []]), "one entry at least"),
        (plain(table=[FILES, ENDS, 7]), "one entry at least"),
        (plain(table=[FILES, ENDS, BLOCK], hashes=2), "one for each chunk"),
        (plain(table=[FILES, ENDS, BLOCK], hashes=4), "one for each chunk"),
        (plain(table=[[["../../.bashrc", 1]], ENDS, BLOCK]), "files must be .name"),
        (plain(table=[[["modeling.py", 1]], ENDS, BLOCK]), "files must be .name"),
        (plain(table=[[["config.json", -1]], ENDS, BLOCK]), "files must be .name"),
        (plain(table=[[["config.json", 1 << 40]], ENDS, BLOCK]), "files must be .name"),
        (plain(table=[[["vocab.txt", 1]], ENDS, BLOCK]), "config.json among them"),
        (plain(table=[[*FILES, *FILES], ENDS, BLOCK]), "in the order of their names"),
        (plain(table=[[*FILES, ["vocab.txt", 1 << 28]], ENDS, BLOCK]), "files fewer"),
        (plain(table=[FILES, ENDS, [["a/b", "float32", [1]]]]), "tensors must be .name"),
        (plain(table=[FILES, ENDS, [["a", "int8", [1]]]]), "tensors must be .name"),
        (plain(table=[FILES, ENDS, [["a", "float32", []]]]), "tensors must be .name"),
        (plain(table=[FILES, ENDS, [["a", "float32", [0]]]]), "an integer from 1"),
        (plain(table=[FILES, ENDS, [["a", "float32", [1.0]]]]), "an integer from 1"),
        (plain(table=[FILES, ENDS, [["a", "float32", [1 << 40] * 8]]]), "at most"),
        (plain(table=[FILES, ENDS, [*BLOCK, *ENDS]]), "in their order"),
        (plain(table=[FILES, ENDS, [*BLOCK, *BLOCK]]), "each name once"),
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused_in_words(data: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        decode_manifest(data, hashlib.sha256(data).hexdigest())


def test_what_others_would_refuse_is_not_made() -> None:
    with pytest.raises(LocalProtocolError, match="each name once"):
        _ = manifest(shard(NORM, NORM)).fingerprint
