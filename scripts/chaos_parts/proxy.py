"""A proxy before one node's port, which delays what passes, cuts connections, and lets none through.

The node listens on a port of its own and announces the proxy's, so that whoever dials it goes through
here, nodes and originators alike. What is under way in one direction of a connection is bounded, so a
proxy that delays, or lets nothing pass, pushes back as a long line would.
"""

from __future__ import annotations

import math
import socket
import struct
from dataclasses import dataclass, field

import trio

CHUNK = 64 * 1024
UNDER_WAY = 64
"""Chunks in one direction of a connection; more wait at their sender."""
HOST = "127.0.0.1"
_ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing resets the connection, as a machine that lost it would."""


@dataclass(eq=False)
class Connection:
    """A dialler's connection and the one to the node that belongs to it."""

    outside: trio.SocketStream
    inside: trio.SocketStream
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def abort(self) -> None:
        """Reset both, now."""
        for stream in (self.outside, self.inside):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            stream.socket.close()
        self.scope.cancel()

    def close(self) -> None:
        """Close both; what was sent arrives."""
        for stream in (self.outside, self.inside):
            stream.socket.close()


class Proxy:
    """One node's proxy. ``run`` is a task of its owner's nursery."""

    def __init__(self, target: int) -> None:
        """``target``: the port that the node listens on."""
        self.target = target
        self.port = 0
        """Where the proxy listens, once it runs."""
        self.delay = 0.0
        """Seconds that every chunk takes in each direction, from its arrival on."""
        self.rate = math.inf
        """Bytes a second that pass in each direction of a connection."""
        self.refusing = False
        """Whether new connections are reset at once."""
        self._passing = trio.Event()
        self._passing.set()
        self._connections: set[Connection] = set()

    @property
    def connections(self) -> int:
        """How many pass through."""
        return len(self._connections)

    @property
    def silent(self) -> bool:
        """Whether nothing passes, on any connection: it comes later, as from a line that was pulled."""
        return not self._passing.is_set()

    @silent.setter
    def silent(self, silent: bool) -> None:
        if not silent:
            self._passing.set()
        elif not self.silent:
            self._passing = trio.Event()

    def cut(self) -> int:
        """Reset all connections; how many there were."""
        cut = list(self._connections)
        self._connections.clear()
        for connection in cut:
            connection.abort()
        return len(cut)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; started when it listens."""
        listeners = await trio.open_tcp_listeners(0, host=HOST)
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, listeners)

    async def _serve(self, outside: trio.SocketStream) -> None:
        try:
            if self.refusing:
                raise ConnectionRefusedError
            inside = await trio.open_tcp_stream(HOST, self.target)
        except OSError:  # the node is not there: neither are we
            outside.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            await trio.aclose_forcefully(outside)
            return
        connection = Connection(outside, inside)
        self._connections.add(connection)
        ended = False
        try:
            with connection.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass, outside, inside)
                    nursery.start_soon(self._pass, inside, outside)
                ended = True
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            if connection in self._connections:  # else it was cut
                self._connections.remove(connection)
                if ended:
                    connection.close()
                else:
                    connection.abort()

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        """One direction, until the source ends or either side breaks."""
        send, receive = trio.open_memory_channel[tuple[float, bytes]](UNDER_WAY)

        async def read() -> None:
            async with send:
                while data := await source.receive_some(CHUNK):
                    await send.send((trio.current_time() + self.delay, bytes(data)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            due = -math.inf
            async for when, data in receive:
                # Nothing overtakes what was delayed for longer, or what the line is busy with.
                due = max(due, when) + len(data) / self.rate
                await trio.sleep_until(due)
                await self._passing.wait()
                await sink.send_all(data)
            await self._passing.wait()
            await sink.send_eof()


def free_port() -> int:
    """A port that nobody listens on now, for a node that is started in a moment."""
    with socket.socket() as chosen:
        chosen.bind((HOST, 0))
        port: int = chosen.getsockname()[1]
        return port
