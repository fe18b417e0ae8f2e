"""A network in which a node reaches itself, too.

A node that serves blocks may be a hop of its own sessions, and nobody can dial himself over libp2p.
Streams to our own peer id stay in memory; all others go out as they are.
"""

import logging
from collections.abc import Sequence

import trio

from ..protocol.errors import ErrorCode, PeerError
from .network import Network, NetworkStatistics, Stream, StreamHandler

logger = logging.getLogger(__name__)

_MESSAGES = 2
"""Messages under way in one direction; more make the sender wait, as a window does."""


class LoopbackStream:
    """The ``Stream`` port between two tasks of one node."""

    def __init__(
        self,
        peer_id: str,
        outgoing: trio.MemorySendChannel[bytes],
        incoming: trio.MemoryReceiveChannel[bytes],
    ) -> None:
        self._peer_id = peer_id
        self._outgoing = outgoing
        self._incoming = incoming

    @property
    def peer_id(self) -> str:
        """Our own peer id."""
        return self._peer_id

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Hand the buffers over as one message."""
        message = b"".join(buffers)
        try:
            if message:
                await self._outgoing.send(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise PeerError(
                "the stream to ourselves is closed",
                code=ErrorCode.UNREACHABLE,
                peer_id=self._peer_id,
            ) from None

    def send_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        """Hand the buffers over, if there is room for a message."""
        try:
            self._outgoing.send_nowait(b"".join(buffers))
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    async def receive(self) -> bytes:
        """The next message, or b"" at the end."""
        try:
            return await self._incoming.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            return b""

    async def close(self) -> None:
        """Close both directions."""
        self._outgoing.close()
        self._incoming.close()


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
        there_send, there_receive = trio.open_memory_channel[bytes](_MESSAGES)
        back_send, back_receive = trio.open_memory_channel[bytes](_MESSAGES)
        theirs = LoopbackStream(peer_id, back_send, there_receive)
        self._nursery.start_soon(self._serve, self._handlers[protocol], theirs)
        return LoopbackStream(peer_id, there_send, back_receive)

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
