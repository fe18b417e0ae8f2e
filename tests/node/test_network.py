"""What the node may rely on in a network: one suite, run on libp2p and on the fake in memory."""

from collections.abc import Callable

import pytest
import trio
import trio.testing
from petals.node.network import Stream
from petals.protocol.errors import ConfigError, LocalProtocolError, PeerError
from support.networks import (
    ECHO,
    Libp2pWorld,
    MemoryWorld,
    World,
    echo,
    hold,
    receive_all,
    receive_exactly,
    until_alone,
    until_idle,
    until_measured,
)

KEY = b"/petals/test/0"
MEBIBYTE = 1024 * 1024


@pytest.fixture(params=[MemoryWorld, Libp2pWorld], ids=["memory", "libp2p"])
def world(request: pytest.FixtureRequest) -> World:
    make: Callable[[], World] = request.param
    return make()


async def send_for_ever(stream: Stream) -> None:
    while True:
        await stream.send([bytes(100_000)])


async def test_what_is_sent_arrives_in_order_and_each_knows_the_other(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        callers: list[str] = []

        async def serve(stream: Stream) -> None:
            callers.append(stream.peer_id)
            await echo(stream)

        server.handle(ECHO, serve)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        large = bytes(range(256)) * 400
        await stream.send(
            [b"head", memoryview(large)[1:], b"", b"tail", memoryview(bytearray(b"!"))]
        )
        expected = b"head" + large[1:] + b"tail!"
        assert await receive_exactly(stream, len(expected)) == expected
        assert stream.peer_id == server.peer_id
        assert callers == [client.peer_id]
        await stream.close()


async def test_messages_of_four_mebibytes(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        message = b"".join(number.to_bytes(4, "big") for number in range(MEBIBYTE))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, [message])
            assert await receive_exactly(stream, len(message)) == message
        await stream.close()
        await until_idle(client)


async def test_fifty_streams_at_once_do_not_mix(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)

        async def talk(number: int) -> None:
            stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
            for turn in range(3):
                message = b"%d.%d " % (number, turn) * 5000
                await stream.send([message])
                assert await receive_exactly(stream, len(message)) == message
            await stream.close()

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(talk, number)
        assert client.connected_peers() == (server.peer_id,)
        await until_idle(client)
        await until_idle(server)


async def test_memory_may_be_reused_once_send_returns(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        overwritten, done = trio.Event(), trio.Event()
        received = []

        async def serve(stream: Stream) -> None:
            await overwritten.wait()
            received.append(await receive_all(stream))
            done.set()

        server.handle(ECHO, serve)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        memory = bytearray(b"a" * 100_000)
        await stream.send([memoryview(memory)])
        memory[:] = b"b" * 100_000
        overwritten.set()
        await stream.close()
        await done.wait()
        assert received == [b"a" * 100_000]


async def test_cancelling_a_sender_breaks_its_stream_only(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        outcomes: list[str] = []

        async def read_nothing_then_all(stream: Stream) -> None:
            await release.wait()
            try:
                await receive_all(stream)
            except PeerError:
                outcomes.append("broken")
            else:
                outcomes.append("ended")
            finished.set()

        release, finished = trio.Event(), trio.Event()
        server.handle(ECHO, echo)
        server.handle("/petals/slow/1", read_nothing_then_all)
        other = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, "/petals/slow/1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, [bytes(16 * MEBIBYTE)])
            await other.send([b"while the first is stuck"])
            assert await receive_exactly(other, 24) == b"while the first is stuck"
            nursery.cancel_scope.cancel()
        with pytest.raises(PeerError):
            await stream.send([b"more"])
        release.set()
        await other.send([b"and afterwards"])
        assert await receive_exactly(other, 14) == b"and afterwards"
        await other.close()
        await stream.close()
        await until_idle(client)
        await until_idle(server)
        await finished.wait()
        assert outcomes == ["broken"]


async def test_cancelling_a_receiver_loses_nothing(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        for number in range(20):
            with trio.move_on_after(0):
                await stream.receive()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.receive)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            message = b"%02d" % number
            await stream.send([message])
            assert await receive_exactly(stream, 2) == message
        await stream.close()


async def test_who_waits_has_what_comes_and_nothing_is_lost(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        taken: list[bytes] = []

        def take(data: bytes) -> bool:
            taken.append(data)
            return not data.endswith(b".")

        for number in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.wait, take)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            message = b"%02d" % number
            await stream.send([message])
            assert await receive_exactly(stream, 2) == message
        assert not taken
        large = bytes(MEBIBYTE)  # more than a window
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.wait, take)
            for message in (b"head", large, b"tail."):
                await stream.send([message])
        assert b"".join(taken) == b"head" + large + b"tail."
        await stream.send([b"more"])
        assert await receive_exactly(stream, 4) == b"more"
        await stream.close()
        await stream.wait(take)
        with pytest.raises(PeerError):
            await stream.receive()


async def test_who_waits_hears_of_the_end(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:

        async def part(stream: Stream) -> None:
            if await stream.receive() == b"fail":
                raise RuntimeError("a bug in a handler")

        server.handle("/petals/part/1", part)
        for message in (b"go", b"fail"):
            stream = await client.open_stream(server.peer_id, server.multiaddrs, "/petals/part/1")
            await stream.send([message])
            await stream.wait(lambda _: True)
            if message == b"go":
                assert await stream.receive() == b""
            else:
                with pytest.raises(PeerError, match=server.peer_id):
                    await stream.receive()
            await stream.close()


async def test_a_handler_that_fails_breaks_its_stream_and_nothing_else(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:

        async def fail(stream: Stream) -> None:
            await stream.receive()
            raise RuntimeError("a bug in a handler")

        server.handle("/petals/fail/1", fail)
        server.handle(ECHO, echo)
        other = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, "/petals/fail/1")
        await stream.send([b"go"])
        with pytest.raises(PeerError, match=server.peer_id):
            await stream.receive()
        await other.send([b"still there"])
        assert await receive_exactly(other, 11) == b"still there"
        await other.close()
        await until_idle(server)


async def test_a_stream_ends_when_its_handler_returns(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:

        async def greet(stream: Stream) -> None:
            await stream.send([b"hello"])

        server.handle("/petals/greet/1", greet)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, "/petals/greet/1")
        assert await receive_all(stream) == b"hello"
        await stream.close()
        await until_idle(client)
        await until_idle(server)


async def test_the_answer_can_be_read_after_the_peer_has_closed(world: World) -> None:
    """It closes without having read our last words, and we hear its own first."""
    async with world.network() as server, world.network(serve=False) as client:
        closed = trio.Event()

        async def answer_early(stream: Stream) -> None:
            await receive_exactly(stream, 1)
            await stream.send([b"enough"])
            await stream.close()
            closed.set()

        server.handle("/petals/early/1", answer_early)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, "/petals/early/1")
        await stream.send([b"1"])
        await closed.wait()
        with pytest.raises(PeerError):  # what is on its way is not refused at once
            await send_for_ever(stream)
        assert await receive_all(stream) == b"enough"
        await stream.close()


async def test_closing_twice_and_using_a_closed_stream(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        await stream.close()
        await stream.close()
        with pytest.raises(PeerError):
            await stream.send([b"late"])
        with pytest.raises(PeerError):
            await stream.receive()


async def test_a_close_while_cancelled_still_closes(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.close()
        await until_idle(client)
        await until_idle(server)


async def test_a_sender_waits_for_a_reader_that_does_not_read(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, hold)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        with trio.move_on_after(0.3):
            await send_for_ever(stream)
        sent = client.statistics().bytes_sent[ECHO]
        assert sent < 8 * MEBIBYTE, "nothing bounds what the receiver holds"


async def test_unknown_protocols_and_peers_are_refused_in_words(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        with pytest.raises(PeerError, match="does not speak /petals/unknown/1"):
            await client.open_stream(server.peer_id, server.multiaddrs, "/petals/unknown/1")
        async with world.network() as gone:
            peer_id, multiaddrs = gone.peer_id, gone.multiaddrs
        with pytest.raises(PeerError, match=peer_id):
            await client.open_stream(peer_id, multiaddrs, ECHO)
        with pytest.raises(PeerError, match="no address"):
            await client.open_stream(peer_id, [], ECHO)
        with pytest.raises(PeerError):
            await client.open_stream(client.peer_id, server.multiaddrs, ECHO)


async def test_joining(world: World) -> None:
    async with world.network() as first, world.network() as second:
        async with world.network() as gone:
            nobody = gone.multiaddrs
        both = [*first.multiaddrs, *second.multiaddrs]
        assert await first.join(both) == 1, "its own address is skipped"
        assert await first.join(nobody) == 0
        with pytest.raises(ConfigError, match="nonsense"):
            await first.join(["nonsense"])
        with pytest.raises(ConfigError, match="which peer"):
            await first.join(["/ip4/127.0.0.1/tcp/1"])
        async with world.network(serve=False, bootstrap=both) as client:
            assert client.multiaddrs == ()
            assert set(client.connected_peers()) == {first.peer_id, second.peer_id}
        with pytest.raises(PeerError, match="no bootstrap peer"):
            async with world.network(serve=False, bootstrap=nobody):
                pytest.fail("it runs without anybody to talk to")


async def test_whoever_leaves_is_missed_at_once_and_can_come_back(world: World) -> None:
    async with world.network(serve=False) as client:
        async with world.network() as server:
            server.handle(ECHO, echo)
            stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
            await stream.send([b"x"])
            assert await stream.receive() == b"x"
        with pytest.raises(PeerError):
            assert await stream.receive() == b"an end that looks orderly"
        await until_alone(client)
        async with world.network() as server:
            assert await client.join(server.multiaddrs) == 1


async def test_what_the_block_raises_comes_out_as_it_is(world: World) -> None:
    with pytest.raises(ZeroDivisionError):
        async with world.network():
            raise ZeroDivisionError


async def test_statistics_count_by_protocol(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        await stream.send([b"12345"])
        await receive_exactly(stream, 5)
        await stream.close()
        for network in (client, server):
            await until_idle(network)
            statistics = network.statistics()
            assert statistics.bytes_sent[ECHO] == statistics.bytes_received[ECHO] == 5
            assert (statistics.connections, statistics.peers) == (1, 1)


async def test_round_trips_are_measured(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        assert client.round_trip(server.peer_id) is None
        await client.join(server.multiaddrs)
        assert await until_measured(client, server.peer_id) > 0


async def test_a_connection_is_released_when_nothing_uses_it(world: World) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        await client.release(server.peer_id)
        assert client.connected_peers() == (server.peer_id,)
        await stream.close()
        await until_idle(client)
        await client.release(server.peer_id)
        await until_alone(client)
        await until_alone(server)
        again = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        await again.send([b"still there"])
        assert await receive_exactly(again, 11) == b"still there"


async def test_the_directory_merges_what_many_put(world: World) -> None:
    async with (
        world.network() as first,
        world.network(bootstrap=first.multiaddrs) as second,
        world.network(bootstrap=first.multiaddrs) as third,
        world.network(serve=False, bootstrap=first.multiaddrs) as client,
    ):
        later = world.clock.now + 60
        assert await first.put(KEY, b"a 1 %f" % later) == 2
        assert await second.put(KEY, b"b 1 %f" % later) == 2
        assert await client.put(KEY, b"c 1 %f" % later) == 3
        assert await third.put(KEY, b"a 3 %f" % later) == 2
        assert await first.put(KEY, b"a 2 %f" % later) == 2
        for network in (first, second, third, client):
            entries = sorted(await network.get(KEY))
            assert [entry.split()[:2] for entry in entries] == [
                [b"a", b"3"],
                [b"b", b"1"],
                [b"c", b"1"],
            ]
        assert await client.get(b"/petals/other/0") == []
        assert client.statistics().directory_keys == 0, "a client holds nothing for others"
        assert first.statistics().directory_peers == 2, "a client is no holder"


async def test_holders_say_what_they_have_counted(world: World) -> None:
    async with world.network() as first, world.network(bootstrap=first.multiaddrs) as second:
        assert await second.sums(KEY) == []
        await second.put(KEY, b"a 1 %d" % (world.clock() + 60))
        await second.put(KEY, b"b 1 %d" % (world.clock() + 60))
        assert await second.sums(KEY) == [b"2"], "it asks the others"
        assert len(await second.get(KEY)) == 2


async def test_the_directory_refuses_forgeries_and_forgets_the_expired(world: World) -> None:
    async with (
        world.network() as first,
        world.network(serve=False, bootstrap=first.multiaddrs) as client,
    ):
        assert await client.put(KEY, b"a forgery") == 0
        assert await client.get(KEY) == []
        await client.put(KEY, b"short 1 %f" % (world.clock.now + 30))
        await client.put(KEY, b"long 1 %f" % (world.clock.now + 90))
        assert len(await client.get(KEY)) == 2
        world.clock.now += 60
        assert [entry.split()[0] for entry in await client.get(KEY)] == [b"long"]
        world.clock.now += 60
        assert await client.get(KEY) == []


async def test_the_directory_survives_a_holder_that_vanishes(world: World) -> None:
    async with world.network() as first:
        async with (
            world.network(bootstrap=first.multiaddrs),
            world.network(serve=False, bootstrap=first.multiaddrs) as client,
        ):
            assert await client.put(KEY, b"a 1 %f" % (world.clock.now + 60)) == 2
        async with world.network(serve=False, bootstrap=first.multiaddrs) as client:
            assert len(await client.get(KEY)) == 1
            assert await client.put(KEY, b"b 1 %f" % (world.clock.now + 60)) == 1


async def test_a_node_alone_says_that_nobody_took_it(world: World) -> None:
    async with world.network() as alone:
        assert await alone.put(KEY, b"a 1 %f" % (world.clock.now + 60)) == 0
        assert len(await alone.get(KEY)) == 1
        with pytest.raises(LocalProtocolError):
            await alone.get(b"a key that is none of ours")
