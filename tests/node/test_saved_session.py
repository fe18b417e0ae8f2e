"""A saved session comes back as it was, and whatever else is in the file is answered in words."""

import dataclasses
import hashlib
import os
import stat
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from petals.inference.sampling_params import SamplerState, SamplingParams
from petals.node.saved_session import (
    VERSION,
    SavedSession,
    Writing,
    decode,
    encode,
    load,
    save,
)
from petals.protocol.checks import MAX_BATCH
from petals.protocol.errors import ConfigError
from petals.protocol.tensor import DType

SESSION = SavedSession(
    model="demo",
    fingerprint="f00d" * 16,
    wire_dtype=DType.FLOAT32,
    max_tokens=20,
    padding=(0, 2),
    token_ids=((5, 6, 7, 8, 9), (0, 0, 7, 250_000, 9)),
    writing=Writing(
        begin=4,
        params=SamplingParams(max_new_tokens=8, temperature=0.8, seed=7, stop=("\n\n", "…")),
        sampler=SamplerState((False, True), b"dice"),
    ),
)
DIGEST = 32
PREFIX = struct.Struct("<14sHI")


@st.composite
def sessions(draw: st.DrawFn) -> SavedSession:
    batch = draw(st.integers(1, 4) | st.just(MAX_BATCH))
    length = draw(st.integers(0, 12))
    max_tokens = draw(st.integers(max(1, length - 1), 1000))
    row = st.tuples(*[st.integers(0, 2**32 - 1)] * length)
    writing = None
    if length and draw(st.booleans()):
        begin = draw(st.integers(1, length))
        params = SamplingParams(
            max_new_tokens=draw(st.integers(max(1, length - begin), 2**40)),
            temperature=draw(st.just(0) | st.floats(0.1, 10)),
            top_p=draw(st.floats(0.01, 1)),
            top_k=draw(st.integers(0, 2**63)),
            repetition_penalty=draw(st.floats(0.1, 10)),
            seed=draw(st.none() | st.integers(0, 2**63 - 1)),
            stop=tuple(draw(st.lists(st.text(min_size=1), max_size=3))),
        )
        finished = draw(st.tuples(*[st.booleans()] * batch))
        writing = Writing(begin, params, SamplerState(finished, draw(st.binary(min_size=1))))
    return SavedSession(
        model=draw(st.text(max_size=30)),
        fingerprint=draw(st.text("0123456789abcdef", max_size=64)),
        wire_dtype=draw(st.sampled_from(DType)),
        max_tokens=max_tokens,
        padding=draw(st.tuples(*[st.integers(0, max_tokens - 1)] * batch)),
        token_ids=draw(st.tuples(*[row] * batch)),
        writing=writing,
    )


@given(sessions())
def test_a_session_comes_back_as_it_was(session: SavedSession) -> None:
    assert decode(encode(session)) == session


def test_what_is_left_of_a_text() -> None:
    assert SESSION.writing is not None
    assert [SESSION.writing.left(length) for length in (4, 5, 12)] == [8, 7, 0]
    assert SESSION.unfinished
    ended = dataclasses.replace(SESSION.writing, sampler=SamplerState((True, True)))
    assert not dataclasses.replace(SESSION, writing=ended).unfinished
    assert not dataclasses.replace(SESSION, writing=None).unfinished


def sealed(content: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return content + hashlib.sha256(content).digest()


def forged(**changes: Any) -> bytes:
    """A file whose header says something else; None leaves a field out."""
    content = encode(SESSION)[:-DIGEST]
    magic, version, length = PREFIX.unpack_from(content)
    tokens = content[PREFIX.size + length :]
    header = msgpack.unpackb(content[PREFIX.size : PREFIX.size + length])
    for name, value in changes.items():
        inside = header["writing"] if name in header["writing"] else header
        if name in SamplingParams.__slots__:
            inside = header["writing"]["params"]
        inside[name] = value
        if value is None:
            del inside[name]
    packed = msgpack.packb(header)
    return sealed(PREFIX.pack(magic, version, len(packed)) + packed + tokens)


def test_a_forged_file_can_be_read_if_it_is_right() -> None:
    assert decode(forged()) == SESSION


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": 5}, "model: a text"),
        ({"model": None}, "a map of model, fingerprint"),
        ({"more": 1}, "a map of model, fingerprint"),
        ({"wire_dtype": "float8"}, "wire_dtype: one of"),
        ({"max_tokens": 0}, "max_tokens: an integer from 1"),
        ({"max_tokens": 3}, "5 tokens in a session of 3"),
        ({"padding": []}, "40 bytes of tokens for 0 texts of 5"),
        ({"padding": [0]}, "40 bytes of tokens for 1 texts of 5"),
        ({"padding": [0] * 65}, "padding: a list of at most 64"),
        ({"padding": [0, 20]}, "padding of 20 in a session of 20"),
        ({"length": 4}, "40 bytes of tokens for 2 texts of 4"),
        ({"length": 1 << 20}, "40 bytes of tokens"),
        ({"length": 1 << 40}, "length: an integer"),
        ({"length": True}, "length: an integer"),
        ({"begin": 0}, "writing: begin: an integer from 1"),
        ({"begin": 6}, "a prompt of 6 tokens"),
        ({"max_new_tokens": 0}, "writing: params: max_new_tokens"),
        ({"begin": 1, "max_new_tokens": 3}, "a prompt of 1 tokens and at most 3 new ones"),
        ({"temperature": float("nan")}, "writing: params: temperature"),
        ({"temperature": "hot"}, "writing: params: temperature"),
        ({"seed": -1}, "writing: params: seed"),
        ({"stop": "text"}, "writing: params: stop"),
        ({"top_k": None}, "a map of max_new_tokens"),
        ({"finished": [False]}, "2 texts, 1 in the sampler's state"),
        ({"finished": [0, 1]}, "finished: true or false"),
        ({"generator": b""}, "random generator's state is missing"),
        ({"generator": bytes(1 << 17)}, "generator: 0 to 65536 bytes"),
    ],
    ids=str,
)
def test_a_forged_file_is_told_what_is_wrong_with_it(
    changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=r"^the saved session is damaged") as caught:
        decode(forged(**changes))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "header", [b"", b"\xc1", b"\x91" * 2000, b"\xdf\xff\xff\xff\xff", b"\xc0", b"\x81\x80\x01"]
)
def test_a_header_that_is_none(header: bytes) -> None:
    with pytest.raises(ConfigError, match="damaged"):
        decode(sealed(PREFIX.pack(b"petals-session", VERSION, len(header)) + header))


def test_a_header_longer_than_the_file() -> None:
    with pytest.raises(ConfigError, match="its header has 500 bytes"):
        decode(sealed(PREFIX.pack(b"petals-session", VERSION, 500) + b"\x80"))


def test_a_file_of_a_later_version() -> None:
    with pytest.raises(
        ConfigError,
        match=f"format {VERSION + 1}, and this version of petals-node reads format {VERSION}",
    ):
        decode(sealed(PREFIX.pack(b"petals-session", VERSION + 1, 0)))


@given(st.data())
def test_whatever_is_cut_or_changed_is_noticed(data: st.DataObject) -> None:
    whole = encode(SESSION)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ConfigError, match=r"no saved session|damaged"):
        decode(whole[:cut])
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ConfigError):
        decode(bytes(changed))


@given(
    st.binary()
    | st.binary().map(lambda rest: sealed(PREFIX.pack(b"petals-session", VERSION, 9) + rest))
)
def test_any_bytes_are_a_session_or_a_config_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        decode(data)


@pytest.mark.parametrize(
    ("session", "complaint"),
    [
        (dataclasses.replace(SESSION, model="\udcff"), "surrogates"),
        (dataclasses.replace(SESSION, token_ids=((-1,), (1,))), "out of range"),
        (dataclasses.replace(SESSION, token_ids=((1,) * (3 << 20),) * 2), "4194304 tokens"),
        (
            dataclasses.replace(
                SESSION,
                writing=Writing(4, SamplingParams(top_k=1 << 70), SamplerState((False,) * 2)),
            ),
            "out of range",
        ),
        (
            dataclasses.replace(
                SESSION,
                writing=Writing(4, SamplingParams(stop=("x" * 2**20,)), SamplerState((False,) * 2)),
            ),
            "stop strings",
        ),
    ],
    ids=["surrogate", "negative", "long", "large", "stop"],
)
def test_what_could_not_be_read_again_is_not_saved(session: SavedSession, complaint: str) -> None:
    with pytest.raises(ConfigError, match=r"^the session cannot be saved: ") as caught:
        encode(session)
    assert complaint in str(caught.value)


# --- the disk -------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a session"
    old = os.umask(0)
    try:
        save(path, SESSION)
        later = dataclasses.replace(SESSION, writing=None)
        save(path, later)
    finally:
        os.umask(old)
    assert load(path) == later
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "session"
    save(path, SESSION)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot save the session in .*No space left"):
        save(path, dataclasses.replace(SESSION, writing=None))
    assert load(path) == SESSION
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["no/such/folder/session", ".", "a pipe"])
def test_places_where_no_session_can_be(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "a pipe")
    with pytest.raises(ConfigError, match=r"cannot save the session|not a file"):
        save(tmp_path / place, SESSION)
    with pytest.raises(ConfigError, match=r"cannot read the saved session|not a file"):
        load(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["a pipe"]


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("no session")
    with pytest.raises(ConfigError, match="notes: this is no saved session; name another file"):
        load(path)
