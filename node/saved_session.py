"""A session as a file: what its originator needs in order to go on after a crash of its own.

The tokens are the session: hops are found again, and compute from them what the old ones held. Beside
them the file has what the next token depends on, as it was behind the last one: how to sample, and
the sampler's state. All integers are little-endian:

======================  ===========================================================================
``petals-session``      14 bytes
version of the format   2 bytes
length of the header    4 bytes
header                  one msgpack map, the fields in ``_FIELDS`` below
token ids               4 bytes each, one sequence after the other
checksum                SHA-256 of everything before it
======================  ===========================================================================

Rules of this file:

* A file is complete or as it was before: it is written beside its place and moved there. It is for
  its owner's eyes only (mode 0600), since it holds what the user has written.
* A file may be damaged, or made by somebody to do harm: every limit is checked before memory is taken,
  nothing in it is executed, and whatever it holds, the only exception is a ConfigError in words.
* ``encode`` and ``decode`` are pure; only ``save`` and ``load`` touch the disk, and they block.
"""

import contextlib
import hashlib
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgpack

from ..inference.sampling_params import SamplerState, SamplingParams
from ..protocol.checks import (
    MAX_BATCH,
    MAX_TOKENS,
    BadValueError,
    Check,
    binary,
    boolean,
    dtype,
    integer,
    optional,
    text,
    tuple_of,
)
from ..protocol.errors import ConfigError
from ..protocol.tensor import DType

VERSION = 2
MAX_HEADER = 1024 * 1024
"""Bytes. A real one has 6 KB, most of which is the random generator; stop strings may be long."""
MAX_TOKEN_IDS = 1 << 22
"""Of all sequences together: 64 of 65,536 tokens, 16 MiB."""

_MAGIC = b"petals-session"
_PREFIX = struct.Struct(f"<{len(_MAGIC)}sHI")
_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_FILE = _PREFIX.size + MAX_HEADER + 4 * MAX_TOKEN_IDS + _DIGEST_BYTES
_MAX_GENERATOR = 64 * 1024
"""Bytes; torch's own has 5,056."""


@dataclass(frozen=True, slots=True)
class Writing:
    """A ``Session.write``, which runs, was broken off, or has ended."""

    begin: int
    """Where its prompt ends: the position of the first token that it samples."""
    params: SamplingParams
    sampler: SamplerState
    """Behind the last token of the session."""

    def left(self, length: int) -> int:
        """How many tokens are still to be sampled behind ``length`` of them."""
        if all(self.sampler.finished):
            return 0
        return self.begin + self.params.max_new_tokens - length


@dataclass(frozen=True, slots=True)
class SavedSession:
    """A session between two tokens."""

    model: str
    """What the user called it."""
    fingerprint: str
    wire_dtype: DType
    max_tokens: int
    """Positions that the session may grow to."""
    padding: tuple[int, ...]
    """Left padding of each sequence."""
    token_ids: tuple[tuple[int, ...], ...]
    """Of each sequence everything, padding included; all have the same length."""
    writing: Writing | None
    """None when the tokens do not end with what a ``write`` has sampled."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return len(self.token_ids[0])

    @property
    def unfinished(self) -> bool:
        """Whether a ``write`` has tokens left to sample."""
        return self.writing is not None and self.writing.left(self.length) > 0


# --- bytes ----------------------------------------------------------------------------------------


def encode(saved: SavedSession) -> bytes:
    """The content of the file. Raises ConfigError when it is too much to be read again."""
    if len(saved.token_ids) * saved.length > MAX_TOKEN_IDS:
        raise ConfigError(f"the session cannot be saved: it has more than {MAX_TOKEN_IDS} tokens")
    header = {
        "model": saved.model,
        "fingerprint": saved.fingerprint,
        "wire_dtype": saved.wire_dtype.value,
        "max_tokens": saved.max_tokens,
        "padding": saved.padding,
        "length": saved.length,
        "writing": None if saved.writing is None else _plain(saved.writing),
    }
    try:
        packed = msgpack.packb(header)
        rows = [struct.pack(f"<{saved.length}I", *row) for row in saved.token_ids]
    except (OverflowError, UnicodeEncodeError, struct.error) as error:
        raise ConfigError(f"the session cannot be saved: {error}") from error
    if len(packed) > MAX_HEADER:
        raise ConfigError(
            f"the session cannot be saved: its stop strings are over {MAX_HEADER} bytes"
        )
    content = b"".join([_PREFIX.pack(_MAGIC, VERSION, len(packed)), packed, *rows])
    return content + hashlib.sha256(content).digest()


def _plain(writing: Writing) -> dict[str, Any]:
    return {
        "begin": writing.begin,
        "params": {name: getattr(writing.params, name) for name in _PARAMS},
        "finished": writing.sampler.finished,
        "generator": writing.sampler.generator,
    }


def decode(data: bytes) -> SavedSession:
    """What ``encode`` has been given. Raises ConfigError that says what is wrong with ``data``."""
    if not data.startswith(_MAGIC) or len(data) < _PREFIX.size + _DIGEST_BYTES:
        raise ConfigError("this is no saved session; name another file")
    _, version, header_bytes = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise ConfigError(
            f"the session was saved in format {version}, and this version of petals-node reads format "
            f"{VERSION}; use the version that saved it"
        )
    content = memoryview(data)[:-_DIGEST_BYTES]
    if hashlib.sha256(content).digest() != data[-_DIGEST_BYTES:]:
        raise _damaged("its checksum is another")
    try:
        return _decode(content[_PREFIX.size :], header_bytes)
    except BadValueError as bad:
        raise _damaged(str(bad)) from None


def _damaged(why: str) -> ConfigError:
    return ConfigError(
        f"the saved session is damaged ({why}); use a copy of it, or begin anew with another file"
    )


def _decode(content: memoryview, header_bytes: int) -> SavedSession:
    if header_bytes > min(MAX_HEADER, len(content)):
        raise BadValueError(f"its header has {header_bytes} bytes")
    header = _record(_unpack(content[:header_bytes]), _FIELDS)
    padding, length = header["padding"], header["length"]
    batch = len(padding)
    tokens = content[header_bytes:]
    if batch == 0 or batch * length > MAX_TOKEN_IDS or len(tokens) != 4 * batch * length:
        raise BadValueError(f"{len(tokens)} bytes of tokens for {batch} texts of {length}")
    header["token_ids"] = tuple(
        struct.unpack_from(f"<{length}I", tokens, 4 * length * row) for row in range(batch)
    )
    saved = SavedSession(**{field.name: header[field.name] for field in fields(SavedSession)})
    if length > saved.max_tokens + 1:  # what was sampled last has not gone around
        raise BadValueError(f"{length} tokens in a session of {saved.max_tokens}")
    if max(padding) >= saved.max_tokens:
        raise BadValueError(f"padding of {max(padding)} in a session of {saved.max_tokens}")
    if saved.writing is not None:
        _check_writing(saved.writing, batch, length)
    return saved


def _check_writing(writing: Writing, batch: int, length: int) -> None:
    sampled = length - writing.begin
    if not 0 <= sampled <= writing.params.max_new_tokens:
        raise BadValueError(
            f"a prompt of {writing.begin} tokens and at most {writing.params.max_new_tokens} new ones "
            f"are no text of {length}"
        )
    if len(writing.sampler.finished) != batch:
        raise BadValueError(
            f"{batch} texts, {len(writing.sampler.finished)} in the sampler's state"
        )
    if sampled and not writing.params.greedy and not writing.sampler.generator:
        raise BadValueError("the random generator's state is missing")


def _unpack(header: memoryview) -> Any:
    try:
        return msgpack.unpackb(header, max_array_len=1024, max_map_len=64, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        raise BadValueError("its header cannot be read") from None


def _record(value: Any, checks: Mapping[str, Check]) -> dict[str, Any]:
    """A map of exactly the fields in ``checks``."""
    if not isinstance(value, dict) or value.keys() != checks.keys():
        raise BadValueError(f"a map of {', '.join(checks)} is expected")
    checked = {}
    for name, check in checks.items():
        try:
            checked[name] = check(value[name])
        except BadValueError as bad:
            raise BadValueError(f"{name}: {bad}") from None
    return checked


def _params(value: Any) -> SamplingParams:
    try:
        return SamplingParams(**_record(value, dict.fromkeys(_PARAMS, lambda item: item)))
    except ConfigError as error:
        raise BadValueError(str(error)) from None


def _writing(value: Any) -> Writing:
    given = _record(value, _WRITING_FIELDS)
    state = SamplerState(given["finished"], given["generator"])
    return Writing(given["begin"], given["params"], state)


_PARAMS = tuple(field.name for field in fields(SamplingParams))
_WRITING_FIELDS: Mapping[str, Check] = {
    "begin": integer(1, MAX_TOKENS),
    "params": _params,
    "finished": tuple_of(boolean, MAX_BATCH),
    "generator": binary(0, _MAX_GENERATOR),
}
_FIELDS: Mapping[str, Check] = {
    "model": text(4096),
    "fingerprint": text(128),
    "wire_dtype": dtype,
    "max_tokens": integer(1, MAX_TOKENS),
    "padding": tuple_of(integer(0, MAX_TOKENS), MAX_BATCH),
    "length": integer(0, MAX_TOKENS + 1),
    "writing": optional(_writing),
}


# --- the disk -------------------------------------------------------------------------------------


def save(path: Path, saved: SavedSession) -> None:
    """Put the session into the file, in place of what is there. Raises ConfigError."""
    data = encode(saved)
    try:
        _check_place(path)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            _write(draft, data)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        _make_lasting(path.parent)
    except OSError as error:
        raise ConfigError(
            f"cannot save the session in {path} ({error.strerror}); make its folder writable for this "
            "user, or name another file"
        ) from error


def _check_place(path: Path) -> None:
    if path.exists() and not path.is_file():  # a folder; a device, which would be replaced, too
        raise ConfigError(f"{path} is not a file that a session can be in; name another")


def _write(draft: Path, data: bytes) -> None:
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _make_lasting(folder: Path) -> None:
    """Have the folder's entry survive a loss of power, too, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path) -> SavedSession:
    """The session in the file. Raises ConfigError."""
    try:
        _check_place(path)
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the saved session {path} ({error.strerror}); name another file"
        ) from error
    try:
        return decode(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
