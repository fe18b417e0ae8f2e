"""The network ports in memory: no sockets, no cryptography, the same promises.

``tests/node/test_network.py`` runs one suite on this and on the real one. Everything sent is copied
and arrives in pieces that fall where the sender did not cut, buffers are bounded as windows are,
and a peer can be cut off in the middle of anything.
"""

import itertools
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
from petals.node.network import Counting, NetworkStatistics, Stream, StreamHandler
from petals.protocol.errors import ConfigError, ErrorCode, LocalProtocolError, PeerError

MergeEntries = Callable[[list[bytes], list[bytes], float], list[bytes]]

PIECE_BYTES = 60_013
"""The largest piece that arrives: a prime, so that no message is a whole number of them."""
WINDOW_BYTES = 256 * 1024
"""What a sender may have in flight to a reader that does not read."""


class _Pipe:
    """One direction of a stream."""

    def __init__(self) -> None:
        self.pieces: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.broken = ""
        self.news = trio.Event()

    async def wait(self) -> None:
        if self.news.is_set():
            self.news = trio.Event()
        await self.news.wait()

    def end(self) -> None:
        self.ended = not self.broken
        self.news.set()

    def fail(self, reason: str) -> None:
        if not self.ended:
            self.broken = self.broken or reason
        self.news.set()


class MemoryStream:
    """The ``Stream`` port."""

    def __init__(self, peer_id: str, incoming: _Pipe, outgoing: _Pipe, count: "_Count") -> None:
        self._peer_id = peer_id
        self._incoming, self._outgoing = incoming, outgoing
        self._count = count
        self._closed = False

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        finished = False
        try:
            for buffer in buffers:
                await self._send_one(bytes(buffer))
            finished = True
        finally:
            if not finished:
                self.reset("a message was cut off")

    def send_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        pipe, data = self._outgoing, b"".join(buffers)
        if pipe.size >= WINDOW_BYTES or len(data) > PIECE_BYTES or pipe.broken or pipe.ended:
            return False
        self._put(data)
        return True

    async def _send_one(self, data: bytes) -> None:
        pipe = self._outgoing
        for start in range(0, len(data), PIECE_BYTES):
            while pipe.size >= WINDOW_BYTES and not pipe.broken and not pipe.ended:
                await pipe.wait()
            if pipe.broken or pipe.ended:
                raise self._error(pipe.broken or "the stream is closed for sending")
            self._put(data[start : start + PIECE_BYTES])

    def _put(self, piece: bytes) -> None:
        pipe = self._outgoing
        pipe.pieces.append(piece)
        pipe.size += len(piece)
        pipe.news.set()
        self._count.sent += len(piece)

    async def receive(self) -> bytes:
        pipe = self._incoming
        while not pipe.pieces:
            if self._closed:
                raise self._error("the stream is closed")
            if pipe.ended:
                await trio.lowlevel.checkpoint()
                return b""
            if pipe.broken:
                raise self._error(pipe.broken)
            await pipe.wait()
        await trio.lowlevel.checkpoint()
        return self._next_piece()

    def _next_piece(self) -> bytes:
        pipe = self._incoming
        piece = pipe.pieces.popleft()
        pipe.size -= len(piece)
        pipe.news.set()
        self._count.received += len(piece)
        return piece

    async def wait(self, take: Callable[[bytes], bool]) -> None:
        pipe = self._incoming
        while not self._closed and not pipe.ended and not pipe.broken:
            if not pipe.pieces:
                await pipe.wait()
            elif not take(self._next_piece()):
                return

    async def close(self) -> None:
        self._closed = True
        self._outgoing.end()
        self._incoming.pieces.clear()
        self._incoming.fail("the peer closed the stream")

    def reset(self, reason: str) -> None:
        """Break both directions; what has arrived can still be read."""
        self._incoming.fail(reason)
        self._outgoing.fail(reason)

    @property
    def open(self) -> bool:
        """Whether either direction may still carry something."""
        return any(not (pipe.ended or pipe.broken) for pipe in (self._incoming, self._outgoing))

    def _error(self, reason: str) -> PeerError:
        return PeerError(
            f"the stream to {self._peer_id} broke: {reason}",
            code=ErrorCode.UNREACHABLE,
            peer_id=self._peer_id,
        )


@dataclass
class _Count:
    protocol: str
    sent: int = 0
    received: int = 0


@dataclass
class MemorySwarm:
    """The world: which networks there are and who can reach whom."""

    merge: MergeEntries
    clock: Callable[[], float]
    counting: Callable[[], Counting]
    """What each holder counts with."""
    round_trip: float = 0.001
    """What every node measures to every other, in seconds."""
    round_trips: dict[str, float] = field(default_factory=dict)
    """What every node measures to some of them instead."""
    networks: dict[str, "MemoryNetwork"] = field(default_factory=dict)
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    @asynccontextmanager
    async def network(
        self, peer_id: str, *, serve: bool = True, bootstrap: Sequence[str] = ()
    ) -> AsyncIterator["MemoryNetwork"]:
        """A network while the block runs."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            network = MemoryNetwork(self, peer_id, nursery, serve=serve)
            self.networks[peer_id] = network
            try:
                others = [text for text in bootstrap if _peer_of(text) != peer_id]
                if others and not await network.join(others):
                    raise PeerError("no bootstrap peer could be reached, of: " + ", ".join(others))
                yield network
            except Exception as error:  # noqa: BLE001 - raised again below
                failure = error
            finally:
                self.cut(peer_id)
                del self.networks[peer_id]
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def cut(self, peer_id: str) -> None:
        """Break all connections of a peer, as if its process had been killed."""
        network = self.networks[peer_id]
        for other in list(network.peers):
            self.disconnect(peer_id, other)

    def disconnect(self, one: str, other: str) -> None:
        """Break the connection between two peers; they can connect again."""
        for here, there in ((one, other), (other, one)):
            network = self.networks.get(here)
            if network is not None:
                network.peers.discard(there)
                for stream, _ in network.streams:
                    if stream.peer_id == there:
                        stream.reset("the connection was lost")


class MemoryNetwork:
    """The ``Network`` and ``Directory`` ports."""

    def __init__(
        self, swarm: MemorySwarm, peer_id: str, nursery: trio.Nursery, *, serve: bool
    ) -> None:
        self._swarm = swarm
        self._peer_id = peer_id
        self._nursery = nursery
        self._serve = serve
        self._number = next(swarm.numbers)
        self._handlers: dict[str, StreamHandler] = {}
        self._entries: dict[bytes, list[bytes]] = {}
        self._counting = swarm.counting()
        self.peers: set[str] = set()
        self.streams: list[tuple[MemoryStream, _Count]] = []

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        if not self._serve:
            return ()
        return (f"/ip4/127.0.0.1/tcp/{self._number}/p2p/{self._peer_id}",)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def open_stream(self, peer_id: str, multiaddrs: Sequence[str], protocol: str) -> Stream:
        await trio.lowlevel.checkpoint()
        other = self._reach(peer_id, multiaddrs)
        handler = other._handlers.get(protocol)
        if handler is None:
            raise self._unreachable(peer_id, f"it does not speak {protocol}")
        there, back = _Pipe(), _Pipe()
        theirs, ours = _Count(protocol), _Count(protocol)
        inbound = MemoryStream(self._peer_id, there, back, theirs)
        outbound = MemoryStream(peer_id, back, there, ours)
        other.streams.append((inbound, theirs))
        self.streams.append((outbound, ours))
        other._nursery.start_soon(other._serve_stream, handler, inbound)
        return outbound

    async def _serve_stream(self, handler: StreamHandler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        except Exception:  # noqa: BLE001 - a handler's bug is the handler's
            stream.reset("the handler failed")
        finally:
            with trio.CancelScope(shield=True):
                await stream.close()

    async def join(self, bootstrap: Sequence[str]) -> int:
        await trio.lowlevel.checkpoint()
        reached = 0
        for peer_id in {_peer_of(text) for text in bootstrap} - {self._peer_id}:
            try:
                self._reach(peer_id, bootstrap)
            except PeerError:
                continue
            reached += 1
        return reached

    def _reach(self, peer_id: str, multiaddrs: Sequence[str]) -> "MemoryNetwork":
        other = self._swarm.networks.get(peer_id)
        if peer_id not in self.peers:
            known = self._known().get(peer_id, set()) | set(multiaddrs)
            if not known:
                raise self._unreachable(peer_id, "we know no address of it")
            if other is None or other is self or not set(other.multiaddrs) & known:
                raise self._unreachable(peer_id, "nobody is there")
            self.peers.add(peer_id)
            other.peers.add(self._peer_id)
        assert other is not None, "whoever goes is dropped from the peers of all"
        return other

    def _known(self) -> dict[str, set[str]]:
        """The addresses that a walk through the directory would find."""
        return {holder.peer_id: set(holder.multiaddrs) for holder in self._holders()}

    def _holders(self) -> list["MemoryNetwork"]:
        """The serving networks that connections lead to, through others if need be."""
        seen, queue = {self._peer_id}, deque([self])
        while queue:
            for peer_id in queue.popleft().peers - seen:
                seen.add(peer_id)
                queue.append(self._swarm.networks[peer_id])
        return [self._swarm.networks[peer_id] for peer_id in seen if self._serves(peer_id)]

    def _serves(self, peer_id: str) -> bool:
        return self._swarm.networks[peer_id]._serve

    def connected_peers(self) -> tuple[str, ...]:
        return tuple(sorted(self.peers))

    async def release(self, peer_id: str) -> None:
        await trio.lowlevel.checkpoint()
        if not any(stream.peer_id == peer_id and stream.open for stream, _ in self.streams):
            self._swarm.disconnect(self._peer_id, peer_id)

    def round_trip(self, peer_id: str) -> float | None:
        if peer_id not in self.peers:
            return None
        return self._swarm.round_trips.get(peer_id, self._swarm.round_trip)

    async def put(self, key: bytes, entry: bytes) -> int:
        await trio.lowlevel.checkpoint()
        _check_key(key)
        now = self._swarm.clock()
        taken = 0
        for holder in self._holders():
            if self._swarm.merge([], [entry], now):
                existing = holder._entries.get(key, [])
                holder._entries[key] = self._swarm.merge(existing, [entry], now)
                holder._counting.count(key, [entry], now)
                taken += holder is not self
        return taken

    async def get(self, key: bytes) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        _check_key(key)
        found: list[bytes] = []
        for holder in self._holders():
            found = self._swarm.merge(found, holder._entries.get(key, []), self._swarm.clock())
        return found

    async def sums(self, key: bytes) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        _check_key(key)
        others = [holder for holder in self._holders() if holder is not self]
        said = [holder._counting.sums(key, self._swarm.clock()) for holder in others]
        return [sums for sums in said if sums is not None]

    def statistics(self) -> NetworkStatistics:
        sent: Counter[str] = Counter()
        received: Counter[str] = Counter()
        for _, count in self.streams:
            sent[count.protocol] += count.sent
            received[count.protocol] += count.received
        return NetworkStatistics(
            connections=len(self.peers),
            peers=len(self.peers),
            streams=sum(stream.open for stream, _ in self.streams),
            bytes_sent=dict(sent),
            bytes_received=dict(received),
            directory_keys=len(self._entries),
            directory_peers=len([h for h in self._holders() if h is not self]),
        )

    def _unreachable(self, peer_id: str, reason: str) -> PeerError:
        return PeerError(
            f"cannot reach {peer_id}: {reason}", code=ErrorCode.UNREACHABLE, peer_id=peer_id
        )


def _peer_of(multiaddr: str) -> str:
    before, found, peer_id = multiaddr.partition("/p2p/")
    if not before.startswith("/") or not found or not peer_id:
        raise ConfigError(f"{multiaddr!r} does not say which peer is there")
    return peer_id


def _check_key(key: bytes) -> None:
    if not key.startswith(b"/petals/") or len(key) > 50:
        raise LocalProtocolError(f"{key!r} is no key of the directory")


class CountingEntries:
    """Counts for tests: how many different entries were written at a key."""

    def __init__(self) -> None:
        self._seen: dict[bytes, set[bytes]] = {}

    def count(self, key: bytes, entries: Sequence[bytes], now: float) -> None:
        del now
        self._seen.setdefault(key, set()).update(entries)

    def sums(self, key: bytes, now: float) -> bytes | None:
        del now
        return b"%d" % len(self._seen[key]) if key in self._seen else None

    def sweep(self, now: float) -> None:
        pass


def expiring_merge(
    existing: list[bytes], incoming: list[bytes], now: float, *, whole: bool = False
) -> list[bytes]:
    """A merge for tests: an entry is ``writer sequence expiry``; anything else is a forgery."""
    del whole  # it never keeps fewer
    newest: dict[str, tuple[int, float]] = {}
    for entry in (*existing, *incoming):
        try:
            writer, sequence, expiry = entry.decode().split()
            candidate = (int(sequence), float(expiry))
        except ValueError:
            continue
        if candidate[1] > now and math.isfinite(candidate[1]):
            newest[writer] = max(newest.get(writer, (-1, 0.0)), candidate)
    return [f"{writer} {number} {expiry}".encode() for writer, (number, expiry) in newest.items()]
