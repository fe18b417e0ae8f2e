"""Yamux: many streams over one secured connection, none of which can harm the others.

Why our own and not py-libp2p's: there, cancelling a reader or a writer corrupts the connection, a
reader that pauses for five seconds kills its writer, nothing bounds what a peer may make us buffer,
and a frozen peer is never noticed. This one plugs into the library's public ``IMuxedConn`` and
speaks the same wire protocol (github.com/hashicorp/yamux/blob/master/spec.md).

Rules of this file:

- One task reads the connection and one writes it, and nobody cancels them except to close the
  connection. Everyone else only touches queues, and between the last await of a call and its effect
  there is none, so a cancelled call either happened or did not. A small frame that finds the queues
  empty leaves at once, without a turn of the loop: the writing task sleeps then.
- Whatever arrives is handled without awaiting: a slow stream cannot hold up the others.
- Whatever a peer can make grow has a bound (``YamuxLimits``); breaking one closes the connection.
"""

import logging
from collections import Counter, deque
from dataclasses import dataclass, field

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from multiaddr import Multiaddr

from ..protocol.admission import OPENS_AT_ONCE, Pace
from .libp2p_noise import MESSAGE_BYTES, noise_messages_of
from .libp2p_yamux_stream import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    PeerMisbehaved,
    YamuxLimits,
    YamuxStream,
)

logger = logging.getLogger(__name__)

PROTOCOL_ID = "/yamux/1.0.0"

_QUEUED_DATA_FRAMES = 8  # half a MiB: enough to keep the writer busy, little for others to wait for
_QUEUED_FRAMES = 4096  # all kinds; only a peer that provokes replies and reads none gets there
_WRITE_BYTES = 4 * MESSAGE_BYTES  # a system call costs as much as encrypting half a message
_AT_ONCE = 32 * 1024  # a step of the largest model; the loop waits while it is encrypted
_FLUSH_SECONDS = 0.5  # what an orderly close waits for queued frames to leave


@dataclass
class Traffic:
    """Bytes of payload by stream protocol, over all connections of a host."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    unread: "Counter[YamuxConnection]" = field(default_factory=Counter)
    """Bytes that were received and that nobody has read yet, by connection."""
    streams: Counter[tuple[ID, bool]] = field(default_factory=Counter)
    """Open streams by peer, and by whether we have opened them."""


class YamuxConnection(IMuxedConn):
    """One connection, as the library's swarm wants it."""

    def __init__(
        self,
        conn: ISecureConn,
        peer_id: ID,
        limits: YamuxLimits | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.secured_conn = conn
        self.peer_id = peer_id
        self.limits = limits or YamuxLimits()
        self.traffic = traffic or Traffic()
        self.streams: dict[int, YamuxStream] = {}
        self.data_slots = trio.Semaphore(_QUEUED_DATA_FRAMES)
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.round_trip: float | None = None
        """Seconds, smoothed; None until the first ping has come back."""
        self.seen_as: Multiaddr | None = None
        """Where the peer sees us, as it says."""
        self.upgrade_awaited = False
        """Whether somebody has tried to replace this relayed connection by a direct one."""
        self._initiator = conn.is_initiator
        self._next_stream_id = 1 if self._initiator else 2
        self._last_peer_id = 0
        self._extra_window = 0
        self._ordered: deque[tuple[bytes, bool]] = deque()  # (frame, whether it holds a slot)
        self._urgent: deque[bytes] = deque()
        self._work = trio.Event()  # not set while the writing task waits for something to write
        self._work.set()
        self._messages = noise_messages_of(conn)
        self._closing = False
        self._peer_leaves = False
        self._scope = trio.CancelScope()
        self._reason = "the connection is closed"
        self._incoming_send, self._incoming = trio.open_memory_channel[YamuxStream](
            self.limits.streams
        )
        self._pace = Pace(self.limits.opens_per_second, OPENS_AT_ONCE)
        self._unparsed = b""
        self._body_of: YamuxStream | None = None
        self._body_left = 0
        self._body_flags = 0
        self._heard = 0
        self._pings: dict[int, float] = {}
        self._next_ping = 0

    # What the library asks

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return self._initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        """Whether the connection is over."""
        return self.event_closed.is_set()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The peer's addresses, as the connection below knows them."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's address, as the socket has it."""
        return self.secured_conn.get_remote_address()

    async def open_stream(self) -> YamuxStream:
        """Open a stream; never waits for the peer."""
        await trio.lowlevel.checkpoint()
        if self.is_closed or self._closing or self._peer_leaves:
            raise MuxedStreamError(self._reason if self.is_closed else "the connection is closing")
        if self.traffic.streams[self.peer_id, True] >= self.limits.streams:
            raise MuxedStreamError(f"{self.limits.streams} streams are open to this peer already")
        stream = YamuxStream(self, self._next_stream_id)
        self._next_stream_id += 2
        self._remember(stream)
        self.queue_control(WINDOW_UPDATE, SYN, stream.stream_id)
        return stream

    async def accept_stream(self) -> YamuxStream:
        """The next stream that the peer has opened; a peer in a hurry has to wait for its turn."""
        while True:
            try:
                stream = await self._incoming.receive()
            except trio.EndOfChannel as error:
                raise MuxedConnUnavailable(self._reason) from error
            if stream.is_reset:  # to open and to reset without end must not cost us a task each
                continue
            with trio.move_on_after(self._pace.take(trio.current_time())):
                await self.event_closed.wait()
            return stream

    async def start(self) -> None:
        """Run the connection until it closes. Raises nothing."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_alive)
                    self.event_started.set()
        finally:
            await self._shut_down()

    async def close(self) -> None:
        """Let queued frames leave, then close."""
        if not self._closing and not self.is_closed:
            self._closing = True
            self.queue_urgent(GO_AWAY, 0, 0, 0)
        try:
            if self.event_started.is_set():
                with trio.move_on_after(_FLUSH_SECONDS):
                    await self.event_closed.wait()
        finally:
            self._scope.cancel()
            if not self.event_started.is_set():
                await self._shut_down()

    # What streams ask, never awaiting

    def queue_data(self, stream: YamuxStream, payload: memoryview) -> None:
        """Queue a frame of data, for which the caller holds a slot."""
        header = HEADER.pack(0, DATA, 0, stream.stream_id, len(payload))
        # The one copy: the caller may reuse its memory as soon as we return.
        self._ordered.append((b"".join((header, payload)), True))
        self.traffic.sent[stream.protocol] += len(payload)
        if len(payload) > _AT_ONCE or self._work.is_set() or not self._written_now():
            self._work.set()

    def queue_control(self, kind: int, flags: int, stream_id: int) -> None:
        """Queue a frame that must stay behind the data queued before it."""
        if self._may_queue():
            self._ordered.append((HEADER.pack(0, kind, flags, stream_id, 0), False))

    def queue_urgent(self, kind: int, flags: int, stream_id: int, value: int) -> None:
        """Queue a frame that may overtake data."""
        if self._may_queue():
            self._urgent.append(HEADER.pack(0, kind, flags, stream_id, value))

    def unread(self, change: int) -> None:
        """Keep count of what waits to be read."""
        if self.is_closed:
            return
        unread = self.traffic.unread
        unread[self] += change
        if unread[self] == 0:
            del unread[self]
        if change > 0 and unread.total() > self.limits.unread_bytes:
            fullest = max(unread, key=unread.__getitem__)
            fullest._stop("more has come from the peer than was read")

    def forget(self, stream: YamuxStream) -> None:
        """Drop a finished stream from the table."""
        if self.streams.pop(stream.stream_id, None) is None:
            return
        self._extra_window -= stream.extra_window
        key = self._counted_as(stream)
        self.traffic.streams[key] -= 1
        if self.traffic.streams[key] == 0:
            del self.traffic.streams[key]

    def grow_window(self, window: int) -> int:
        """By how much a window of that size may grow now."""
        growth = min(
            window, self.limits.window - window, self.limits.window_budget - self._extra_window
        )
        growth = max(growth, 0)
        self._extra_window += growth
        return growth

    # The three tasks

    async def _read(self) -> None:
        # Right from Noise if it is ours: every layer in between is part of every token.
        read = self.secured_conn.read if self._messages is None else self._messages.read_msg
        try:
            while data := await read():
                self._heard += 1
                self._take_in(data)
            self._stop("the peer closed the connection")
        except PeerMisbehaved as error:
            logger.warning("closing the connection to %s: %s", self.peer_id, error)
            self._stop(f"the peer broke the protocol: {error}")
        except Exception as error:  # noqa: BLE001 - whatever it is, this connection is lost
            self._lost(error)

    async def _write(self) -> None:
        try:
            while True:
                if not self._urgent and not self._ordered:
                    if self._closing:
                        self._stop("the connection was closed by us")
                        return
                    self._work = trio.Event()
                    await self._work.wait()
                await self.secured_conn.write(self._next_frames())
        except Exception as error:  # noqa: BLE001 - whatever it is, this connection is lost
            self._lost(error)

    def _written_now(self) -> bool:
        """Write the frame that was just queued, while the writing task waits; whether all has left."""
        if self._messages is None or not self._messages.can_write_now:
            return False
        try:
            return self._messages.write_now(self._next_frames())
        except Exception as error:  # noqa: BLE001 - whatever it is, this connection is lost
            self._lost(error)
            return True

    async def _keep_alive(self) -> None:
        silent = 0
        while silent < self.limits.missed_pings:
            heard = self._heard
            self._next_ping = (self._next_ping + 1) % 2**32
            self._pings[self._next_ping] = trio.current_time()
            self.queue_urgent(PING, SYN, 0, self._next_ping)
            await trio.sleep(self.limits.ping_seconds)
            silent = silent + 1 if heard == self._heard else 0
            if silent == 0:
                self._pings.clear()
            for stream in list(self.streams.values()):
                stream.sweep(trio.current_time())
        self._stop("the peer has stopped answering")

    # Inner workings

    def _lost(self, error: Exception) -> None:
        self._stop(f"the connection was lost ({str(error) or type(error).__name__})")

    def _stop(self, reason: str) -> None:
        if not self.is_closed:
            self._reason = reason
        self._scope.cancel()

    async def _shut_down(self) -> None:
        self.event_started.set()  # whoever waits for the start sees that it is over
        self.event_closed.set()
        self.traffic.unread.pop(self, None)
        for stream in list(self.streams.values()):
            stream.broken(self._reason)
        self._incoming_send.close()
        for _ in range(self.data_slots.statistics().tasks_waiting):
            self.data_slots.release()
        self._ordered.clear()
        self._urgent.clear()
        with trio.move_on_after(_FLUSH_SECONDS) as scope:
            scope.shield = True
            try:
                await self.secured_conn.close()
            except Exception as error:  # noqa: BLE001 - there is nothing left to lose
                logger.debug("closing the connection to %s: %r", self.peer_id, error)

    def _remember(self, stream: YamuxStream) -> None:
        self.streams[stream.stream_id] = stream
        self.traffic.streams[self._counted_as(stream)] += 1

    def _counted_as(self, stream: YamuxStream) -> tuple[ID, bool]:
        return self.peer_id, stream.stream_id % 2 == self._next_stream_id % 2

    def _may_queue(self) -> bool:
        if len(self._ordered) + len(self._urgent) >= _QUEUED_FRAMES:
            self._stop("the peer provokes replies that it does not read")
            return False
        self._work.set()
        return not self.is_closed

    def _next_frames(self) -> bytes:
        """As many queued frames as are written at once."""
        frames: list[bytes] = []
        size = 0
        while self._urgent and size + HEADER.size <= _WRITE_BYTES:
            frames.append(self._urgent.popleft())
            size += HEADER.size
        while self._ordered and size + len(self._ordered[0][0]) <= _WRITE_BYTES:
            frame, holds_slot = self._ordered.popleft()
            frames.append(frame)
            size += len(frame)
            if holds_slot:
                self.data_slots.release()
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def _take_in(self, data: bytes) -> None:
        if self._unparsed:
            data = self._unparsed + data
        position = 0
        while True:
            if self._body_left:
                if position == len(data):
                    break
                payload = data[position : position + self._body_left]
                position += len(payload)
                self._body_left -= len(payload)
                if self._body_of is not None:
                    self.traffic.received[self._body_of.protocol] += len(payload)
                    self._body_of.peer_sent(payload)
                if self._body_left == 0:
                    self._apply_end_flags(self._body_of, self._body_flags)
                continue
            if len(data) - position < HEADER.size:
                break
            header = HEADER.unpack_from(data, position)
            position += HEADER.size
            self._take_header(*header)
        self._unparsed = data[position:]

    def _take_header(
        self, version: int, kind: int, flags: int, stream_id: int, length: int
    ) -> None:
        if version != 0 or kind > GO_AWAY:
            raise PeerMisbehaved(f"a frame of version {version}, type {kind}")
        if kind == PING:
            if flags & SYN:
                self.queue_urgent(PING, ACK, 0, length)
            elif sent := self._pings.pop(length, None):
                measured = trio.current_time() - sent
                old = measured if self.round_trip is None else self.round_trip
                self.round_trip = 0.75 * old + 0.25 * measured
            return
        if kind == GO_AWAY:
            self._peer_leaves = True
            return
        stream = self._accept(stream_id) if flags & SYN else self.streams.get(stream_id)
        if kind == WINDOW_UPDATE:
            if stream is not None and length:
                stream.peer_granted(length)
            self._apply_end_flags(stream, flags)
            return
        if length > self.limits.window + self.limits.window_budget:
            raise PeerMisbehaved(f"a data frame of {length} bytes")
        self._body_of, self._body_left, self._body_flags = stream, length, flags
        if length == 0:
            self._apply_end_flags(stream, flags)

    def _apply_end_flags(self, stream: YamuxStream | None, flags: int) -> None:
        if stream is None:
            return
        if flags & RST:
            stream.broken("the peer reset the stream")
        elif flags & FIN:
            stream.peer_closed()

    def _accept(self, stream_id: int) -> YamuxStream | None:
        theirs = 0 if self._initiator else 1
        if stream_id % 2 != theirs or stream_id <= self._last_peer_id:
            raise PeerMisbehaved(f"stream id {stream_id} out of turn")
        self._last_peer_id = stream_id
        stream = YamuxStream(self, stream_id)
        if self.traffic.streams[self.peer_id, False] < self.limits.streams and not self._closing:
            try:
                self._incoming_send.send_nowait(stream)
            except trio.WouldBlock:
                pass
            else:
                self._remember(stream)
                self.queue_urgent(WINDOW_UPDATE, ACK, stream_id, 0)
                return stream
        self.queue_control(WINDOW_UPDATE, RST, stream_id)
        return None


def yamux_stream_of(stream: INetStream) -> YamuxStream:
    """Our stream below the library's."""
    below = getattr(stream, "muxed_stream", None)
    assert isinstance(below, YamuxStream)
    return below


def yamux_of(connection: INetConn) -> YamuxConnection:
    """Our connection below the library's."""
    below = connection.muxed_conn
    assert isinstance(below, YamuxConnection)
    return below
