"""One Yamux stream: what its callers may do, and what the connection's reader does to it.

Rules of this file: between the last await of a call and its effect there is none, so a cancelled
call either happened or did not; nothing that the connection's reader calls awaits; whatever ends in
``_now`` needs no checkpoint, for cleaning up while being cancelled.
"""

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import (
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)

from ..protocol.admission import AdmissionLimits
from .libp2p_noise import MESSAGE_BYTES

if TYPE_CHECKING:
    from .libp2p_yamux import YamuxConnection

HEADER = struct.Struct("!BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
INITIAL_WINDOW = 256 * 1024  # fixed by the protocol

# A frame that fits into one Noise message is sent and received as one; the library's 64 KiB frames need
# two, which costs a third of the throughput.
MAX_PAYLOAD = MESSAGE_BYTES - HEADER.size

_READS_IN_A_TURN = 8  # waiting for a turn of the loop takes as long as reading a piece
_SMALL_CHUNK = 2048  # received pieces are joined up to here: one-byte frames must not cost 50 each


@dataclass(frozen=True)
class YamuxLimits:
    """What a connection may cost, and how long its ends are waited for."""

    streams: int = AdmissionLimits.peer_streams
    """Open streams of each direction, over all connections to one peer; the peer's further ones are
    refused, ours fail at once."""
    opens_per_second: float = AdmissionLimits.peer_opens
    """Streams that the peer may open for long; further ones wait to be served."""
    window: int = 4 * 1024 * 1024
    """Bytes a stream may have in flight to us once its reader has proved to read."""
    window_budget: int = 64 * 1024 * 1024
    """By how much all windows of a connection together may exceed their initial 256 KiB."""
    unread_bytes: int = 512 * 1024 * 1024
    """Received and not read yet, over all connections of the host. Beyond it the connection that
    holds most is closed: well-behaved swarms stay far below."""
    ping_seconds: float = 6.0
    """Pause between keep-alive pings."""
    missed_pings: int = 3
    """Silent pauses after which the peer counts as gone. Counted in turns of our own loop, not in
    seconds: a process that was starved or suspended itself drops nobody. (9 s dropped live peers
    on a starved machine; 18 s did not.)"""
    stalled_seconds: float = 600.0
    """How long a writer waits for a reader that does not read."""
    linger_seconds: float = 30.0
    """How long a stream that we have closed waits for the peer to close it, too."""


class PeerMisbehaved(Exception):
    """The peer broke the protocol or a limit; the message says which."""


class YamuxStream(IMuxedStream):
    """One stream. The library uses ``read``, ``write``, ``close``; we also use ``receive``."""

    muxed_conn: "YamuxConnection"

    def __init__(self, connection: "YamuxConnection", stream_id: int) -> None:
        self.muxed_conn = connection
        self.stream_id = stream_id
        self.protocol = "negotiation"
        """For the statistics; whoever negotiates it writes it here."""
        self._chunks: deque[bytes] = deque()
        self._take: Callable[[bytes], bool] | None = None  # who waits for the next of them
        self._window = INITIAL_WINDOW  # its full size
        self._receivable = INITIAL_WINDOW  # what of it the peer may still use
        self._unwaited = 0  # reads since the loop had its turn
        self._consumed = 0  # what our reader has taken since the last window update
        self._sendable = INITIAL_WINDOW  # what we may still send
        self._news = trio.Event()  # set when a waiting reader or writer should look again
        self._reset = ""  # why, once the stream is broken
        self._peer_done = False  # the peer has closed its side in an orderly way
        self._local_closed = False
        self._abandoned_at: float | None = None  # since when nobody here reads any more

    def __repr__(self) -> str:
        state = self._reset or ("closed" if self._local_closed else "open")
        return f"<YamuxStream {self.stream_id} {self.protocol} {state}>"

    @property
    def is_reset(self) -> bool:
        """Whether the stream is broken."""
        return bool(self._reset)

    # What callers do

    async def receive(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, or b"" when the peer has closed its side."""
        self._unwaited += 1
        while not self._chunks:
            if self._abandoned_at is not None:
                raise MuxedStreamClosed("the stream is closed")
            if self._peer_done:
                await trio.lowlevel.checkpoint()
                return b""
            if self._reset:
                raise MuxedStreamReset(self._reset)
            await self._wait_for_news()
            self._unwaited = 0
        if self._unwaited < _READS_IN_A_TURN:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            self._unwaited = 0
            await trio.lowlevel.checkpoint()
        if not self._chunks:  # reset, or read by somebody else, meanwhile
            return await self.receive(max_bytes)
        chunk = self._chunks.popleft()
        if max_bytes is not None and len(chunk) > max_bytes:
            self._chunks.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        self.muxed_conn.unread(-len(chunk))
        self._has_read(len(chunk))
        return chunk

    async def wait(self, take: Callable[[bytes], bool]) -> None:
        """Until there is something to ``receive``, or ``take`` has returned False.

        Meanwhile ``take`` has what comes, right from the connection's reader; it must not raise.
        """
        self._take = take
        try:
            while self._takes():
                await self._wait_for_news()
        finally:
            self._take = None

    async def read(self, n: int | None = -1) -> bytes:
        """As the library wants it: at most ``n`` bytes, MuxedStreamEOF at the end."""
        if n == 0:
            return b""
        data = await self.receive(None if n is None or n < 0 else n)
        if not data:
            raise MuxedStreamEOF("the peer has closed the stream")
        return data

    async def write(self, data: bytes | memoryview) -> None:
        """Queue ``data`` behind what is queued; waits for the peer's window and for our queue."""
        view = memoryview(data).cast("B")
        connection = self.muxed_conn
        await trio.lowlevel.checkpoint_if_cancelled()
        while view:
            self._check_sendable()
            if self._sendable == 0:
                with trio.move_on_after(connection.limits.stalled_seconds) as scope:
                    await self._wait_for_news()
                if scope.cancelled_caught:
                    self.reset_now("the peer does not read what we send")
                continue
            try:  # ``acquire`` would give up this turn of the loop even for a free slot
                connection.data_slots.acquire_nowait()
            except trio.WouldBlock:
                await connection.data_slots.acquire()
            size = min(len(view), self._sendable, MAX_PAYLOAD)
            if self._reset or self._local_closed or size == 0:
                connection.data_slots.release()
                continue
            self._sendable -= size
            connection.queue_data(self, view[:size])
            view = view[size:]

    def write_now(self, data: bytes) -> bool:
        """``write`` without waiting; False: there is no room for all of it, and nothing was queued."""
        if self._reset or self._local_closed or len(data) > min(self._sendable, MAX_PAYLOAD):
            return False
        try:
            self.muxed_conn.data_slots.acquire_nowait()
        except trio.WouldBlock:
            return False
        self._sendable -= len(data)
        self.muxed_conn.queue_data(self, memoryview(data))
        return True

    async def close(self) -> None:
        """Close both directions; what still arrives is answered with a reset."""
        self.close_now()
        await trio.lowlevel.checkpoint()

    async def close_write(self) -> None:
        """Tell the peer that no more comes, and go on reading."""
        self._send_fin()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Break both directions at once."""
        self.reset_now("reset by us")
        await trio.lowlevel.checkpoint()

    def close_now(self) -> None:
        """``close`` without a checkpoint, for cleaning up while being cancelled."""
        self._send_fin()
        if self._abandoned_at is not None:
            return
        unread, self._abandoned_at = sum(map(len, self._chunks)), trio.current_time()
        self._chunks.clear()
        self.muxed_conn.unread(-unread)
        self._news.set()
        if unread and not self._peer_done and not self._reset:
            self._refuse_rest()

    def reset_now(self, reason: str) -> None:
        """``reset`` without a checkpoint, for cleaning up while being cancelled."""
        if self._reset or (self._local_closed and self._peer_done):
            return
        self.muxed_conn.queue_control(WINDOW_UPDATE, RST, self.stream_id)
        self.broken(reason)

    def set_deadline(self, ttl: int) -> None:
        """Not supported: callers use trio's cancel scopes."""
        raise NotImplementedError("use a trio cancel scope")

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's address, as the socket has it."""
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> "YamuxStream":
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()

    # What the connection's reader does, never awaiting

    def peer_sent(self, payload: bytes) -> None:
        """Take in payload that arrived."""
        self._receivable -= len(payload)
        if self._receivable < 0:
            raise PeerMisbehaved(f"stream {self.stream_id} overran its receive window")
        if self._abandoned_at is not None:
            self._refuse_rest()
        elif self._take is not None and not self._reset:  # there is nothing before it then
            self._has_read(len(payload))
            if not self._take(payload):
                self._take = None
                self._news.set()
        elif not self._reset:
            if self._chunks and len(self._chunks[-1]) + len(payload) <= _SMALL_CHUNK:
                self._chunks[-1] += payload
            else:
                self._chunks.append(payload)
            self.muxed_conn.unread(len(payload))
            self._news.set()

    def peer_granted(self, increment: int) -> None:
        """The peer has room for more."""
        self._sendable += increment
        self._news.set()

    def peer_closed(self) -> None:
        """The peer sends no more."""
        self._peer_done = True
        if self._local_closed:
            self.muxed_conn.forget(self)
        self._news.set()

    def broken(self, reason: str) -> None:
        """The stream or its connection is gone; what has arrived can still be read."""
        if not self._reset:
            self._reset = reason
            self._local_closed = True
            self.muxed_conn.forget(self)
        self._news.set()

    def sweep(self, now: float) -> None:
        """Reset a stream that we closed long ago and the peer never did."""
        if self._abandoned_at is None:
            return
        if now - self._abandoned_at > self.muxed_conn.limits.linger_seconds:
            self.reset_now("the peer did not close the stream")

    # Inner workings

    async def _wait_for_news(self) -> None:
        if self._news.is_set():
            self._news = trio.Event()
        await self._news.wait()

    def _takes(self) -> bool:
        to_see = self._chunks or self._peer_done or self._reset or self._abandoned_at is not None
        return self._take is not None and not to_see

    def _check_sendable(self) -> None:
        if self._reset:
            raise MuxedStreamReset(self._reset)
        if self._local_closed:
            raise MuxedStreamClosed("the stream is closed for sending")

    def _send_fin(self) -> None:
        if not self._local_closed:
            self._local_closed = True
            self.muxed_conn.queue_control(WINDOW_UPDATE, FIN, self.stream_id)
            if self._peer_done:
                self.muxed_conn.forget(self)
            self._news.set()

    def _refuse_rest(self) -> None:
        self.muxed_conn.queue_control(WINDOW_UPDATE, RST, self.stream_id)
        self.broken("closed while the peer was still sending")

    def _has_read(self, size: int) -> None:
        self._consumed += size
        if self._consumed * 2 >= self._window and not self._peer_done and not self._reset:
            self._grant()

    def _grant(self) -> None:
        growth = self.muxed_conn.grow_window(self._window)
        self._window += growth
        increment, self._consumed = self._consumed + growth, 0
        self._receivable += increment
        self.muxed_conn.queue_urgent(WINDOW_UPDATE, 0, self.stream_id, increment)

    @property
    def extra_window(self) -> int:
        """By how much the window exceeds its initial size."""
        return self._window - INITIAL_WINDOW
