"""Yamux over an encrypted connection made of memory, in trio's own time: minutes pass at once."""

import random  # noqa: TID251 - tests throw dice with known seeds
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

import pytest
import trio
import trio.testing
from libp2p.abc import ISecureConn
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from libp2p.stream_muxer.yamux.yamux import Yamux
from petals.node.identity import new_identity
from petals.node.libp2p_yamux import Traffic, YamuxConnection
from petals.node.libp2p_yamux_stream import YamuxLimits, YamuxStream
from petals.protocol.admission import OPENS_AT_ONCE

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = struct.Struct("!BBHII")
PEER = ID.from_string(new_identity().peer_id)


class MemoryConnection:
    """What Yamux needs of an encrypted connection; messages arrive as they were written."""

    def __init__(
        self,
        incoming: trio.MemoryReceiveChannel[bytes],
        outgoing: trio.MemorySendChannel[bytes],
        *,
        is_initiator: bool,
    ) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.is_initiator = is_initiator
        self.ahead = b""
        self.written: list[int] = []

    async def read(self, n: int | None = None) -> bytes:
        if n is None:
            data, self.ahead = self.ahead, b""
            return data or await self._receive()
        while len(self.ahead) < n:
            piece = await self._receive()
            if not piece:
                break
            self.ahead += piece
        data, self.ahead = self.ahead[:n], self.ahead[n:]
        return data

    async def _receive(self) -> bytes:
        try:
            return await self.incoming.receive()
        except trio.EndOfChannel:
            return b""

    async def write(self, data: bytes) -> None:
        self.written.append(len(data))
        await self.outgoing.send(bytes(data))

    async def close(self) -> None:
        self.outgoing.close()
        self.incoming.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


def connection_pair() -> tuple[MemoryConnection, MemoryConnection]:
    there, arrives_there = trio.open_memory_channel[bytes](4)
    back, arrives_back = trio.open_memory_channel[bytes](4)
    return (
        MemoryConnection(arrives_back, there, is_initiator=True),
        MemoryConnection(arrives_there, back, is_initiator=False),
    )


def yamux(connection: MemoryConnection, limits: YamuxLimits | None = None) -> YamuxConnection:
    return YamuxConnection(cast(ISecureConn, connection), PEER, limits)


@asynccontextmanager
async def running(*connections: YamuxConnection | Yamux) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(connection.start)
            await connection.event_started.wait()
        yield nursery
        nursery.cancel_scope.cancel()


Pair = tuple[YamuxConnection, YamuxConnection]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    first, second = map(yamux, connection_pair())
    async with running(first, second):
        yield first, second


@asynccontextmanager
async def against_raw(
    limits: YamuxLimits | None = None,
) -> AsyncIterator[tuple[YamuxConnection, MemoryConnection]]:
    """Our Yamux, answering, with a peer that the test plays by hand."""
    raw, below = connection_pair()
    connection = yamux(below, limits)
    async with running(connection):
        yield connection, raw


async def opened(pair: Pair) -> tuple[YamuxStream, YamuxStream]:
    stream = await pair[0].open_stream()
    return stream, await pair[1].accept_stream()


async def read_exactly(stream: YamuxStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data


def frame(kind: int, flags: int, stream_id: int, value: int) -> bytes:
    return HEADER.pack(0, kind, flags, stream_id, value)


async def first_reset(raw: MemoryConnection) -> int:
    """The stream id of the first reset that our side sends; it sends no data before."""
    while message := await raw.read():
        for position in range(0, len(message), HEADER.size):
            _, _, flags, stream_id, _ = HEADER.unpack_from(message, position)
            if flags & RST:
                return int(stream_id)
    raise AssertionError("no reset came")


async def test_a_reader_that_pauses_for_minutes(pair: Pair, autojump_clock: object) -> None:
    """The library's own kills the writer's stream after five seconds."""
    stream, accepted = await opened(pair)
    message = random.Random(1).randbytes(3_000_000)
    received = []

    async def read_slowly() -> None:
        await trio.sleep(240)
        received.append(await read_exactly(accepted, 1000))
        await trio.sleep(240)
        received.append(await read_exactly(accepted, len(message) - 1000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_slowly)
        await stream.write(message)
    assert b"".join(received) == message


async def test_a_reader_that_never_reads_costs_its_writer_the_stream_only(
    autojump_clock: object,
) -> None:
    limits = YamuxLimits(stalled_seconds=20)
    below = connection_pair()
    pair = (yamux(below[0], limits), yamux(below[1], limits))
    async with running(*pair):
        stream, accepted = await opened(pair)
        with pytest.raises(MuxedStreamReset, match="does not read"):
            await stream.write(bytes(1_000_000))
        other, other_accepted = await opened(pair)
        await other.write(b"well")
        assert await other_accepted.read() == b"well"
        await read_exactly(accepted, 256 * 1024)
        with pytest.raises(MuxedStreamReset):
            await accepted.read()


async def test_a_silent_peer_is_given_up(autojump_clock: object) -> None:
    async with against_raw() as (connection, raw):
        stream = await connection.open_stream()
        started = trio.current_time()

        async def drain() -> None:
            while await raw.read():
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            with pytest.raises(MuxedStreamReset, match="stopped answering"):
                await stream.read()
        assert 15 <= trio.current_time() - started <= 20
        with pytest.raises(MuxedConnUnavailable):
            await connection.accept_stream()
        with pytest.raises(MuxedStreamError):
            await connection.open_stream()


async def test_a_peer_whose_socket_takes_nothing_is_given_up(autojump_clock: object) -> None:
    async with against_raw() as (connection, _):
        stream = await connection.open_stream()
        with pytest.raises(MuxedStreamReset, match="stopped answering"):
            await stream.write(bytes(200_000_000))


async def test_idle_peers_stay_connected_and_know_their_distance(
    pair: Pair, autojump_clock: object
) -> None:
    await trio.sleep(3600)
    assert not pair[0].is_closed
    assert not pair[1].is_closed
    assert pair[0].round_trip == 0, "no time passes while messages travel"


async def test_cancelling_anything_at_any_time_leaves_the_others_whole(
    pair: Pair, autojump_clock: object
) -> None:
    """A cancelled writer must not leave half a frame, nor a reader take half a message."""
    dice = random.Random(7)
    steady, steady_accepted = await opened(pair)
    message = dice.randbytes(2_000_000)
    received = bytearray()

    async def be_cancelled(use: Callable[[], Awaitable[object]], delay: float) -> None:
        with trio.move_on_after(delay):
            await use()

    async def read_steadily() -> None:
        while len(received) < len(message):
            scope = trio.move_on_after(dice.choice([0, 0.001, 1]))
            with scope:
                received.extend(await steady_accepted.read())

    async def write_with_pauses() -> None:
        for start in range(0, len(message), 50_000):
            await steady.write(message[start : start + 50_000])
            await trio.sleep(0.01)

    async def disturb() -> None:
        for _ in range(100):
            stream, accepted = await opened(pair)
            written = bytes(dice.randrange(1, 500_000))
            async with trio.open_nursery() as nursery:
                write = partial(stream.write, written)
                nursery.start_soon(be_cancelled, write, dice.random() / 50)
                nursery.start_soon(be_cancelled, accepted.read, dice.random() / 50)
            stream.reset_now("done with it")
            accepted.reset_now("done with it")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_steadily)
        nursery.start_soon(write_with_pauses)
        nursery.start_soon(disturb)
    assert received == message
    await steady.close()
    await steady_accepted.close()
    await trio.testing.wait_all_tasks_blocked()
    assert pair[0].streams == pair[1].streams == {}


async def test_frames_fill_noise_messages_of_which_several_are_written_at_once() -> None:
    below = connection_pair()
    pair = (yamux(below[0]), yamux(below[1]))
    async with running(*pair):
        stream, accepted = await opened(pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(1_000_000))
            await read_exactly(accepted, 1_000_000)
    assert max(below[0].written) == 4 * 65519
    assert len(below[0].written) < 20


async def test_half_closing(pair: Pair) -> None:
    stream, accepted = await opened(pair)
    await stream.write(b"question")
    await stream.close_write()
    assert await accepted.read() == b"question"
    with pytest.raises(MuxedStreamEOF):
        await accepted.read()
    await accepted.write(b"answer")
    await accepted.close()
    assert await stream.read() == b"answer"
    assert await stream.receive() == b""
    with pytest.raises(MuxedStreamClosed):
        await stream.write(b"more")
    assert pair[0].streams == pair[1].streams == {}


async def test_a_stream_that_the_peer_does_not_close_is_not_kept_for_ever(
    pair: Pair, autojump_clock: object
) -> None:
    stream, accepted = await opened(pair)
    await stream.close()
    await trio.sleep(60)
    assert pair[0].streams == pair[1].streams == {}
    assert await accepted.receive() == b""
    with pytest.raises(MuxedStreamReset):
        await accepted.write(b"to nobody")


async def test_what_is_queued_leaves_before_an_orderly_close(pair: Pair) -> None:
    stream, accepted = await opened(pair)
    await stream.write(b"last words")
    await pair[0].close()
    assert await accepted.read() == b"last words"
    with pytest.raises(MuxedStreamReset):
        await accepted.read()


async def test_our_own_streams_are_limited_without_waiting() -> None:
    async with against_raw(YamuxLimits(streams=3)) as (connection, _):
        for _ in range(3):
            await connection.open_stream()
        with pytest.raises(MuxedStreamError, match="3 streams"):
            await connection.open_stream()


async def test_the_peers_streams_are_limited() -> None:
    async with against_raw(YamuxLimits(streams=3)) as (connection, raw):
        await raw.write(b"".join(frame(WINDOW_UPDATE, SYN, number, 0) for number in (1, 3, 5, 7)))
        assert await first_reset(raw) == 7
        assert sorted(connection.streams) == [1, 3, 5]


async def test_the_peers_streams_are_counted_over_all_of_its_connections() -> None:
    limits, traffic = YamuxLimits(streams=3), Traffic()
    (first, first_end), (second, second_end) = connection_pair(), connection_pair()
    connections = [
        YamuxConnection(cast(ISecureConn, end), PEER, limits, traffic)
        for end in (first_end, second_end)
    ]
    async with running(*connections):
        await first.write(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(WINDOW_UPDATE, SYN, 3, 0))
        await connections[0].accept_stream()
        await (await connections[0].accept_stream()).reset()
        await second.write(b"".join(frame(WINDOW_UPDATE, SYN, number, 0) for number in (1, 3, 5)))
        assert await first_reset(second) == 5
    assert traffic.streams == {}


async def test_a_peer_in_a_hurry_waits_for_its_turn(autojump_clock: object) -> None:
    async with against_raw(YamuxLimits(opens_per_second=10)) as (connection, raw):

        async def accept_all() -> float:
            for _ in range(OPENS_AT_ONCE + 20):
                await connection.accept_stream()
            return trio.current_time()

        started = trio.current_time()
        for number in range(OPENS_AT_ONCE + 20):
            await raw.write(frame(WINDOW_UPDATE, SYN, 2 * number + 1, 0))
        assert await accept_all() - started == pytest.approx(2.0)


async def test_streams_that_are_opened_and_reset_cost_no_turn(autojump_clock: object) -> None:
    async with against_raw(YamuxLimits(opens_per_second=1)) as (connection, raw):
        for number in range(1, 1001, 2):
            await raw.write(
                frame(WINDOW_UPDATE, SYN, number, 0) + frame(WINDOW_UPDATE, RST, number, 0)
            )
        await raw.write(frame(WINDOW_UPDATE, SYN, 1001, 0))
        started = trio.current_time()
        assert (await connection.accept_stream()).stream_id == 1001
        assert trio.current_time() - started < 1
        assert sorted(connection.streams) == [1001]


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (frame(DATA, SYN, 1, 300_000) + bytes(300_000), "overran its receive window"),
        (frame(DATA, SYN, 1, 2**31), "a data frame of"),
        (frame(WINDOW_UPDATE, SYN, 2, 0), "out of turn"),
        (frame(WINDOW_UPDATE, SYN, 5, 0) + frame(WINDOW_UPDATE, SYN, 3, 0), "out of turn"),
        (b"\x01" * 12, "version 1"),
        (frame(7, 0, 0, 0), "type 7"),
    ],
)
async def test_a_peer_that_breaks_the_protocol_loses_the_connection(
    sent: bytes, complaint: str
) -> None:
    async with against_raw() as (connection, raw):
        stream = await connection.open_stream()
        await raw.write(sent)
        with pytest.raises(MuxedStreamReset, match=complaint):
            await stream.read()
        await connection.event_closed.wait()


async def test_a_peer_that_only_makes_us_reply_loses_the_connection() -> None:
    async with against_raw() as (connection, raw):

        async def ping_for_ever() -> None:
            while True:
                await raw.write(frame(PING, SYN, 0, 1) * 1000)

        with pytest.raises(trio.BrokenResourceError):
            await ping_for_ever()
        assert connection.is_closed


async def test_the_connection_that_nobody_reads_goes_when_memory_runs_out() -> None:
    limits, traffic = YamuxLimits(unread_bytes=300_000), Traffic()
    pairs = [connection_pair(), connection_pair()]
    peers = [raw.outgoing for raw, _ in pairs]
    connections = [
        YamuxConnection(cast(ISecureConn, end), PEER, limits, traffic) for _, end in pairs
    ]
    async with running(*connections):
        await peers[0].send(frame(DATA, SYN, 1, 100_000) + bytes(100_000))
        patient = await connections[0].accept_stream()
        for stream_id in (1, 3):
            await peers[1].send(frame(DATA, SYN, stream_id, 150_000) + bytes(150_000))
        await connections[1].event_closed.wait()
        assert len(await read_exactly(patient, 100_000)) == 100_000
        assert not connections[0].is_closed
        await patient.close()
        assert traffic.unread.total() == 0


async def test_frames_in_single_bytes_and_streams_of_single_bytes() -> None:
    """However the peer cuts, the same arrives, and tiny frames don't cost an object each."""
    async with against_raw() as (connection, raw):
        message = frame(WINDOW_UPDATE, SYN, 1, 0)
        message += b"".join(frame(DATA, 0, 1, 1) + bytes([number]) for number in range(200))
        message += frame(DATA, FIN, 1, 3) + b"end"
        for byte in message:
            await raw.write(bytes([byte]))
        stream = await connection.accept_stream()
        await trio.testing.wait_all_tasks_blocked()
        assert await stream.receive() == bytes(range(200)) + b"end"
        assert await stream.receive() == b""


async def test_frames_for_unknown_streams_are_passed_over() -> None:
    async with against_raw() as (connection, raw):
        stray = frame(DATA, 0, 9, 5) + b"stray" + frame(WINDOW_UPDATE, RST, 11, 0)
        await raw.write(stray + frame(DATA, SYN, 13, 2) + b"ok" + frame(GO_AWAY, 0, 0, 0))
        stream = await connection.accept_stream()
        assert await stream.read() == b"ok"
        with pytest.raises(MuxedStreamError, match="closing"):
            await connection.open_stream()


@pytest.mark.parametrize("we_dial", [True, False])
async def test_the_librarys_own_yamux_understands_us(we_dial: bool) -> None:
    ends = connection_pair()
    ours = yamux(ends[0] if we_dial else ends[1])
    theirs = Yamux(cast(ISecureConn, ends[1] if we_dial else ends[0]), PEER)
    message = random.Random(3).randbytes(1_500_000)

    async def echo_ours() -> None:
        stream = await ours.accept_stream()
        while data := await stream.receive():
            await stream.write(data)
        await stream.close()

    async def echo_theirs() -> None:
        stream = await theirs.accept_stream()
        received = 0
        while received < len(message):
            data = await stream.read(65536)
            received += len(data)
            await stream.write(data)
        await stream.close()

    async with running(ours, theirs) as nursery:
        nursery.start_soon(echo_theirs)
        nursery.start_soon(echo_ours)
        stream = await ours.open_stream()
        back = bytearray()
        async with trio.open_nursery() as writing:
            writing.start_soon(stream.write, message)
            while len(back) < len(message):
                back += await stream.read()
        assert back == message
        assert await stream.receive() == b""
        await stream.close()

        opposite = await theirs.open_stream()
        back = bytearray()
        async with trio.open_nursery() as writing:
            writing.start_soon(opposite.write, message)
            while len(back) < len(message):
                back += await opposite.read(65536)
        assert back == message
        await opposite.close()
