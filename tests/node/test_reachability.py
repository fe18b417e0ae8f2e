"""How a node finds out whether others can dial it, and what it tells its user."""

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from ipaddress import ip_address
from typing import Any

import pytest
import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr
from petals.node.libp2p_addresses import interface_hosts
from petals.node.libp2p_dialback import AUTONAT, DialBackLimits
from petals.node.libp2p_negotiation import negotiate, receive_message, send_message
from petals.node.libp2p_network import Libp2pNetwork, NetworkLimits
from petals.node.libp2p_swarm import HostLimits
from petals.node.reachability import Reach, Reachability, Vote, verdict
from petals.node.upnp.forwarding import ForwardingLimits
from support.fake_router import FakeRouter
from support.networks import Libp2pWorld

DEADLINE = 10.0


@pytest.fixture
def world() -> Libp2pWorld:
    return Libp2pWorld(limits=NetworkLimits(dial_back=DialBackLimits(peer_pause=0)))


@pytest.mark.parametrize(
    ("votes", "reach"),
    [
        ([], Reach.UNKNOWN),
        ([(True, False)], Reach.PUBLIC),
        ([(False, False)], Reach.PRIVATE),
        ([(True, False), (True, False), (False, True)], Reach.PRIVATE),  # neighbours cannot tell
        ([(True, True), (False, True)], Reach.PRIVATE),
        ([(True, True), (True, True), (False, True)], Reach.PUBLIC),
    ],
)
def test_peers_beyond_the_router_decide_by_majority(
    votes: list[tuple[bool, bool]], reach: Reach
) -> None:
    assert verdict(Vote(reached=reached, outside=outside) for reached, outside in votes) is reach


@pytest.mark.parametrize(
    ("reachability", "words"),
    [
        (Reachability(Reach.UNKNOWN), "unknown, for there is no peer to ask yet."),
        (
            Reachability(Reach.UNKNOWN, forwarded_port=31331),
            (
                "unknown, for there is no peer to ask yet; its router forwards TCP port 31331 to it "
                "(UPnP)."
            ),
        ),
        (
            Reachability(Reach.PUBLIC, forwarded_port=31331),
            (
                "public, peers can dial this node: its router forwards TCP port 31331 to it (UPnP). "
                "Nothing to do."
            ),
        ),
        (
            Reachability(Reach.PRIVATE, ("12D3KooWabcdef",), forwarded_port=31330),
            (
                "private, peers cannot dial this node, though its router forwards TCP port 31330 to "
                "it (UPnP); they reach it through abcdef. For more speed, have the router behind that "
                "one, if there is one, forward TCP port 31330, too."
            ),
        ),
        (Reachability(Reach.PUBLIC), "public, peers can dial this node. Nothing to do."),
        (Reachability(Reach.PUBLIC, insisted=True), "public, as you say. Nothing to do."),
        (
            Reachability(Reach.PRIVATE, ("12D3KooWabcdef",)),
            (
                "private, peers cannot dial this node; they reach it through abcdef. "
                "For more speed, forward TCP port 31330 of your router to this machine."
            ),
        ),
        (
            Reachability(Reach.PRIVATE, ("12D3KooWabcdef", "12D3KooWghijkl"), insisted=True),
            "private, as you say; they reach it through abcdef and ghijkl.",
        ),
        (
            Reachability(Reach.PRIVATE),
            (
                "private, peers cannot dial this node, and no peer relays for it yet: nobody can use "
                "its blocks. Name a --bootstrap peer that can be dialled, or forward TCP port 31330 "
                "of your router to this machine."
            ),
        ),
    ],
)
def test_one_line_says_what_is_the_case_and_what_to_do(
    reachability: Reachability, words: str
) -> None:
    assert reachability.in_words(31330) == f"Reachability: {words}"
    assert "\n" not in reachability.in_words(None)


async def test_a_node_that_its_bootstrap_peer_can_dial_back_is_public(world: Libp2pWorld) -> None:
    async with (
        world.network(reachability="auto") as first,
        world.network(reachability="auto", bootstrap=first.multiaddrs) as second,
    ):
        assert second.reachability == Reachability(Reach.PUBLIC)
        # nobody had to ask for the first: it was dialled
        with trio.fail_after(DEADLINE):
            while first.reachability.reach is not Reach.PUBLIC:
                await first.reachability_changed()
        assert first.statistics().connections == second.statistics().connections == 1


async def test_a_node_alone_does_not_wait_to_know(world: Libp2pWorld) -> None:
    with trio.fail_after(DEADLINE):
        async with world.network(reachability="auto") as network:
            assert network.reachability == Reachability(Reach.UNKNOWN)
            assert network.multiaddrs


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    """On the network that this machine is in."""
    private = [host for host in interface_hosts() if ":" not in host]
    inside = [host for host in map(ip_address, private) if host.is_private and not host.is_loopback]
    if not inside:
        pytest.skip("needs an interface behind a router")
    router = FakeRouter(str(inside[0]))
    async with trio.open_nursery() as nursery:
        await nursery.start(router.serve)
        yield router
        nursery.cancel_scope.cancel()


def behind(
    router: FakeRouter, *, settle: float = DEADLINE, **options: Any
) -> AbstractAsyncContextManager[Libp2pNetwork]:
    limits = NetworkLimits(
        forwarding=ForwardingLimits(group=router.searched_at), settle_seconds=settle
    )
    options = {
        "reachability": "auto",
        "upnp": True,
        "listen": f"/ip4/{router.host}/tcp/0",
        **options,
    }
    return Libp2pWorld(limits=limits).network(**options)


async def test_a_router_is_asked_while_nobody_can_say_whether_we_are_dialled(
    router: FakeRouter,
) -> None:
    async with behind(router) as network:
        [(port, entry)] = router.table.items()
        assert entry.host == router.host
        assert network.reachability == Reachability(Reach.UNKNOWN, forwarded_port=port)
        assert [each.partition("/p2p")[0] for each in network.multiaddrs] == [
            f"/ip4/{router.outer_host}/tcp/{port}",
            f"/ip4/{router.host}/tcp/{entry.port}",
        ]
    assert router.table == {}


@pytest.mark.parametrize(
    "options",
    [
        {"upnp": False},
        {"reachability": "public"},
        {"reachability": "private"},
        {"announce": ["/ip4/192.0.2.1/tcp/4"]},
        {"listen": "/ip4/127.0.0.1/tcp/0"},
        {"serve": False},
    ],
)
async def test_no_router_is_asked_where_it_would_not_help(
    router: FakeRouter, options: dict[str, Any]
) -> None:
    async with behind(router, settle=0.5, **options) as network:
        assert network.reachability.forwarded_port is None
    assert router.asked == []


async def test_a_node_that_cannot_be_dialled_back_is_reached_through_a_relay(
    world: Libp2pWorld,
) -> None:
    async with (
        world.network() as relay,
        closed(world, bootstrap=relay) as hidden,
    ):
        assert hidden.reachability == Reachability(Reach.PRIVATE, (relay.peer_id,))
        assert all("/p2p-circuit/" in address for address in hidden.multiaddrs)


def closed(
    world: Libp2pWorld, bootstrap: Libp2pNetwork
) -> AbstractAsyncContextManager[Libp2pNetwork]:
    """A network whose sockets hang up on whoever dials, as if a router did."""
    limits = NetworkLimits(
        host=HostLimits(connections=1, handshakes=1), dial_back=world.limits.dial_back
    )
    return Libp2pWorld(limits=limits).network(reachability="auto", bootstrap=bootstrap.multiaddrs)


async def ask(client: Libp2pNetwork, server: Libp2pNetwork, *addresses: str) -> int:
    """The status that a server answers when it is asked to dial these."""
    [connection] = client._swarm.alive(ID.from_string(server.peer_id))
    stream = await negotiate(connection, AUTONAT)
    peer = Message.PeerInfo(
        id=ID.from_string(client.peer_id).to_bytes(),
        addrs=[Multiaddr(address).to_bytes() for address in addresses],
    )
    await send_message(stream, Message(type=Message.DIAL, dial=Message.Dial(peer=peer)))
    answer = await receive_message(stream, Message, seconds=DEADLINE)
    return answer.dialResponse.status


async def test_nobody_is_dialled_at_the_address_of_another(world: Libp2pWorld) -> None:
    """A stranger must not make us knock at doors that are not its own."""
    knocked = trio.Event()

    async def answer_the_door(stream: trio.SocketStream) -> None:
        knocked.set()
        await stream.aclose()

    async with (
        world.network() as server,
        world.network(serve=False, bootstrap=server.multiaddrs) as client,
        trio.open_nursery() as nursery,
    ):
        [door] = await trio.open_tcp_listeners(0, host="127.0.0.2")
        nursery.start_soon(trio.serve_listeners, answer_the_door, [door])
        port = door.socket.getsockname()[1]
        for other in (
            f"/ip4/127.0.0.2/tcp/{port}",
            f"/dns4/localhost/tcp/{port}",
            f"{server.multiaddrs[0]}/p2p-circuit",
        ):
            assert await ask(client, server, other) == Message.E_DIAL_REFUSED
        assert not knocked.is_set()
        # and at its own address only who proves to be the one that asks counts
        assert await ask(client, server, "/ip4/127.0.0.1/tcp/1") == Message.E_DIAL_ERROR
        assert (
            await ask(client, server, server.multiaddrs[0].partition("/p2p")[0])
            == Message.E_DIAL_ERROR
        )
        nursery.cancel_scope.cancel()


async def test_who_asks_too_often_is_refused() -> None:
    world = Libp2pWorld(limits=NetworkLimits(dial_back=DialBackLimits(peer_pause=60)))
    async with (
        world.network() as server,
        world.network(serve=False, bootstrap=server.multiaddrs) as client,
    ):
        assert await ask(client, server, "/ip4/127.0.0.1/tcp/1") == Message.E_DIAL_ERROR
        assert await ask(client, server, "/ip4/127.0.0.1/tcp/1") == Message.E_DIAL_REFUSED


async def test_who_asks_nonsense_is_hung_up_on_and_fills_no_log(
    world: Libp2pWorld, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        world.network() as server,
        world.network(serve=False, bootstrap=server.multiaddrs) as client,
    ):
        [connection] = client._swarm.alive(ID.from_string(server.peer_id))
        for nonsense in (b"\xff" * 5, b"\x02\xff\xff"):
            stream = await negotiate(connection, AUTONAT)
            await stream.write(nonsense)
            with pytest.raises(MuxedStreamError), trio.fail_after(DEADLINE):
                await stream.read(1)
        # while both are there: who leaves may cut off what the other one was just reading
        # (and what a table of peers hears meanwhile is its own affair)
        said = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert [record for record in said if not record.name.startswith("libp2p.kad_dht")] == []
