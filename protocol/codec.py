"""Frames as bytes, and back.

A frame is a 4-byte big-endian length and one msgpack array ``[header map, bin, bin, …]``. The
header names the frame's ``kind``, its fields, and under ``tensors`` the ``[dtype, shape,
compression]`` of each bin, whose bytes are little-endian and row-major; bytes that are no tensor have
the dtype ``bytes``. Any msgpack reader can
read a frame; ours copies no tensor: ``encode`` returns the tensor's own memory among its buffers,
and a decoded tensor is a view into the received bytes.

Rules of this file:

* Every limit is checked before memory is taken, and before anything is built from the bytes.
* Whatever the peer sends, the only exception that leaves here is ``RemoteProtocolError``.
* Unknown header fields are ignored: a newer peer may send more than we know.
"""

from dataclasses import fields
from functools import lru_cache
from typing import Any

import msgpack

from .checks import (
    LENGTH_BYTES,
    MAX_FRAME,
    MAX_HEADER,
    MAX_PLAIN_FRAME,
    BadValueError,
    Peer,
    dtype,
    integer,
    tuple_of,
)
from .errors import LocalProtocolError, RemoteProtocolError
from .frames import FRAMES, Frame
from .span import Span
from .tensor import MAX_DIMENSIONS, DType, WireTensor

_BIN_PREFIX = 5
_BYTES = "bytes"
_TENSOR_FIELDS = {
    kind: tuple(field.name for field in fields(frame) if field.name not in frame.CHECKS)
    for kind, frame in FRAMES.items()
}


def _plain(value: Any) -> Any:
    """A field's value in msgpack's own types."""
    if isinstance(value, Span):
        return [value.start, value.end]
    if isinstance(value, Peer):
        return [value.peer_id, list(value.multiaddrs)]
    if isinstance(value, tuple):
        return list(value)
    return value


def encode(frame: Frame) -> list[bytes | memoryview]:
    """The buffers of a frame, to be sent in order. Tensors are not copied.

    Raises LocalProtocolError when the frame breaks a limit that the peer would refuse it for.
    """
    kind = frame.KIND
    header: dict[str, Any] = {"kind": kind}
    for name, check in frame.CHECKS.items():
        header[name] = _plain(getattr(frame, name))
        try:
            check(header[name])
        except BadValueError as bad:
            raise LocalProtocolError(f"{kind}.{name} must be {bad}") from None
    values = [getattr(frame, name) for name in _TENSOR_FIELDS[kind]]
    header["tensors"] = [_described(value) for value in values]
    bins = [value.data if isinstance(value, WireTensor) else value for value in values]
    try:
        packed: bytes = msgpack.packb(header)
    except UnicodeEncodeError as error:
        raise LocalProtocolError(f"a text of {kind} is not Unicode: {error}") from None
    if len(packed) > MAX_HEADER:
        raise LocalProtocolError(f"the header of {kind} has {len(packed)} bytes, over {MAX_HEADER}")
    length = 1 + len(packed) + sum(_BIN_PREFIX + len(data) for data in bins)
    if length > MAX_FRAME:
        raise LocalProtocolError(f"a {kind} frame of {length} bytes is over {MAX_FRAME}")
    prefix = length.to_bytes(LENGTH_BYTES, "big") + bytes([0x90 | (1 + len(bins))])
    buffers: list[bytes | memoryview] = [prefix + packed]
    for data in bins:
        buffers += [b"\xc6" + len(data).to_bytes(4, "big"), data]
    return buffers


def _described(value: WireTensor | bytes | memoryview) -> list[Any]:
    if isinstance(value, WireTensor):
        return [value.dtype, list(value.shape), value.dtype.compression]
    return [_BYTES, [len(value)], "none"]


def max_rows(batch: int, hidden_size: int, dtype: DType) -> int:
    """How many rows of a session's hidden states fit one frame; 0 if not even one does."""
    return (MAX_FRAME - MAX_HEADER) // (batch * dtype.row_bytes(hidden_size))


def max_frame(rows: int, batch: int, hidden_size: int, dtype: DType) -> int:
    """The most bytes of a frame with up to so many rows of a session's hidden states."""
    tensor = _BIN_PREFIX + rows * batch * dtype.row_bytes(hidden_size)
    return min(MAX_FRAME, MAX_PLAIN_FRAME + tensor)


def _shown(value: Any) -> str:
    """A peer's name for something, in an error. Anything but a text may nest deeper than repr."""
    return f"{value!r:.40}" if isinstance(value, str) else f"of type {type(value).__name__}"


def _take_bin(body: memoryview, offset: int) -> tuple[memoryview, int]:
    """The msgpack bin at ``offset`` as a view, and where it ends."""
    width = {0xC4: 1, 0xC5: 2, 0xC6: 4}.get(body[offset]) if offset < len(body) else None
    if width is None:
        raise RemoteProtocolError(
            "a frame's header must be followed by its tensors as msgpack bins"
        )
    start = offset + 1 + width
    end = start + int.from_bytes(body[offset + 1 : start], "big")
    if end > len(body):
        raise RemoteProtocolError("a tensor is longer than its frame")
    return body[start:end], end


_three = tuple_of(lambda item: item, 3)
_dimensions = tuple_of(lambda item: item, MAX_DIMENSIONS)


def _wire_tensor(described: Any, data: memoryview) -> WireTensor:
    try:
        dtype_name, shape, compression = _three(described)
        kind = (dtype_name, compression, *_dimensions(shape))
        try:
            elements, sizes = _known_kind(*kind)
        except TypeError:  # something in it cannot be looked up
            elements, sizes = _kind(*kind)
        return WireTensor(elements, sizes, data)
    except ValueError:
        raise RemoteProtocolError("a tensor is described by [dtype, shape, compression]") from None
    except BadValueError as bad:
        raise RemoteProtocolError(f"a tensor's dtype or shape is not {bad}") from None


def _kind(dtype_name: Any, compression: Any, *shape: Any) -> tuple[DType, tuple[int, ...]]:
    elements, size = dtype(dtype_name), integer(1, MAX_FRAME)
    if compression != elements.compression:
        raise RemoteProtocolError(f"unknown tensor compression {_shown(compression)} of {elements}")
    return elements, tuple(map(size, shape))


_known_kind = lru_cache(maxsize=256, typed=True)(_kind)
"""Nearly every tensor is of the same kind as the one before it."""


def _unpack_header(body: memoryview) -> tuple[int, Any, int]:
    """How many items follow the header, the header, and where it ends."""
    unpacker = msgpack.Unpacker(
        max_buffer_size=MAX_HEADER + 8,
        max_str_len=MAX_HEADER,
        max_bin_len=MAX_HEADER,
        max_array_len=1024,
        max_map_len=256,
        max_ext_len=0,
        strict_map_key=True,
    )
    unpacker.feed(body[: MAX_HEADER + 8])
    try:
        items = unpacker.read_array_header()
        return items - 1, unpacker.unpack(), unpacker.tell()
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(
            f"a frame is not a msgpack array with a header of at most {MAX_HEADER} bytes"
        ) from error


def _decode(body: memoryview) -> Frame:
    count, header, offset = _unpack_header(body)
    if not isinstance(header, dict):
        raise RemoteProtocolError("a frame's header must be a map")
    kind = header.get("kind")
    if not isinstance(kind, str) or kind not in FRAMES:
        raise RemoteProtocolError(f"unknown kind of frame {_shown(kind)}")
    frame = FRAMES[kind]
    described = header.get("tensors", [])
    names = _TENSOR_FIELDS[kind]
    if not isinstance(described, list) or not len(described) == count == len(names):
        raise RemoteProtocolError(f"a {kind} frame carries {len(names)} tensors")
    values: dict[str, Any] = {}
    for name, check in frame.CHECKS.items():
        try:
            values[name] = check(header.get(name))
        except BadValueError as bad:
            raise RemoteProtocolError(f"{kind}.{name} must be {bad}") from None
    for name, description in zip(names, described, strict=True):
        data, offset = _take_bin(body, offset)
        if name not in frame.BYTES:
            values[name] = _wire_tensor(description, data)
        elif description == [_BYTES, [len(data)], "none"]:
            values[name] = data
        else:
            raise RemoteProtocolError(f"{kind}.{name} must be described as bytes")
    if offset != len(body):
        raise RemoteProtocolError(f"{len(body) - offset} stray bytes behind a {kind} frame")
    return frame(**values)


class FrameDecoder:
    """Bytes in, frames out, however the bytes were cut.

    After a ``RemoteProtocolError`` the stream has lost its meaning: close it.
    """

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self.limit = limit
        """The most bytes of a frame that the rest is waited for: what a peer can make us hold. One
        that is there already is taken, so that the limit may be raised by the frame before it."""
        self._pending = bytearray()
        self._wanted = LENGTH_BYTES
        """Bytes that must be pending before there is anything new to see in them."""

    @property
    def mid_frame(self) -> bool:
        """Whether the stream would end in the middle of a frame if it ended here."""
        return len(self._pending) > 0

    def feed(self, data: bytes) -> list[Frame]:
        """Take in ``data`` and return the frames that it completes.

        Holds at most one frame's bytes beside ``data``, and takes time in proportion to it, however
        small the peer cuts frames or data. Raises RemoteProtocolError.
        """
        if self._pending:
            self._check(self._wanted - LENGTH_BYTES, self.limit)
            self._pending += data
            if len(self._pending) < self._wanted:
                return []
        whole, self._pending = self._pending or data, bytearray()
        view = memoryview(whole).toreadonly()
        complete: list[Frame] = []
        while True:
            self._wanted = LENGTH_BYTES
            if len(view) < self._wanted:
                break
            length = int.from_bytes(view[:LENGTH_BYTES], "big")
            self._check(length, MAX_FRAME)
            self._wanted += length
            if len(view) < self._wanted:
                break
            complete.append(_decode(view[LENGTH_BYTES : self._wanted]))
            view = view[self._wanted :]
        self._pending = bytearray(view)
        return complete

    def _check(self, length: int, limit: int) -> None:
        if length > limit:
            raise RemoteProtocolError(f"a frame of {length} bytes is over {limit}")
