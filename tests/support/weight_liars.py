"""Peers that say they have all of a model, and give something else; real hosts in this process."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from petals.node.frame_stream import FrameStream
from petals.node.identity import new_identity
from petals.node.libp2p_network import Libp2pNetwork, open_network
from petals.node.network import Stream
from petals.protocol.announcement import (
    Announcement,
    PeerState,
    encode_signed,
    merge_entries,
    weights_key,
)
from petals.protocol.errors import PeerError, RemoteProtocolError
from petals.protocol.frames import (
    PROTOCOL_VERSION,
    SHARD_PROTOCOL,
    Chunk,
    Frame,
    Hello,
    Holdings,
    WantChunk,
    WantHoldings,
)
from petals.protocol.holdings import everything, join
from petals.protocol.manifest import Manifest
from petals.protocol.span import Span

HELLO = Hello(PROTOCOL_VERSION, "liar")
LOOPBACK = "/ip4/127.0.0.1/tcp/0"

Lie = Callable[[WantChunk, int], list[Frame]]
LIES: dict[str, Lie] = {
    "corrupted": lambda want, size: [Chunk(want.shard, want.chunk, bytes(size))],
    "truncated": lambda want, size: [Chunk(want.shard, want.chunk, bytes(size - 1))],
    "oversized": lambda want, size: [Chunk(want.shard, want.chunk, bytes(2 << 20))],
    "endless": lambda want, size: [Chunk(want.shard, 1 << 20, bytes(size))] * 200,
}


@dataclass
class Liar:
    """One of them."""

    lie: str
    manifest: Manifest
    peer_id: str
    lied: bool = False
    streams_after: int = 0
    """Streams that were opened to it after it had lied."""

    async def handle(self, stream: Stream) -> None:
        self.streams_after += self.lied
        frames = FrameStream(stream, HELLO)
        try:
            while (asked := await frames.receive()) is not None:
                await self._answer(frames, asked)
        except (PeerError, RemoteProtocolError):
            return

    async def _answer(self, frames: FrameStream, asked: Frame) -> None:
        match asked:
            case WantHoldings(_, numbers):
                counts = [self.manifest.shards[number].num_chunks for number in numbers]
                await frames.send(Holdings(join(map(everything, counts))))
            case WantChunk(_, shard, chunk):
                self.lied = True
                await frames.send(*LIES[self.lie](asked, self.manifest.chunk_size(shard, chunk)))


@asynccontextmanager
async def lying(bootstrap: str, manifest: Manifest) -> AsyncIterator[list[Liar]]:
    """A liar of each kind, announced as honest nodes are."""
    async with AsyncExitStack() as stack:
        liars = []
        for lie in LIES:
            identity = new_identity()
            network = await stack.enter_async_context(
                open_network(
                    identity,
                    merge=partial(merge_entries, salt=b"salt"),
                    clock=time.time,  # noqa: TID251 - announcements are dated
                    listen=[LOOPBACK],
                    bootstrap=[bootstrap],
                )
            )
            liar = Liar(lie, manifest, network.peer_id)
            network.handle(SHARD_PROTOCOL, liar.handle)
            entry = encode_signed(_announcement(network, manifest), identity.sign)
            assert await network.put(weights_key(manifest.fingerprint), entry)
            liars.append(liar)
        yield liars


def _announcement(network: Libp2pNetwork, manifest: Manifest) -> Announcement:
    now = time.time()  # noqa: TID251 - announcements are dated
    return Announcement(
        peer_id=network.peer_id,
        multiaddrs=network.multiaddrs,
        model=manifest.fingerprint,
        model_name="demo",
        num_blocks=len(manifest.blocks),
        span=None,
        state=PeerState.ONLINE,
        dtype="none",
        decode_speed=0.0,
        prefill_speed=0.0,
        cache_tokens_left=0,
        sessions=0,
        version="1",
        sequence=int(now * 1000),
        expires_at=now + 60,
        shards=(Span(0, len(manifest.shards)),),
    )
