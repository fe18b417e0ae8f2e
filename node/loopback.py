"""A network in which a node reaches itself, too.

A node that serves blocks may be a hop of its own sessions, and nobody can dial himself over libp2p.
Streams to our own peer id stay in memory; all others go out as they are.
"""

import collections
import logging
from collections.abc import Callable, Sequence

import trio

from ..protocol.errors import ErrorCode, PeerError
from .network import Network, NetworkStatistics, Stream, StreamHandler
from .wakeup import Signal

logger = logging.getLogger(__name__)

_MESSAGES = 2
"""Messages under way in one direction; more make the sender wait, as a window does."""


class LoopbackStream:
    """The ``Stream`` port between two tasks of one node; ``loopback_streams`` makes both ends."""

    def __init__(self, peer_id: str) -> None:
        self._peer_id = peer_id
        self._arrived: collections.deque[bytes] = collections.deque()
        self._take: Callable[[bytes], bool] | None = None
        self._closed = False
        self._changed = Signal()
        """There is more in ``arrived``, or less, or the end has come."""
        self.other = self

    @property
    def peer_id(self) -> str:
        """Our own peer id."""
        return self._peer_id

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Hand the buffers over as one message."""
        message = b"".join(buffers)
        await trio.lowlevel.checkpoint_if_cancelled()
        while message and not self.other._put(message):
            if self._closed:
                raise PeerError(
                    "the stream to ourselves is closed",
                    code=ErrorCode.UNREACHABLE,
                    peer_id=self._peer_id,
                )
            await self.other._changed.wait()

    def send_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        """Hand the buffers over, if there is room for a message."""
        return self.other._put(b"".join(buffers))

    async def receive(self) -> bytes:
        """The next message, or b"" at the end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._arrived:
            if self._closed:
                return b""
            await self._changed.wait()
        self._changed.notify()
        return self._arrived.popleft()

    async def wait(self, take: Callable[[bytes], bool]) -> None:
        """Let ``take`` have what comes, while there is nothing to ``receive``."""
        self._take = take
        try:
            while self._takes():
                await self._changed.wait()
        finally:
            self._take = None

    async def close(self) -> None:
        """Close both directions; what has arrived here is lost."""
        self._arrived.clear()
        for end in (self, self.other):
            end._closed = True
            end._changed.notify()

    def _takes(self) -> bool:
        return self._take is not None and not self._arrived and not self._closed

    def _put(self, message: bytes) -> bool:
        """What the other end does to this one; False: there is no room, or it is closed."""
        if self._closed or len(self._arrived) >= _MESSAGES:
            return False
        if self._take is None:
            self._arrived.append(message)
            self._changed.notify()
        elif not self._take(message):
            self._take = None
            self._changed.notify()
        return True


def loopback_streams(peer_id: str) -> tuple[LoopbackStream, LoopbackStream]:
    """Two ends of one stream."""
    ours, theirs = LoopbackStream(peer_id), LoopbackStream(peer_id)
    ours.other, theirs.other = theirs, ours
    return ours, theirs


class LoopbackNetwork:
    """The ``Network`` port: ``outside``, and ourselves."""

    def __init__(self, outside: Network, nursery: trio.Nursery) -> None:
        self._outside = outside
        self._nursery = nursery
        self._handlers: dict[str, StreamHandler] = {}

    @property
    def peer_id(self) -> str:
        """Our own peer id."""
        return self._outside.peer_id

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Where others can dial us."""
        return self._outside.multiaddrs

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve streams of ``protocol``, the others' and our own."""
        self._handlers[protocol] = handler
        self._outside.handle(protocol, handler)

    async def open_stream(self, peer_id: str, multiaddrs: Sequence[str], protocol: str) -> Stream:
        """Open a stream to a peer, or to ourselves. Raises PeerError."""
        if peer_id != self.peer_id:
            return await self._outside.open_stream(peer_id, multiaddrs, protocol)
        if protocol not in self._handlers:
            raise PeerError(f"this node does not serve {protocol}", peer_id=peer_id)
        ours, theirs = loopback_streams(peer_id)
        self._nursery.start_soon(self._serve, self._handlers[protocol], theirs)
        return ours

    async def _serve(self, handler: StreamHandler, stream: LoopbackStream) -> None:
        try:
            await handler(stream)
        except Exception:  # as for a stream from outside: the node goes on
            logger.exception("serving a stream of our own failed")
        finally:
            await stream.close()

    async def join(self, bootstrap: Sequence[str]) -> int:
        """Connect to bootstrap peers."""
        return await self._outside.join(bootstrap)

    def connected_peers(self) -> tuple[str, ...]:
        """The other peers that we have a live connection to."""
        return self._outside.connected_peers()

    async def release(self, peer_id: str) -> None:
        """Close the connections to a peer that carry no stream."""
        await self._outside.release(peer_id)

    def round_trip(self, peer_id: str) -> float | None:
        """Seconds to a connected peer and back; none at all to ourselves."""
        return 0.0 if peer_id == self.peer_id else self._outside.round_trip(peer_id)

    def statistics(self) -> NetworkStatistics:
        """A snapshot of what goes outside."""
        return self._outside.statistics()
