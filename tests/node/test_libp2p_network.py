"""What only the real network can get wrong: addresses, sockets, strangers, other processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.custom_types import TProtocol
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.peer.peerstore import PeerStore
from libp2p.utils import varint
from multiaddr import Multiaddr
from petals.node.identity import Identity, new_identity
from petals.node.libp2p_addresses import announced_addresses
from petals.node.libp2p_directory import DirectoryLimits, pack_record, unpack_record
from petals.node.libp2p_network import Libp2pNetwork, NetworkLimits, open_network
from petals.node.libp2p_swarm import HostLimits
from petals.node.libp2p_yamux import YamuxConnection
from petals.node.libp2p_yamux_stream import YamuxLimits
from petals.node.network import Stream
from petals.protocol.errors import ConfigError, PeerError, RemoteProtocolError
from support.memory_network import expiring_merge
from support.networks import (
    ECHO,
    LOOPBACK,
    Libp2pWorld,
    WallClock,
    echo,
    hold,
    receive_exactly,
    until_alone,
)

KEY = b"/petals/test/0"
FAST = NetworkLimits(
    host=HostLimits(dial_seconds=0.5, open_seconds=2, accept_seconds=0.5),
    directory=DirectoryLimits(question_seconds=0.5, lookup_seconds=3),
)


@pytest.fixture
def world() -> Libp2pWorld:
    return Libp2pWorld()


@asynccontextmanager
async def listening_on(*addresses: str) -> AsyncIterator[Libp2pNetwork]:
    async with open_network(
        new_identity(), merge=expiring_merge, clock=WallClock(), listen=addresses
    ) as network:
        yield network


@asynccontextmanager
async def dialling(
    server: Libp2pNetwork, *, identity: Identity | None = None
) -> AsyncIterator[Libp2pNetwork]:
    async with open_network(
        identity or new_identity(),
        merge=expiring_merge,
        clock=WallClock(),
        bootstrap=server.multiaddrs,
    ) as network:
        yield network


async def until_ended(stream: trio.SocketStream) -> None:
    """Until the other side has closed the socket."""
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass


def port_of(network: Libp2pNetwork) -> int:
    return int(Multiaddr(network.multiaddrs[0]).value_for_protocol("tcp"))


async def test_a_port_in_use_is_said_so(world: Libp2pWorld) -> None:
    async with world.network() as network:
        taken = f"/ip4/127.0.0.1/tcp/{port_of(network)}"
        with pytest.raises(ConfigError, match=rf"{taken}: address already in use; .*another port"):
            async with listening_on(LOOPBACK, taken):
                pytest.fail("two nodes share a port")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nonsense", "'nonsense' is not a multiaddr"),
        ("/ip4/127.0.0.1", "write /ip4/<address>/tcp/<port>"),
        ("/ip4/127.0.0.1/udp/1/quic-v1", "write /ip4/<address>/tcp/<port>"),
        ("/ip4/192.0.2.1/tcp/0", "an address of this machine"),
    ],
)
async def test_addresses_that_cannot_be_listened_on(address: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with listening_on(address):
            pytest.fail("it listens")
    assert words in str(caught.value)
    assert address in str(caught.value)


async def test_a_wildcard_is_announced_as_the_real_interfaces() -> None:
    async with listening_on("/ip4/0.0.0.0/tcp/0") as network:
        port = port_of(network)
        assert network.multiaddrs
        for address in network.multiaddrs:
            assert "0.0.0.0" not in address
            assert address.endswith(f"/tcp/{port}/p2p/{network.peer_id}")
    real = announced_addresses([Multiaddr("/ip4/0.0.0.0/tcp/7")])
    assert "127.0.0.1" not in str(real) or len(real) == 1
    loopback = Multiaddr("/ip4/127.0.0.1/tcp/7")
    assert announced_addresses([loopback, loopback]) == [loopback]


async def test_announced_addresses_replace_the_bound_ones() -> None:
    async with open_network(
        new_identity(),
        merge=expiring_merge,
        clock=WallClock(),
        listen=[LOOPBACK],
        announce=["/ip4/192.0.2.7/tcp/4001"],
    ) as network:
        assert network.multiaddrs == (f"/ip4/192.0.2.7/tcp/4001/p2p/{network.peer_id}",)


async def test_all_addresses_of_a_peer_are_tried(world: Libp2pWorld) -> None:
    """Behind one that refuses, one that says nothing, one of another protocol, and rubbish."""
    world.limits = FAST
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with world.network() as server, world.network(serve=False) as client:
            server.handle(ECHO, echo)
            addresses = [
                "rubbish",
                "/ip4/127.0.0.1/udp/1/quic-v1",
                "/ip4/127.0.0.1/tcp/1",
                f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}",
                *server.multiaddrs,
            ]
            stream = await client.open_stream(server.peer_id, addresses, ECHO)
            await stream.close()


async def test_a_listener_that_says_nothing_is_given_up_and_can_be_tried_again(
    world: Libp2pWorld,
) -> None:
    world.limits = FAST
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        async with world.network() as server, world.network(serve=False) as client:
            server.handle(ECHO, echo)
            with pytest.raises(PeerError, match=r"no answer within 0\.5 s"):
                await client.open_stream(server.peer_id, [address], ECHO)
            await client.open_stream(server.peer_id, server.multiaddrs, ECHO)


async def test_somebody_else_at_the_address_is_not_talked_to(world: Libp2pWorld) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        expected = new_identity().peer_id
        with pytest.raises(PeerError, match=expected):
            await client.open_stream(expected, [LOOPBACK[:-1] + str(port_of(server))], ECHO)
        assert client.connected_peers() == ()


async def test_two_that_dial_each_other_at_once_understand_each_other(world: Libp2pWorld) -> None:
    async with world.network() as first, world.network() as second:
        first.handle(ECHO, echo)
        second.handle(ECHO, echo)

        async def talk(one: Libp2pNetwork, other: Libp2pNetwork) -> None:
            stream = await one.open_stream(other.peer_id, other.multiaddrs, ECHO)
            await stream.send([b"x" * 1000])
            await receive_exactly(stream, 1000)
            await stream.close()

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(talk, first, second)
                nursery.start_soon(talk, second, first)


async def test_many_callers_share_one_dial(world: Libp2pWorld) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)

        async def call() -> None:
            await client.open_stream(server.peer_id, server.multiaddrs, ECHO)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call)
        assert client.statistics().connections == 1


async def test_cancelling_a_dial_leaves_nothing_behind(world: Libp2pWorld) -> None:
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        for tenths_of_milliseconds in range(0, 100, 7):
            with trio.move_on_after(tenths_of_milliseconds / 10_000):
                stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
                await stream.close()
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        await stream.send([b"alive"])
        assert await receive_exactly(stream, 5) == b"alive"


async def test_strangers_cannot_use_up_the_places_of_later_ones(world: Libp2pWorld) -> None:
    """The library kept a place for each connection that it had ever accepted."""
    world.limits = NetworkLimits(host=HostLimits(connections=3))
    async with world.network() as server:
        for _ in range(8):
            async with world.network(serve=False, bootstrap=server.multiaddrs):
                assert len(server.connected_peers()) == 1
            await until_alone(server)


async def test_of_a_peers_connections_the_oldest_gives_way(world: Libp2pWorld) -> None:
    """The library would let it have any number for 20 s."""
    world.limits = NetworkLimits(host=HostLimits(peer_connections=2))
    async with world.network() as server, AsyncExitStack() as stack:
        server.handle(ECHO, echo)
        identity = new_identity()
        clients = [
            await stack.enter_async_context(dialling(server, identity=identity)) for _ in range(4)
        ]
        for client in clients[:2]:
            await until_alone(client)
        assert server.statistics().connections == 2
        for client in clients[2:]:
            stream = await client.open_stream(server.peer_id, [], ECHO)
            await stream.send([b"alive"])
            assert await receive_exactly(stream, 5) == b"alive"


async def test_others_cannot_use_up_the_connections_that_we_dial(world: Libp2pWorld) -> None:
    world.limits = NetworkLimits(host=HostLimits(connections=5))
    async with world.network() as other, world.network() as server, AsyncExitStack() as stack:
        other.handle(ECHO, echo)
        for _ in range(4):
            await stack.enter_async_context(dialling(server))
        with pytest.raises(PeerError, match="no bootstrap peer"):
            async with dialling(server):
                pytest.fail("there was room for one more")
        stream = await server.open_stream(other.peer_id, other.multiaddrs, ECHO)
        await stream.close()


async def test_strangers_who_never_finish_shaking_hands_keep_nobody_out(
    world: Libp2pWorld,
) -> None:
    world.limits = NetworkLimits(host=HostLimits(handshakes=3))
    async with world.network() as server, AsyncExitStack() as stack:
        silent = [
            await stack.enter_async_context(
                await trio.open_tcp_stream("127.0.0.1", port_of(server))
            )
            for _ in range(5)
        ]
        await stack.enter_async_context(dialling(server))
        with trio.fail_after(2):
            for stream in silent[:2]:
                await until_ended(stream)


async def test_what_a_peer_says_of_itself_is_kept_within_bounds(world: Libp2pWorld) -> None:
    """The library keeps, and tells others, a MiB of it."""
    said = Identify(
        listen_addrs=[
            Multiaddr("/ip4/127.0.0.1/tcp/1" * 50).to_bytes(),
            *(Multiaddr(f"/ip4/127.0.0.1/tcp/{port}").to_bytes() for port in range(1, 30)),
        ],
        protocols=[f"/{number}/{'x' * number}" for number in range(200)],
    ).SerializeToString()

    async def talk_much(stream: Stream) -> None:
        await stream.send([varint.encode_uvarint(len(said)) + said])

    async with world.network() as server, world.network(serve=False) as client:
        client.handle("/ipfs/id/1.0.0", talk_much)
        await client.connect(server.multiaddrs[0])
        store, peer = server._swarm.peerstore, ID.from_string(client.peer_id)
        with trio.fail_after(5):
            while not store.supports_protocols(peer, ["/1/x"]):  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.01)
        assert len(store.addrs(peer)) == 8
        protocols = store.get_protocols(peer)
        assert len(protocols) == 64
        assert max(map(len, protocols)) < 128
        store.add_addrs(peer, [Multiaddr("/ip4/127.0.0.1/tcp/99")], 60)
        assert len(store.addrs(peer)) == 8
        assert str(store.addrs(peer)[-1]).endswith("/99")


async def test_bytes_of_strangers_harm_nobody(world: Libp2pWorld) -> None:
    world.limits = FAST
    async with world.network() as server, world.network(serve=False) as client:
        server.handle(ECHO, echo)
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        for junk in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(5000),
            b"\xff" * 64,
            b"\x13/multistream/1.0.0\n" + b"\xff\xff\xff\xff\x7f" * 4,
            b"\x13/multistream/1.0.0\n\x07/noise\n\xff\xff" + bytes(65535),
            b"\x13/multistream/1.0.0\n\x11/plaintext/2.0.0\n",
        ):
            stranger = await trio.open_tcp_stream("127.0.0.1", port_of(server))
            with trio.move_on_after(2):
                try:
                    await stranger.send_all(junk)
                    await stranger.send_eof()
                    answer = b""
                    while data := await stranger.receive_some():
                        answer += data
                    assert b"/plaintext" not in answer
                except (trio.BrokenResourceError, OSError):
                    pass
            await stranger.aclose()
        await stream.send([b"unharmed"])
        assert await receive_exactly(stream, 8) == b"unharmed"
        assert server.connected_peers() == (client.peer_id,)


async def test_leaving_takes_no_time_even_while_much_is_going_on(world: Libp2pWorld) -> None:
    async with world.network() as server:
        server.handle(ECHO, hold)
        with trio.fail_after(4):
            async with world.network(serve=False) as client, trio.open_nursery() as nursery:

                async def push() -> None:
                    stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
                    with pytest.raises(PeerError):
                        await stream.send([bytes(10_000_000)])

                for _ in range(5):
                    nursery.start_soon(push)
                await trio.sleep(0.2)
                nursery.cancel_scope.cancel()
        await until_alone(server)


async def test_a_cancelled_network_says_goodbye_too(world: Libp2pWorld) -> None:
    async with world.network() as server:
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        with trio.CancelScope() as scope:
            async with world.network(bootstrap=server.multiaddrs):
                assert len(server.connected_peers()) == 1
                scope.cancel()
                await trio.sleep_forever()
        await until_alone(server)
        with trio.fail_after(2):
            while trio.lowlevel.current_statistics().tasks_living > tasks:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_nothing_is_left_of_a_network(world: Libp2pWorld) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def come_and_go() -> None:
        async with world.network() as server:
            server.handle(ECHO, echo)
            async with world.network(serve=False, bootstrap=server.multiaddrs) as client:
                stream = await client.open_stream(server.peer_id, [], ECHO)
                await stream.send([b"x"])
                await stream.receive()

    await come_and_go()
    tasks, files = trio.lowlevel.current_statistics().tasks_living, open_files()
    threads = threading.active_count()
    for _ in range(3):
        await come_and_go()
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert open_files() == files
    assert threading.active_count() == threads


async def test_records_that_are_none() -> None:
    assert unpack_record(pack_record([b"a", b"b"])) == [b"a", b"b"]
    for junk in (
        b"",
        b"\xc1",
        b"\x80",
        b"\x91\x01",
        b"\x92\xc4\x01a",
        b"\xdd\xff\xff\xff\xff",
        b"\x90x",
    ):
        with pytest.raises(RemoteProtocolError):
            unpack_record(junk)
    with pytest.raises(RemoteProtocolError, match="has at most"):
        unpack_record(pack_record([bytes(300_000)]))


async def test_a_holder_that_stops_answering_does_not_hold_the_directory_up(
    world: Libp2pWorld,
) -> None:
    world.limits = FAST
    async with (
        world.network() as first,
        world.network(bootstrap=first.multiaddrs) as second,
        world.network(serve=False, bootstrap=first.multiaddrs) as client,
    ):
        entry = b"a 1 %f" % (world.clock.now + 60)
        assert await client.put(KEY, entry) == 2
        second.handle("/ipfs/kad/1.0.0", hold)
        with trio.fail_after(3):
            assert await client.put(KEY, entry) == 1
            assert len(await client.get(KEY)) == 1
        assert client.statistics().directory_peers == 1


async def test_a_holder_that_answers_rubbish_is_passed_over(world: Libp2pWorld) -> None:
    async def answer_rubbish(stream: Stream) -> None:
        await stream.receive()
        await stream.send([b"\x05" + os.urandom(5)])

    async with world.network() as first, world.network(bootstrap=first.multiaddrs) as second:
        second.handle("/ipfs/kad/1.0.0", answer_rubbish)
        async with world.network(serve=False, bootstrap=first.multiaddrs) as client:
            await client.join(second.multiaddrs)
            assert await client.put(KEY, b"a 1 %f" % (world.clock.now + 60)) == 1
            assert len(await client.get(KEY)) == 1


async def test_the_directory_cleans_up_and_stays_fresh_by_itself(world: Libp2pWorld) -> None:
    world.limits = NetworkLimits(directory=DirectoryLimits(refresh_seconds=0.05))
    async with (
        world.network() as first,
        world.network(serve=False, bootstrap=first.multiaddrs) as client,
    ):
        assert await client.put(KEY, b"a 1 %f" % (world.clock.now + 60)) == 1
        assert first.statistics().directory_keys == 1
        world.clock.now += 61
        with trio.fail_after(5):
            while first.statistics().directory_keys:  # noqa: ASYNC110 - it happens by the way
                await trio.sleep(0.01)
        async with world.network(bootstrap=first.multiaddrs):
            with trio.fail_after(5):
                while client.statistics().directory_peers < 2:  # noqa: ASYNC110 - the same
                    await trio.sleep(0.01)


async def test_a_holder_takes_no_more_keys_than_it_has_room_for(world: Libp2pWorld) -> None:
    world.limits = NetworkLimits(directory=DirectoryLimits(stored_keys=1))
    async with (
        world.network() as first,
        world.network(serve=False, bootstrap=first.multiaddrs) as client,
    ):
        entry = b"a 1 %f" % (world.clock.now + 60)
        assert await client.put(KEY, entry) == 1
        assert await client.put(b"/petals/test/1", entry) == 0
        assert await client.put(KEY, b"b 1 %f" % (world.clock.now + 60)) == 1


async def test_a_connection_lost_unnoticed_is_replaced_at_once(world: Libp2pWorld) -> None:
    async with (
        world.network() as server,
        world.network(serve=False, bootstrap=server.multiaddrs) as client,
    ):
        server.handle(ECHO, echo)
        for connection in client._swarm.alive():
            assert isinstance(connection.muxed_conn, YamuxConnection)
            await connection.muxed_conn.secured_conn.close()
        stream = await client.open_stream(server.peer_id, server.multiaddrs, ECHO)
        await stream.send([b"back"])
        assert await receive_exactly(stream, 4) == b"back"


async def test_peers_are_found_through_the_directory(world: Libp2pWorld) -> None:
    """Whoever has been looked up can be dialled with no address given."""
    async with (
        world.network() as first,
        world.network(bootstrap=first.multiaddrs) as second,
        world.network(serve=False, bootstrap=first.multiaddrs) as client,
    ):
        second.handle(ECHO, echo)
        await client.get(KEY)
        stream = await client.open_stream(second.peer_id, [], ECHO)
        await stream.close()


async def test_knowing_too_many_peers_forgets_neither_the_own_key_nor_more(
    world: Libp2pWorld,
) -> None:
    """The library's peer store drops its owner's key first."""
    async with world.network() as first, world.network(bootstrap=first.multiaddrs) as second:
        store = first._swarm.peerstore
        assert isinstance(store, PeerStore)
        store.max_peers = 5
        for _ in range(10):
            store.add_addrs(ID.from_string(new_identity().peer_id), [Multiaddr(LOOPBACK)], 60)
        assert len(store.peer_data_map) == 6
        assert store.privkey(ID.from_string(first.peer_id)) is not None
        assert await second.put(KEY, b"a 1 %f" % (world.clock.now + 60)) == 1


async def test_a_host_of_the_library_as_it_comes_can_talk_to_us(world: Libp2pWorld) -> None:
    async with world.network() as server:
        server.handle(ECHO, echo)
        stock = new_host(listen_addrs=[Multiaddr(LOOPBACK)])
        async with stock.run([Multiaddr(LOOPBACK)]):
            await stock.connect(info_from_p2p_addr(Multiaddr(server.multiaddrs[0])))
            stream = await stock.new_stream(ID.from_string(server.peer_id), [TProtocol(ECHO)])
            message = os.urandom(200_000)
            await stream.write(message)
            received = b""
            while len(received) < len(message):
                received += await stream.read(len(message) - len(received))
            assert received == message
            await stream.close()
            assert server.connected_peers() == (str(stock.get_id()),)
            await stock.disconnect(ID.from_string(server.peer_id))  # else it leaks its socket
        await stock.close()


async def test_peer_ids_are_those_of_libp2p() -> None:
    identity = new_identity()
    assert str(ID.from_string(identity.peer_id)) == identity.peer_id


PEER_PROCESS = """
import sys, trio
from petals.node.libp2p_network import open_network
from petals.node.identity import Identity, new_identity
from support.networks import ECHO, LOOPBACK, WallClock, echo
from support.memory_network import expiring_merge

async def main():
    async with open_network(
        new_identity(), merge=expiring_merge, clock=WallClock(), listen=[LOOPBACK]
    ) as network:
        network.handle(ECHO, echo)
        print(network.peer_id, *network.multiaddrs, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.slow
async def test_another_process_that_freezes_and_one_that_is_killed(world: Libp2pWorld) -> None:
    world.limits = NetworkLimits(
        host=HostLimits(open_seconds=5, yamux=YamuxLimits(ping_seconds=0.3, missed_pings=3))
    )
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    processes = [
        subprocess.Popen(  # noqa: ASYNC220 - starting takes a moment, waiting is in a thread
            [sys.executable, "-c", PEER_PROCESS], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    try:
        async with world.network(serve=False) as client:
            streams, names = [], []
            for process in processes:
                assert process.stdout is not None
                line = await trio.to_thread.run_sync(process.stdout.readline)
                peer_id, *multiaddrs = line.split()
                stream = await client.open_stream(peer_id, multiaddrs, ECHO)
                await stream.send([b"x" * 28_000])
                await receive_exactly(stream, 28_000)
                streams.append(stream)
                names.append(peer_id)
            processes[0].send_signal(signal.SIGSTOP)
            processes[1].kill()
            with trio.fail_after(5):
                with pytest.raises(PeerError, match=names[1]):
                    await streams[1].receive()
                with pytest.raises(PeerError, match=f"{names[0]} broke: the peer has stopped"):
                    await streams[0].receive()
                await until_alone(client)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
