"""A node reaches itself as it reaches others."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from petals.node.loopback import LoopbackNetwork
from petals.node.network import Stream
from petals.protocol.errors import PeerError
from support.networks import ECHO, MemoryWorld, echo, hold, receive_exactly


@asynccontextmanager
async def loopback() -> AsyncIterator[LoopbackNetwork]:
    async with MemoryWorld().network() as outside, trio.open_nursery() as nursery:
        yield LoopbackNetwork(outside, nursery)
        nursery.cancel_scope.cancel()


async def test_what_is_sent_to_oneself_arrives() -> None:
    async with loopback() as network:
        network.handle(ECHO, echo)
        stream = await network.open_stream(network.peer_id, (), ECHO)
        assert stream.peer_id == network.peer_id
        await stream.send([b"head", memoryview(b"tail")])
        assert await receive_exactly(stream, 8) == b"headtail"
        await stream.close()
        await stream.close()
        assert await stream.receive() == b""
        with pytest.raises(PeerError, match="closed"):
            await stream.send([b"more"])


async def test_the_end_of_a_handler_is_the_end_of_its_stream() -> None:
    async with loopback() as network:

        async def fail(_stream: Stream) -> None:
            raise ValueError("a bug")

        network.handle(ECHO, fail)
        stream = await network.open_stream(network.peer_id, (), ECHO)
        assert await stream.receive() == b""
        with pytest.raises(PeerError):
            await stream.send([b"x"])


async def test_nobody_serves_what_was_not_offered() -> None:
    async with loopback() as network:
        with pytest.raises(PeerError, match="does not serve"):
            await network.open_stream(network.peer_id, (), ECHO)


async def test_a_reader_that_does_not_read_holds_the_writer_up() -> None:
    async with loopback() as network:
        network.handle(ECHO, hold)
        stream = await network.open_stream(network.peer_id, (), ECHO)
        sent = 0
        with trio.move_on_after(0.05):
            while True:
                await stream.send([bytes(10)])
                sent += 1
        assert sent <= 4


async def test_others_are_reached_outside() -> None:
    world = MemoryWorld()
    async with world.network() as other, world.network() as outside:
        other.handle(ECHO, echo)
        async with trio.open_nursery() as nursery:
            network = LoopbackNetwork(outside, nursery)
            stream = await network.open_stream(other.peer_id, other.multiaddrs, ECHO)
            await stream.send([b"hello"])
            assert await receive_exactly(stream, 5) == b"hello"
            assert network.connected_peers() == (other.peer_id,)
            assert network.round_trip(network.peer_id) == 0.0
            await stream.close()
            nursery.cancel_scope.cancel()
