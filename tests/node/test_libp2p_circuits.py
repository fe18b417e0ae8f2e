"""Nodes that cannot be dialled, reached through relays: whole connections over real sockets."""

import contextlib
import os
from collections.abc import Sequence
from functools import partial

import pytest
import trio
from libp2p.peer.id import ID
from petals.node.libp2p_circuits import CircuitLimits
from petals.node.libp2p_network import Libp2pNetwork, NetworkLimits
from petals.node.libp2p_relay import RelayLimits
from petals.node.network import Stream
from petals.node.reachability import Reach
from petals.protocol.errors import PeerError
from support.networks import ECHO, Libp2pWorld, echo, receive_exactly

DEADLINE = 10.0


@pytest.fixture
def world() -> Libp2pWorld:
    return Libp2pWorld(limits=NetworkLimits(circuits=CircuitLimits(retry_seconds=0.05)))


async def say(stream: Stream, message: bytes) -> None:
    """Send and have it come back."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, [message])
        assert await receive_exactly(stream, len(message)) == message


async def until_ended(stream: Stream) -> None:
    with contextlib.suppress(PeerError):
        while await stream.receive():
            pass


async def run(
    world: Libp2pWorld,
    *,
    task_status: trio.TaskStatus[tuple[Libp2pNetwork, trio.Event]],
    serve: bool = True,
    bootstrap: Sequence[str] = (),
    reachability: str = "public",
) -> None:
    """A network in a task of its own, until its event is set."""
    stop = trio.Event()
    async with world.network(
        serve=serve, bootstrap=bootstrap, reachability=reachability
    ) as network:
        task_status.started((network, stop))
        await stop.wait()


async def until_reached_through(network: Libp2pNetwork, *relays: Libp2pNetwork) -> None:
    wanted = {relay.peer_id for relay in relays}
    with trio.fail_after(DEADLINE):
        while set(network.reachability.relays) != wanted:
            await network.reachability_changed()


async def test_a_node_that_cannot_be_dialled_is_reached_through_its_bootstrap_peer(
    world: Libp2pWorld,
) -> None:
    async with (
        world.network() as relay,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as hidden,
        world.network(serve=False) as client,
    ):
        hidden.handle(ECHO, echo)
        assert hidden.reachability.reach is Reach.PRIVATE
        assert hidden.reachability.relays == (relay.peer_id,)
        assert hidden.multiaddrs == (f"{relay.multiaddrs[0]}/p2p-circuit/p2p/{hidden.peer_id}",)
        stream = await client.open_stream(hidden.peer_id, hidden.multiaddrs, ECHO)
        assert stream.peer_id == hidden.peer_id
        await say(stream, b"hello")
        await say(stream, os.urandom(1024 * 1024))
        # both are connected to the relay, and to each other
        assert client.connected_peers() == tuple(sorted([hidden.peer_id, relay.peer_id]))
        assert client.peer_id in hidden.connected_peers()
        assert relay._reachability.relay.circuits == 1
        await stream.close()


async def test_many_streams_share_one_circuit(world: Libp2pWorld) -> None:
    async with (
        world.network() as relay,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as hidden,
        world.network(serve=False) as client,
    ):
        hidden.handle(ECHO, echo)

        async def call() -> None:
            stream = await client.open_stream(hidden.peer_id, hidden.multiaddrs, ECHO)
            await say(stream, os.urandom(100_000))
            await stream.close()

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(call)
        assert relay._reachability.relay.circuits == 1
        assert client.round_trip(hidden.peer_id) is not None


async def test_two_hidden_nodes_reach_each_other(world: Libp2pWorld) -> None:
    async with (
        world.network() as relay,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as one,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as other,
    ):
        one.handle(ECHO, echo)
        other.handle(ECHO, echo)

        async def call(caller: Libp2pNetwork, callee: Libp2pNetwork) -> None:
            stream = await caller.open_stream(callee.peer_id, callee.multiaddrs, ECHO)
            await say(stream, b"x" * 1000)
            await stream.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, one, other)
            nursery.start_soon(call, other, one)


async def test_a_hidden_node_is_a_bootstrap_peer_through_its_circuit_address(
    world: Libp2pWorld,
) -> None:
    async with (
        world.network() as relay,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as hidden,
        world.network(serve=False, bootstrap=hidden.multiaddrs) as client,
    ):
        assert hidden.peer_id in client.connected_peers()


async def test_a_direct_address_is_tried_before_a_circuit(world: Libp2pWorld) -> None:
    async with (
        world.network() as relay,
        world.network(bootstrap=relay.multiaddrs) as server,
        world.network(serve=False) as client,
    ):
        server.handle(ECHO, echo)
        circuit = f"{relay.multiaddrs[0]}/p2p-circuit/p2p/{server.peer_id}"
        await client.open_stream(server.peer_id, [circuit, *server.multiaddrs], ECHO)
        assert client.connected_peers() == (server.peer_id,)


async def test_hidden_nodes_hold_nothing_for_the_directory(world: Libp2pWorld) -> None:
    async with (
        world.network() as relay,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as hidden,
        world.network(serve=False, bootstrap=relay.multiaddrs) as client,
    ):
        key, entry = b"/petals/test/0", b"x"
        assert client.statistics().directory_peers == 1
        assert await hidden.put(key, entry) <= 1
        assert hidden.statistics().directory_keys == 0


@pytest.mark.parametrize("lost", ["relay", "hidden", "client"])
async def test_whoever_goes_the_circuit_ends_with_both_streams(
    world: Libp2pWorld, lost: str
) -> None:
    async with trio.open_nursery() as nursery:
        relay, stop_relay = await nursery.start(partial(run, world))
        hidden, stop_hidden = await nursery.start(
            partial(run, world, bootstrap=relay.multiaddrs, reachability="private")
        )
        client, stop_client = await nursery.start(partial(run, world, serve=False))
        ended = trio.Event()

        async def listen(stream: Stream) -> None:
            await until_ended(stream)
            ended.set()

        hidden.handle(ECHO, listen)
        stream = await client.open_stream(hidden.peer_id, hidden.multiaddrs, ECHO)
        await stream.send([b"hello"])
        {"relay": stop_relay, "hidden": stop_hidden, "client": stop_client}[lost].set()
        with trio.fail_after(DEADLINE):
            if lost != "hidden":
                await ended.wait()
            if lost != "client":
                await until_ended(stream)
            while lost != "relay" and relay._reachability.relay.circuits:  # noqa: ASYNC110
                await trio.sleep(0.01)
            if lost == "relay":
                await until_reached_through(hidden)
                assert hidden.multiaddrs == ()
        nursery.cancel_scope.cancel()


async def test_a_place_that_is_lost_is_taken_again_and_a_second_relay_is_used(
    world: Libp2pWorld,
) -> None:
    async with world.network() as other, trio.open_nursery() as nursery:
        relay, stop_relay = await nursery.start(partial(run, world, bootstrap=other.multiaddrs))
        async with world.network(
            bootstrap=[*relay.multiaddrs, *other.multiaddrs], reachability="private"
        ) as hidden:
            hidden.handle(ECHO, echo)
            await until_reached_through(hidden, relay, other)
            assert len(hidden.multiaddrs) == 2
            for connection in relay._swarm.direct(ID.from_string(hidden.peer_id)):
                await connection.close()
            await until_reached_through(hidden, relay, other)
            stop_relay.set()
            await until_reached_through(hidden, other)
            async with world.network(serve=False) as client:
                stream = await client.open_stream(hidden.peer_id, hidden.multiaddrs, ECHO)
                await say(stream, b"still here")


async def test_a_relay_gives_no_more_than_its_limits() -> None:
    limits = NetworkLimits(
        relay=RelayLimits(reservations=1, target_circuits=1),
        circuits=CircuitLimits(retry_seconds=0.05),
        settle_seconds=0.5,
    )
    world = Libp2pWorld(limits=limits)
    async with (
        world.network() as relay,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as hidden,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as refused,
        world.network(serve=False) as one,
        world.network(serve=False) as two,
    ):
        hidden.handle(ECHO, echo)
        assert hidden.multiaddrs
        assert refused.multiaddrs == ()
        await one.open_stream(hidden.peer_id, hidden.multiaddrs, ECHO)
        with pytest.raises(PeerError, match="it relays as much as it can"):
            await two.open_stream(hidden.peer_id, hidden.multiaddrs, ECHO)
        address = f"{relay.multiaddrs[0]}/p2p-circuit"
        with pytest.raises(PeerError, match="not connected to it any more"):
            await one.open_stream(refused.peer_id, [address], ECHO)


async def test_circuits_are_taken_only_from_relays_that_were_asked(world: Libp2pWorld) -> None:
    """Nobody may bring us connections unasked, and no circuit leads through another."""
    async with (
        world.network() as relay,
        world.network(bootstrap=relay.multiaddrs, reachability="private") as hidden,
        world.network(bootstrap=hidden.multiaddrs, reachability="private") as second,
        world.network(serve=False) as client,
    ):
        assert second.reachability.relays in ((), (relay.peer_id,))
        nested = f"{hidden.multiaddrs[0]}/p2p-circuit/p2p/{second.peer_id}"
        with pytest.raises(PeerError, match="a circuit address is"):
            await client.open_stream(second.peer_id, [nested], ECHO)
        # a relay that makes a reservation up
        forger = relay._reachability.relay
        forger._reserved_until[ID.from_string(client.peer_id)] = trio.current_time() + 60
        await client.connect(relay.multiaddrs[0])
        with pytest.raises(PeerError, match="the relay refused"):
            await hidden.open_stream(client.peer_id, [f"{relay.multiaddrs[0]}/p2p-circuit"], ECHO)
