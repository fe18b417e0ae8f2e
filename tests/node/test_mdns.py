"""Peers on one network find each other without knowing anybody."""

from pathlib import Path

import pytest
import trio
from petals.node.config import NodeConfig
from petals.node.libp2p_network import Libp2pNetwork, NetworkLimits
from petals.node.mdns import LanPeers
from petals.protocol.errors import PeerError
from support.networks import ECHO, Libp2pWorld, echo

ANYWHERE = "/ip4/0.0.0.0/tcp/0"
DEADLINE = 60.0


@pytest.fixture
def world() -> Libp2pWorld:
    return Libp2pWorld(limits=NetworkLimits(lan_seconds=DEADLINE))


@pytest.fixture
async def multicast() -> None:
    """Skips where this machine's network carries no multicast."""
    heard = trio.Event()
    one, other = LanPeers(lambda: None), LanPeers(heard.set)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run, 1, ["/ip4/192.0.2.1/tcp/1"])
        nursery.start_soon(other.run, 2, [])
        with trio.move_on_after(5):
            await heard.wait()
        nursery.cancel_scope.cancel()
    if not heard.is_set():
        pytest.skip("needs a network with multicast, for mDNS")


async def until_connected(network: Libp2pNetwork, peer_id: str) -> None:
    with trio.fail_after(DEADLINE):
        while peer_id not in network.connected_peers():  # noqa: ASYNC110 - sockets have no event
            await trio.sleep(0.05)


async def test_peers_on_one_network_need_no_bootstrap_peer(
    multicast: None, world: Libp2pWorld
) -> None:
    world.limits = NetworkLimits(lan_seconds=0)
    async with world.network(mdns=True, listen=ANYWHERE) as first:
        first.handle(ECHO, echo)
        world.limits = NetworkLimits(lan_seconds=DEADLINE)
        async with world.network(mdns=True, listen=ANYWHERE) as second:
            await until_connected(second, first.peer_id)
            await until_connected(first, second.peer_id)
        async with world.network(mdns=True, serve=False) as client:
            await until_connected(client, first.peer_id)
            stream = await client.open_stream(first.peer_id, [], ECHO)
            await stream.close()


async def test_who_only_uses_a_swarm_is_told_that_nobody_is_there(
    multicast: None, world: Libp2pWorld
) -> None:
    world.limits = NetworkLimits(lan_seconds=0.1)
    with pytest.raises(PeerError, match="nobody on this network answered"):
        async with world.network(mdns=True, serve=False):
            pytest.fail("it found somebody")


@pytest.mark.parametrize(
    ("options", "looks"),
    [
        ({}, True),
        ({"bootstrap": ("/ip4/192.0.2.1/tcp/1/p2p/x",)}, False),
        ({"bootstrap": ("/ip4/192.0.2.1/tcp/1/p2p/x",), "mdns": True}, True),
        ({"mdns": False}, False),
        ({"listen": ("/ip4/127.0.0.1/tcp/0",)}, False),
        ({"serve": False}, False),
        ({"serve": False, "mdns": True}, True),
    ],
)
def test_who_names_no_bootstrap_peer_looks_around(
    options: dict[str, object], looks: bool, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"bootstrap": (), "data_dir": tmp_path, **options}
    assert NodeConfig(**settings).looks_around is looks  # type: ignore[arg-type]
