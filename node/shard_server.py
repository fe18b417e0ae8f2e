"""``/petals/shard/1``, the giving side: manifests, what this node has of a model, and chunks of it.

Rules of this file: answers go in the order of the questions; chunks of 2 MiB together are read ahead
while as many are sent, so that what a peer can make this node hold is 4 MiB a stream; streams are
bounded. How fast chunks go is decided in ``uploads.py``.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import trio

from ..protocol.checks import MAX_PLAIN_FRAME
from ..protocol.errors import ErrorCode, ModelError, PeerError, RemoteProtocolError
from ..protocol.frames import (
    Chunk,
    Frame,
    Hello,
    Holdings,
    ManifestPart,
    NoChunk,
    WantChunk,
    WantHoldings,
    WantManifest,
)
from ..protocol.holdings import join, pack
from ..protocol.manifest import MAX_CHUNK, Manifest
from .frame_stream import FrameStream, failed, refused
from .network import Stream
from .uploads import Uploads
from .wakeup import open_flat_nursery

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_STREAMS = 64
"""In all; each holds 4 MiB at most. Fewer where uploads are limited (``uploads.py``)."""
READERS = 4
"""Chunks that are read from the disk at once: the other work of the node's threads goes on."""
PEER_STREAMS = 4
PART_BYTES = 1024 * 1024
"""Of a manifest, that travel at a time."""
IDLE_SECONDS = 60.0
"""A stream on which nothing was asked for so long is closed."""
RETRY_AFTER = 10.0


class Holder(Protocol):
    """Whoever has weights of a model to give."""

    @property
    def manifest(self) -> Manifest:
        """The model's."""

    def bits(self, number: int) -> bytes:
        """Which chunks of a shard there are (``protocol/holdings.py``)."""

    def read(self, number: int, chunk: int) -> bytes | None:
        """A chunk, None if it is not there (any more). Blocks. Raises ModelError."""


class ShardServer:
    """Gives what ``holder`` has to whoever asks."""

    def __init__(self, holder: Holder, uploads: Uploads, hello: Hello) -> None:
        self._holder = holder
        self._uploads = uploads
        self._hello = hello
        self._streams: Counter[str] = Counter()
        self._readers = trio.CapacityLimiter(READERS)

    async def handle(self, stream: Stream) -> None:
        """Serve one inbound stream."""
        frames = FrameStream(stream, self._hello, limit=MAX_PLAIN_FRAME)
        peer_id = stream.peer_id
        try:
            most = min(MAX_STREAMS, self._uploads.most_streams)
            if self._streams.total() >= most or self._streams[peer_id] >= PEER_STREAMS:
                reason = "this node gives weights to enough peers already"
                await frames.send(refused(ErrorCode.BUSY, reason, RETRY_AFTER))
                return
            self._streams[peer_id] += 1
            try:
                await self._serve(frames)
            finally:
                self._streams[peer_id] -= 1
                if not self._streams[peer_id]:
                    del self._streams[peer_id]
        except (PeerError, RemoteProtocolError) as error:
            logger.debug("giving weights to %s ended: %s", peer_id, error)

    async def _serve(self, frames: FrameStream) -> None:
        send, receive = trio.open_memory_channel[Sequence[Frame]](0)
        at_once = max(1, MAX_CHUNK // self._holder.manifest.chunk_bytes)
        idle = trio.CancelScope(deadline=trio.current_time() + IDLE_SECONDS)

        async def answer() -> None:
            async for answers in receive:
                idle.deadline = math.inf
                for frame in answers:
                    size = len(frame.data) if isinstance(frame, Chunk) else 0
                    await self._uploads.turn(size)
                    await frames.send(frame)
                idle.deadline = trio.current_time() + IDLE_SECONDS

        async with open_flat_nursery() as nursery, send:
            nursery.start_soon(answer)
            with idle:
                while (asked := await frames.receive()) is not None:
                    more = (
                        frames.come(WantChunk, at_once - 1) if isinstance(asked, WantChunk) else []
                    )
                    await send.send(await self._in_thread(self._answer_all, [asked, *more]))

    def _answer_all(self, asked: Sequence[Frame]) -> list[Frame]:
        """Blocks: one thread for all, to start it takes as long as to read one."""
        return list(map(self._answer, asked))

    def _answer(self, asked: Frame) -> Frame:
        manifest = self._holder.manifest
        match asked:
            case WantManifest(model) | WantHoldings(model) | WantChunk(model):
                if model != manifest.fingerprint:
                    return failed(ErrorCode.WRONG_MODEL, f"this node has nothing of {model[:16]}")
            case _:
                return failed(ErrorCode.PROTOCOL, f"{asked.KIND} is nothing to ask for here")
        try:
            match asked:
                case WantManifest(offset=offset):
                    data = manifest.encoded
                    return ManifestPart(len(data), offset, data[offset : offset + PART_BYTES])
                case WantHoldings(shards=numbers):
                    return Holdings(self._holdings(numbers))
                case WantChunk(shard=number, chunk=chunk) if (
                    chunk >= manifest.shards[number].num_chunks
                ):
                    raise IndexError
                case WantChunk(shard=number, chunk=chunk):
                    found = self._holder.read(number, chunk)
                    return NoChunk(number, chunk) if found is None else Chunk(number, chunk, found)
        except IndexError:
            return failed(ErrorCode.BAD_REQUEST, "the model has no such shard or chunk")
        except ModelError as error:  # our own files have changed, or cannot be read
            logger.warning("cannot give a chunk: %s", error)
            assert isinstance(asked, WantChunk)
            return NoChunk(asked.shard, asked.chunk)

    def _holdings(self, numbers: Sequence[int]) -> bytes:
        shards = [self._holder.manifest.shards[number] for number in numbers]
        bits = map(self._holder.bits, numbers)
        return join(
            got or pack((), shard.num_chunks) for got, shard in zip(bits, shards, strict=True)
        )

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._readers)
