"""TCP below py-libp2p's connections: what listens, what dials, and how bytes are read from a stranger.

Each class here is the library's with one or two methods overridden; the docstring of each override
says what went wrong without it.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.abc import IListener, IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from .libp2p_circuit_addresses import is_circuit
from .libp2p_swarm_key import KeyedConnection

_READ_BYTES = 256 * 1024  # four Noise messages: one system call instead of eight
_LONGEST_READ = 1024 * 1024  # the library asks for at most 64 KiB, unless a peer made it ask


class ExactReader(ABC):
    """Bytes below a secured connection, whose ``read(n)`` returns all n, or fewer at the end only.

    The library's ``read_exactly`` gives up after 101 partial reads, and lets a dialler make it
    allocate whatever length it names.
    """

    _ahead = b""

    async def read(self, n: int | None = None) -> bytes:
        """Exactly ``n`` bytes unless the stream ends; any number with None."""
        if n is not None and n > _LONGEST_READ:
            raise ValueError(f"the peer makes us read {n} bytes at once")
        if n is None:
            ahead, self._ahead = self._ahead, b""
            return ahead or await self._receive()
        pieces, missing = [], n
        while missing > 0:
            if not self._ahead:
                self._ahead = await self._receive()
                if not self._ahead:
                    break
            piece, self._ahead = self._ahead[:missing], self._ahead[missing:]
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @abstractmethod
    async def _receive(self) -> bytes:
        """What has arrived; b"" at the end."""


class BufferedSocket(ExactReader, TrioTCPStream):
    """A socket that asks the kernel once for several Noise messages.

    One task reads and one writes, so that nobody takes a lock: the library's own ``read`` and ``write``
    wait for a turn of the loop to do so, for every message. Nor does anybody try to read before there is
    something, as trio's stream does: that costs a system call and an exception for every message.
    """

    async def write(self, data: bytes) -> None:
        """Send ``data``; nothing on a socket that we have closed ourselves."""
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise _broken(error) from error
        except trio.ClosedResourceError:
            return

    def write_now(self, data: bytes) -> int:
        """Send as much as the kernel takes without waiting, which may be nothing; how many bytes.

        Not while ``write`` is running. Raises ConnectionClosedError.
        """
        try:
            return os.write(self.stream.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _broken(error) from error

    async def _receive(self) -> bytes:
        """What the kernel has; b"" at the end, and on a socket that we have closed ourselves."""
        socket = self.stream.socket
        try:
            if os.name != "posix":  # where a socket is no file
                return bytes(await self.stream.receive_some(_READ_BYTES))
            while socket.fileno() >= 0:
                await trio.lowlevel.wait_readable(socket)
                with contextlib.suppress(BlockingIOError):
                    return os.read(socket.fileno(), _READ_BYTES)
        except trio.ClosedResourceError:
            pass
        except (trio.BrokenResourceError, OSError) as error:
            raise _broken(error) from error
        return b""


def _broken(error: Exception) -> ConnectionClosedError:
    return ConnectionClosedError(f"the peer broke the connection: {error}")


class GuardedTcp(TCP):
    """TCP with buffered reads, to addresses that say no more than where to dial; with a key or not."""

    def __init__(self, swarm_key: bytes | None) -> None:
        super().__init__()
        self._swarm_key = swarm_key

    def wrapped(self, stream: trio.SocketStream, *, initiator: bool) -> RawConnection:
        """The raw connection over a socket."""
        raw = RawConnection(
            BufferedSocket(stream), initiator=initiator, connection_type=ConnectionType.DIRECT
        )
        return raw if self._swarm_key is None else KeyedConnection(raw, self._swarm_key)

    def can_dial(self, maddr: Multiaddr) -> bool:
        """The library's would dial the relay of a circuit address."""
        return super().can_dial(maddr) and not is_circuit(maddr)

    async def _dial_resolved(
        self, maddr: Multiaddr, source: tuple[str, int] | None = None
    ) -> IRawConnection:
        connection = await super()._dial_resolved(maddr, source)
        assert isinstance(connection, RawConnection)
        assert isinstance(connection.stream, TrioTCPStream)
        return self.wrapped(connection.stream.stream, initiator=True)


class Listener(IListener):
    """Sockets of one listening address, served in the network's own nursery.

    The library's listener runs in a system task, where a bug ends the process, and shares its port
    (SO_REUSEPORT) with whoever binds it too, so that two nodes on one port both seem to work.
    """

    def __init__(self, sockets: Sequence[trio.SocketListener]) -> None:
        self._sockets = tuple(sockets)

    async def listen(self, maddr: Multiaddr) -> None:
        """Not used: the network listens by itself."""
        raise NotImplementedError

    async def serve(self, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
        """Accept connections until closed or cancelled."""
        try:
            await trio.serve_listeners(handler, list(self._sockets))
        except* trio.ClosedResourceError:
            pass

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """Where the sockets are bound."""
        addresses = []
        for listener in self._sockets:
            host, port = listener.socket.getsockname()[:2]
            family = "ip6" if ":" in host else "ip4"
            addresses.append(Multiaddr(f"/{family}/{host}/tcp/{port}"))
        return tuple(addresses)

    async def close(self) -> None:
        """Stop listening."""
        for listener in self._sockets:
            await trio.aclose_forcefully(listener)
