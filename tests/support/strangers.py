"""Strangers: peers that say to a live node whatever a test likes, byte by byte.

While they are at it, an honest originator generates through the same nodes, exactly; and in the end
the nodes are as they were before, by their own statistics.
"""

import dataclasses
import itertools
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgpack
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.identity import Identity, new_identity
from petals.node.libp2p_network import Libp2pNetwork, Libp2pStream, open_network
from petals.node.libp2p_yamux import YamuxConnection
from petals.node.network import Stream
from petals.node.node import Node
from petals.protocol.announcement import Announcement
from petals.protocol.codec import FrameDecoder, encode
from petals.protocol.errors import ErrorCode, PeerError
from petals.protocol.frames import (
    PROTOCOL_VERSION,
    SESSION_PROTOCOL,
    Failed,
    Frame,
    Hello,
    Link,
    Open,
    Ready,
    Refused,
    Resume,
    Step,
)
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor
from support.memory_network import expiring_merge
from support.networks import WallClock
from support.processes import (
    DEADLINE,
    ProcessSwarm,
    ServingNode,
    figures_until,
    idle,
    nothing_left,
    originating,
)
from support.reference import ReferenceModel

HELLO = Hello(PROTOCOL_VERSION, "stranger")
PROMPT = "Beware of strangers, saith the preacher, who come by night"
PARAMS = SamplingParams(max_new_tokens=16)


@dataclasses.dataclass
class Attack:
    """A live node and what strangers need to know to talk to it."""

    processes: ProcessSwarm
    node: ServingNode
    """Serves 0:4."""
    honest: Node
    """Generates all the time."""
    announcement: Announcement
    hidden_size: int
    _session: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    @asynccontextmanager
    async def stranger(self, identity: Identity | None = None) -> AsyncIterator["Stranger"]:
        """A peer that nobody knows, unless it is to be an old one, connected to the node."""
        async with open_network(
            identity or new_identity(),
            merge=expiring_merge,
            clock=WallClock(),
            bootstrap=[self.node.multiaddr],
        ) as network:
            yield Stranger(network, self)

    def opening(self, stranger: "Stranger", **changes: Any) -> Open:
        """An ``open`` that the node would take, of a session that no other has; then changed."""
        return dataclasses.replace(
            Open(
                session=next(self._session).to_bytes(16, "big"),
                epoch=1,
                model=self.announcement.model,
                span=Span(0, 4),
                predecessor=stranger.network.peer_id,
                successor=None,
                batch=1,
                padding=(0,),
                max_tokens=8,
                wire_dtype=DType.FLOAT32,
            ),
            **changes,
        )

    def step(self, rows: int = 1, **changes: Any) -> Step:
        """A step that a session of ``opening`` would take as its first; then changed."""
        return dataclasses.replace(Step(0, 0, 0, 0, 0, self.hidden(1, rows)), **changes)

    def hidden(self, *shape: int, value: float = 0.5, dtype: DType = DType.FLOAT32) -> WireTensor:
        """Hidden states: [*shape, hidden_size], all the same."""
        full = (*shape, self.hidden_size)
        size = 1
        for length in full:
            size *= length
        one = struct.pack("<f" if dtype is DType.FLOAT32 else "<e", value)
        return WireTensor(dtype, full, one * size)


@dataclasses.dataclass
class Stranger:
    """Sends bytes to the node under attack, and reads what it answers."""

    network: Libp2pNetwork
    attack: Attack

    async def stream(self, protocol: str = SESSION_PROTOCOL) -> "RawStream":
        """A new stream to the node; nothing is said on it yet."""
        node = self.attack.node
        return RawStream(await self.network.open_stream(node.peer_id, [node.multiaddr], protocol))

    async def cut(self) -> None:
        """Break the connection, as a cable does."""
        for connection in self.network._swarm.alive():
            assert isinstance(connection.muxed_conn, YamuxConnection)
            await connection.muxed_conn.secured_conn.close()

    async def ask(self, data: bytes, protocol: str = SESSION_PROTOCOL) -> list[Frame]:
        """Send ``data`` on a stream of its own; every frame that comes back until its end."""
        stream = await self.stream(protocol)
        await stream.send(data)
        return await stream.rest()

    async def session(self, opening: Open) -> "RawStream":
        """Open a session; its control stream."""
        control = await self.stream()
        await control.send(said(HELLO, opening))
        assert isinstance(await control.frame(), Ready)
        return control

    async def link(self, opening: Open) -> "RawStream":
        """Link to a session that was opened; the node has said what it holds."""
        stream = await self.stream()
        await stream.send(said(HELLO, Link(opening.session, opening.epoch)))
        assert isinstance(await stream.frame(), Resume)
        return stream


class RawStream:
    """A stream of which every frame and the end are read with a deadline."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []

    async def send(self, data: bytes) -> None:
        """Send bytes. The node may have closed the stream half-way, which is an answer, too."""
        try:
            for start in range(0, len(data), 50_000):
                await self._stream.send([data[start : start + 50_000]])
        except PeerError:
            return

    @property
    def full(self) -> bool:
        """Whether the node has not read enough to be sent another byte."""
        assert isinstance(self._stream, Libp2pStream)
        return self._stream._stream._sendable == 0

    async def frame(self) -> Frame | None:
        """The next frame but for hello; None at the end, however it came."""
        with trio.fail_after(DEADLINE):
            while True:
                while not self._frames:
                    try:
                        data = await self._stream.receive()
                    except PeerError:
                        return None
                    if not data:
                        return None
                    self._frames += self._decoder.feed(data)
                frame = self._frames.pop(0)
                if not isinstance(frame, Hello):
                    return frame

    async def rest(self) -> list[Frame]:
        """Every frame until the end; then the stream is closed."""
        frames = []
        while (frame := await self.frame()) is not None:
            frames.append(frame)
        await self.close()
        return frames

    async def close(self) -> None:
        """Close it without a word."""
        await self._stream.close()


def said(*frames: Frame) -> bytes:
    """The bytes of some frames."""
    return b"".join(bytes(buffer) for frame in frames for buffer in encode(frame))


def framed(body: bytes) -> bytes:
    """Some bytes as the body of a frame."""
    return len(body).to_bytes(4, "big") + body


def raw(frame: Frame, **changes: Any) -> bytes:
    """The bytes of a frame with changes to its header that ``encode`` would not let through."""
    body = said(frame)[4:]
    unpacked = msgpack.unpackb(body)
    unpacked[0] |= changes
    return framed(msgpack.packb(unpacked))


def rejection(frames: Sequence[Frame]) -> tuple[ErrorCode, str]:
    """How the node said no, which is all that it said."""
    [frame] = frames
    assert isinstance(frame, Refused | Failed), frame
    assert frame.reason
    return frame.code, frame.reason


@asynccontextmanager
async def attacking(processes: ProcessSwarm, model: ReferenceModel) -> AsyncIterator[Attack]:
    """The swarm's first node, to be attacked; unharmed in the end, as are the others."""
    expected = model.generate((PROMPT,), PARAMS)
    async with originating(processes, model.name) as honest:
        assert [list((await honest.generate(PROMPT, PARAMS)).token_ids)] == expected
        before = [await figures_until(honest, node, idle) for node in processes.nodes]
        announcement, _ = await honest.describe(processes.nodes[0].peer_id)
        assert announcement is not None

        over = False
        texts = 0

        async def generate_all_the_time() -> None:
            nonlocal texts
            while not over or texts == 0:
                began = trio.current_time()
                result = await honest.generate(PROMPT, PARAMS)
                assert [list(result.token_ids)] == expected
                assert result.recoveries == 0
                texts += 1
                await trio.sleep(trio.current_time() - began)  # strangers are to get on, too

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate_all_the_time)
            hidden_size = int(model.model.config.hidden_size)
            yield Attack(processes, processes.nodes[0], honest, announcement, hidden_size)
            over = True
        for node, old in zip(processes.nodes, before, strict=True):
            await figures_until(honest, node, partial(nothing_left, before=old))
            assert node.running
            assert "Traceback" not in node.errors
