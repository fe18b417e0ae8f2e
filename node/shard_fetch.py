"""Fetching a model's shards from peers, several at once, in verified chunks.

Which chunk is asked of whom is decided in ``protocol/download.py``; here are the streams, the clock,
and what is done with peers that fail (they are left alone for a while, as for sessions) or lie (they are
banned: nothing is asked of them again, here or for sessions).

Rules of this file: nothing that a peer sends is believed before it was hashed; every wait has a
deadline; a frame that was not asked for ends the peer, so that nobody can send without end.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from ..inference.progress import Progress, Step
from ..protocol.announcement import Announcement
from ..protocol.checks import MAX_PLAIN_FRAME
from ..protocol.dice import Dice
from ..protocol.download import LEAST_RATE, MAX_WINDOW, PATIENCE, Ask, Download
from ..protocol.errors import ErrorCode, ModelError, PeerError, RemoteProtocolError
from ..protocol.frames import (
    MAX_SHARDS_ASKED,
    SHARD_PROTOCOL,
    Chunk,
    Failed,
    Frame,
    Hello,
    Holdings,
    ManifestPart,
    NoChunk,
    Refused,
    WantChunk,
    WantHoldings,
    WantManifest,
)
from ..protocol.holdings import split, width
from ..protocol.manifest import Manifest, decode_manifest
from ..protocol.swarm import Swarm
from .frame_stream import FrameStream
from .network import Network
from .shard_server import PART_BYTES
from .shard_store import ShardStore
from .wakeup import Signal, open_flat_nursery

logger = logging.getLogger(__name__)

PEERS_AT_ONCE = 16
LOOK_SECONDS = 2.0
"""Between two looks at who else is there."""
ASK_SECONDS = 1.0
"""Between two questions to a peer about what it has: others who fetch have more every moment."""
TICK_SECONDS = 0.25
FALLBACK_SECONDS = 3.0
"""What no peer has by then comes from the fallback, where there is one."""
PASSED_OVER_SECONDS = 10.0
"""A peer that has sent nothing for so long gives its place to another, if there are more than places."""
AGAIN_SECONDS = 60.0
"""Until it may have one again."""
FALLBACK_PIECES = 64
"""Chunks from the fallback between two looks at whether peers have the rest."""
ANSWER_SECONDS = 90.0
"""For the answer to what a peer has; it comes behind the chunks that were asked for before."""
TELL_SECONDS = 10.0
"""Between two lines in the log about a fetch that gets nothing."""
WRITERS = 2
"""Chunks that are hashed and written at once."""

Find = Callable[[], Awaitable[Sequence[Announcement]]]
"""The peers that may have something of the model, as the swarm knows by now."""
ReadOwn = Callable[[int, int], bytes]
"""A chunk from elsewhere than peers: a local folder, the hub. Blocks. Raises ModelError."""


@dataclass
class Fetching:
    """How far a fetch is."""

    what: str
    total: int
    """Bytes."""
    kept: int
    """Bytes of these that were on the disk already."""
    done: int = 0
    """Bytes of these that are there, those that were kept included."""
    progress: Progress | None = None
    """Told whenever something has come; None: nobody is."""
    received: dict[str, int] = field(default_factory=dict)
    """Bytes that came, by peer; those of the fallback are under an empty name."""

    def came(self, size: int, peer_id: str) -> None:
        """So many more bytes have come."""
        self.done += size
        self.received[peer_id] = self.received.get(peer_id, 0) + size
        self.tell()

    def tell(self) -> None:
        """Say how far it is."""
        if self.progress is not None:
            self.progress(Step(f"fetching {self.what}", self.done, self.total, "bytes"))


@dataclass
class _Asked:
    """A peer that is asked."""

    asks: trio.MemorySendChannel[Ask]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    holdings: deque[tuple[int, ...]] = field(default_factory=deque)
    """Shards that it was asked after and has not answered for."""
    heard: Signal = field(default_factory=Signal)
    useful_at: float = field(default_factory=trio.current_time)
    """When it last sent a chunk, or began."""


class ShardFetch:
    """One fetch: some shards of a model, into the store."""

    def __init__(
        self,
        store: ShardStore,
        *,
        network: Network,
        swarm: Swarm,
        hello: Hello,
        find: Find,
        clock: Callable[[], float],
        dice: Dice,
        fallback: ReadOwn | None = None,
    ) -> None:
        self._store = store
        self._manifest = store.manifest
        self._network = network
        self._swarm = swarm
        self._hello = hello
        self._find = find
        self._clock = clock
        self._dice = dice
        self._fallback = fallback
        self._peers: dict[str, _Asked] = {}
        self._passed_over: dict[str, float] = {}
        """Peers that had nothing for us, and when they may be asked again."""
        self._news = Signal()
        self._writers = trio.Semaphore(WRITERS)

    async def run(
        self, missing: Mapping[int, Collection[int]], progress: Fetching, *, patience: float
    ) -> None:
        """Fetch these chunks, by shard. Raises ModelError when the disk takes no more of them.

        Waits until somebody has them; raises PeerError when nothing has come for ``patience`` seconds.
        """
        self._progress = progress
        progress.tell()
        self._progressed_at = trio.current_time()
        self._download = download = Download(self._manifest, missing, dice=self._dice)
        async with open_flat_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._look_for_peers)
            if self._fallback is not None:
                nursery.start_soon(self._fall_back, self._fallback)
            while not download.done:
                if trio.current_time() - self._progressed_at > patience:
                    raise PeerError(
                        f"nobody in the swarm gives what is missing of the model's {progress.what} "
                        f"({download.left / 1e6:.1f} MB); a node that has them, or "
                        "`petals-node seed`, would"
                    )
                self._plan()
                with trio.move_on_after(TICK_SECONDS):
                    await self._news.wait()
            nursery.cancel_scope.cancel()

    def _plan(self) -> None:
        now = trio.current_time()
        for peer_id in self._download.overdue(now):
            logger.info("peer %s sent nothing for too long", peer_id)
            self._swarm.failed(peer_id, self._clock())
            self._download.left_peer(peer_id)
            self._peers[peer_id].scope.cancel()
        for ask in self._download.plan(now):
            self._peers[ask.peer_id].asks.send_nowait(ask)

    async def _fall_back(self, read: ReadOwn) -> None:
        while True:
            await trio.sleep(FALLBACK_SECONDS)
            lacks: set[int] = set()
            while pieces := self._download.unheld(besides=lacks)[:FALLBACK_PIECES]:
                for shard, chunk in pieces:
                    try:
                        data = await trio.to_thread.run_sync(read, shard, chunk)
                    except ModelError as error:  # not all of it is there, or the hub is not
                        logger.warning("from the fallback: %s", error)
                        lacks.add(shard)
                        break
                    if not await self._write(shard, chunk, data):
                        raise ModelError("the fallback holds another model than the swarm's")
                    if self._download.take(shard, chunk):
                        self._count("", len(data))

    # --- peers --------------------------------------------------------------------------------

    async def _look_for_peers(self) -> None:
        told = trio.current_time()
        while True:
            try:
                found = await self._find()
            except PeerError as error:
                logger.info("%s", error)
                found = []
            now = trio.current_time()
            others = [peer for peer in found if self._may_ask(peer.peer_id, now)]
            for peer in others[: PEERS_AT_ONCE - len(self._peers)]:
                send, receive = trio.open_memory_channel[Ask](2 * MAX_WINDOW)
                asked = self._peers[peer.peer_id] = _Asked(send)
                self._nursery.start_soon(self._ask, peer, asked, receive)
            self._pass_over(now, len(others) + len(self._peers) - PEERS_AT_ONCE)
            if not self._peers and now - told > TELL_SECONDS:
                logger.warning("nobody gives what is missing of the weights; still looking")
                told = now
            await trio.sleep(LOOK_SECONDS)

    def _pass_over(self, now: float, waiting: int) -> None:
        """Whoever has nothing to give must not keep those away who have."""
        for peer_id, asked in sorted(self._peers.items(), key=lambda item: item[1].useful_at):
            if waiting > 0 and now - asked.useful_at > PASSED_OVER_SECONDS:
                self._passed_over[peer_id] = now + AGAIN_SECONDS
                asked.scope.cancel()
                waiting -= 1

    def _may_ask(self, peer_id: str, now: float) -> bool:
        return (
            peer_id not in self._peers
            and self._passed_over.get(peer_id, now) <= now
            and peer_id != self._network.peer_id
            and self._download.usable(peer_id)
            and self._swarm.usable(peer_id, self._clock())
        )

    async def _ask(
        self, peer: Announcement, asked: _Asked, asks: trio.MemoryReceiveChannel[Ask]
    ) -> None:
        """Ask one peer for what the plan says, until it fails or everything is there."""
        peer_id = peer.peer_id
        try:
            with asked.scope:
                await self._exchange(peer, asked, asks)
        except RemoteProtocolError as error:
            ban(self._swarm, peer_id, error)
            self._download.lied(peer_id)
        except PeerError as error:
            logger.info("peer %s gives no more weights: %s", peer_id, error)
            self._swarm.failed(peer_id, self._clock())
        finally:
            self._download.left_peer(peer_id)
            del self._peers[peer_id]
            self._news.notify()

    async def _exchange(
        self, peer: Announcement, asked: _Asked, asks: trio.MemoryReceiveChannel[Ask]
    ) -> None:
        stream = await self._network.open_stream(peer.peer_id, peer.multiaddrs, SHARD_PROTOCOL)
        frames = FrameStream(stream, self._hello, limit=MAX_PLAIN_FRAME + self._largest_answer())
        try:
            async with open_flat_nursery() as nursery:
                nursery.start_soon(self._send_asks, frames, asks)
                nursery.start_soon(self._ask_holdings, frames, asked)
                while True:
                    frame = await frames.receive()
                    if frame is None:
                        raise PeerError("it has ended the stream", peer_id=peer.peer_id)
                    await self._take(peer.peer_id, asked, frame, nursery)
        except RemoteProtocolError as error:
            if frames.cut_off:  # it was killed, or wants to look so: nothing was wrong
                raise PeerError(str(error), peer_id=peer.peer_id) from error
            raise
        finally:
            await frames.close()

    def _largest_answer(self) -> int:
        shards = sorted((shard.num_chunks for shard in self._manifest.shards), reverse=True)
        return 16 + max(self._manifest.chunk_bytes, sum(map(width, shards[:MAX_SHARDS_ASKED])))

    async def _send_asks(self, frames: FrameStream, asks: trio.MemoryReceiveChannel[Ask]) -> None:
        model = self._manifest.fingerprint
        async for ask in asks:
            together = [ask]
            with contextlib.suppress(trio.WouldBlock):
                while True:
                    together.append(asks.receive_nowait())
            await frames.send(*(WantChunk(model, each.shard, each.chunk) for each in together))

    async def _ask_holdings(self, frames: FrameStream, asked: _Asked) -> None:
        while True:
            missing = self._download.shards
            for start in range(0, len(missing), MAX_SHARDS_ASKED):
                numbers = missing[start : start + MAX_SHARDS_ASKED]
                asked.holdings.append(numbers)
                await frames.send(WantHoldings(self._manifest.fingerprint, numbers))
            with trio.move_on_after(ANSWER_SECONDS) as late:
                while asked.holdings:
                    await asked.heard.wait()
            if late.cancelled_caught:
                raise PeerError("it does not say what it has", peer_id=frames.peer_id)
            await trio.sleep(ASK_SECONDS)

    async def _take(self, peer_id: str, asked: _Asked, frame: Frame, nursery: trio.Nursery) -> None:
        download, now = self._download, trio.current_time()
        match frame:
            case Holdings(bits) if asked.holdings:
                numbers = asked.holdings.popleft()
                counts = [self._manifest.shards[number].num_chunks for number in numbers]
                download.heard(peer_id, dict(zip(numbers, split(bits, counts), strict=True)), now)
                asked.heard.notify()
                self._news.notify()
            case Chunk(shard, chunk, data) if download.expects(peer_id, shard, chunk):
                due = self._manifest.chunk_size(shard, chunk)
                if len(data) != due:
                    raise RemoteProtocolError(f"a chunk of {len(data)} bytes came, {due} were due")
                await self._writers.acquire()
                nursery.start_soon(self._take_chunk, peer_id, frame)
            case NoChunk(shard, chunk) if download.lacked(peer_id, shard, chunk):
                self._news.notify()
            case Refused(_, reason, retry_after):
                if retry_after is not None:
                    self._swarm.refused(peer_id, self._clock(), retry_after)
                raise PeerError(reason, peer_id=peer_id)
            case Failed(_, reason):
                raise PeerError(reason, peer_id=peer_id)
            case _:
                raise RemoteProtocolError(f"a {frame.KIND} came that was not asked for")

    async def _take_chunk(self, peer_id: str, frame: Chunk) -> None:
        try:
            right = await self._write(frame.shard, frame.chunk, frame.data)
        finally:
            self._writers.release()
        if not right:
            raise RemoteProtocolError(
                f"chunk {frame.chunk} of shard {frame.shard} is not what its hash says"
            )
        now = trio.current_time()
        if peer_id in self._peers:
            self._peers[peer_id].useful_at = now
        if self._download.arrived(peer_id, frame.shard, frame.chunk, now):
            self._count(peer_id, len(frame.data))
        self._news.notify()

    async def _write(self, shard: int, chunk: int, data: bytes | memoryview) -> bool:
        return await trio.to_thread.run_sync(self._store.write, shard, chunk, data)

    def _count(self, peer_id: str, size: int) -> None:
        self._progressed_at = trio.current_time()
        self._progress.came(size, peer_id)


async def fetch_manifest(
    network: Network, peer: Announcement, fingerprint: str, hello: Hello
) -> Manifest:
    """The manifest of a model, from a peer. Raises RemoteProtocolError if it lies, and PeerError."""
    stream = await network.open_stream(peer.peer_id, peer.multiaddrs, SHARD_PROTOCOL)
    frames = FrameStream(stream, hello, limit=MAX_PLAIN_FRAME + PART_BYTES + 16)
    data, total = bytearray(), 1
    try:
        while len(data) < total:
            part = await _manifest_part(frames, WantManifest(fingerprint, len(data)))
            due = min(PART_BYTES, part.total - len(data))
            if part.offset != len(data) or len(part.data) != due:
                raise RemoteProtocolError("a piece of a manifest came that was not asked for")
            if data and part.total != total:
                raise RemoteProtocolError("a manifest has changed its size")
            data += part.data
            total = part.total
        return await trio.to_thread.run_sync(decode_manifest, bytes(data), fingerprint)
    finally:
        await frames.close()


async def _manifest_part(frames: FrameStream, want: WantManifest) -> ManifestPart:
    with trio.move_on_after(PATIENCE + PART_BYTES / LEAST_RATE):
        await frames.send(want)
        answer = await frames.receive()
        if isinstance(answer, ManifestPart):
            return answer
        if isinstance(answer, Refused | Failed):
            raise PeerError(answer.reason, peer_id=frames.peer_id)
        raise RemoteProtocolError("it answered with something else than a manifest")
    raise PeerError(
        "it did not send the manifest in time", code=ErrorCode.TIMEOUT, peer_id=frames.peer_id
    )


def ban(swarm: Swarm, peer_id: str, error: RemoteProtocolError) -> None:
    """Have nothing to do any more with a peer that has sent what is wrong."""
    logger.warning("peer %s is banned, for what it sent as weights: %s", peer_id, error)
    swarm.ban(peer_id)
