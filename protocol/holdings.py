"""Which chunks of a shard somebody has, as bits: chunk 0 is the lowest bit of the first byte."""

from collections.abc import Collection, Iterable, Sequence

from .errors import RemoteProtocolError


def pack(chunks: Collection[int], count: int) -> bytes:
    """The bits for those of ``count`` chunks that are in ``chunks``."""
    bits = bytearray(width(count))
    for chunk in chunks:
        bits[chunk >> 3] |= 1 << (chunk & 7)
    return bytes(bits)


def everything(count: int) -> bytes:
    """The bits of somebody who has all of ``count`` chunks."""
    return ((1 << count) - 1).to_bytes(width(count), "little")


def holds(bits: bytes, chunk: int) -> bool:
    """Whether a chunk is among them; no bits at all: none is."""
    return chunk >> 3 < len(bits) and bool(bits[chunk >> 3] >> (chunk & 7) & 1)


def width(count: int) -> int:
    """The bytes that the bits of ``count`` chunks take."""
    return (count + 7) // 8


def split(data: bytes | memoryview, counts: Sequence[int]) -> list[bytes]:
    """The bits of several shards that travelled as one. Raises RemoteProtocolError."""
    if len(data) != sum(map(width, counts)):
        raise RemoteProtocolError(
            f"holdings of {len(data)} bytes were sent, {sum(map(width, counts))} were due"
        )
    parts, start = [], 0
    for count in counts:
        end = start + width(count)
        parts.append(bytes(data[start:end]))
        start = end
    return parts


def join(parts: Iterable[bytes]) -> bytes:
    """The bits of several shards, to travel as one."""
    return b"".join(parts)
