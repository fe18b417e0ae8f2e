"""Worlds to test networks in: the same calls make real hosts on loopback or networks in memory."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

import trio
from petals.node.identity import Identity, new_identity
from petals.node.libp2p_network import Libp2pNetwork, NetworkLimits, open_network
from petals.node.network import Directory, Network, Stream
from petals.node.private import Privacy
from support.memory_network import (
    CountingEntries,
    MemoryNetwork,
    MemorySwarm,
    expiring_merge,
)

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ECHO = "/petals/echo/1"


class NetworkAndDirectory(Network, Directory, Protocol):
    """Both ports, as both implementations have them."""


@dataclass
class WallClock:
    """Unix time that a test moves."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Libp2pWorld:
    """Real hosts on loopback, in this process."""

    clock: WallClock = field(default_factory=WallClock)
    limits: NetworkLimits = field(default_factory=NetworkLimits)

    def network(
        self,
        *,
        serve: bool = True,
        bootstrap: Sequence[str] = (),
        reachability: str = "public",
        upnp: bool = False,
        announce: Sequence[str] = (),
        privacy: Privacy | None = None,
        mdns: bool = False,
        listen: str = LOOPBACK,
        identity: Identity | None = None,
    ) -> AbstractAsyncContextManager[Libp2pNetwork]:
        return open_network(
            identity or new_identity(),
            merge=expiring_merge,
            counting=CountingEntries(),
            clock=self.clock,
            listen=[listen] if serve else [],
            bootstrap=bootstrap,
            reachability=reachability,
            upnp=upnp,
            announce=announce,
            privacy=privacy,
            mdns=mdns,
            limits=self.limits,
        )


class MemoryWorld:
    """Networks in memory."""

    def __init__(self) -> None:
        self.clock = WallClock()
        self.swarm = MemorySwarm(expiring_merge, self.clock, CountingEntries)

    def network(
        self, *, serve: bool = True, bootstrap: Sequence[str] = ()
    ) -> AbstractAsyncContextManager[MemoryNetwork]:
        return self.swarm.network(new_identity().peer_id, serve=serve, bootstrap=bootstrap)


World = Libp2pWorld | MemoryWorld


async def echo(stream: Stream) -> None:
    """A handler that sends back what it receives."""
    while data := await stream.receive():
        await stream.send([data])


async def hold(stream: Stream) -> None:
    """A handler that neither reads nor closes."""
    del stream
    await trio.sleep_forever()


async def receive_exactly(stream: Stream, size: int) -> bytes:
    """The next ``size`` bytes."""
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive()
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    assert len(data) == size
    return bytes(data)


async def receive_all(stream: Stream) -> bytes:
    """Everything up to the peer's orderly end."""
    data = bytearray()
    while piece := await stream.receive():
        data += piece
    return bytes(data)


async def until_measured(network: Network, peer_id: str) -> float:
    """The round trip to a peer, when the first ping has come back."""
    with trio.fail_after(5):
        while (seconds := network.round_trip(peer_id)) is None:  # noqa: ASYNC110 - the same
            await trio.sleep(0.01)
    return seconds


async def until_idle(network: Network) -> None:
    """Wait until no stream is open (closing one takes a message to the peer and back)."""
    with trio.fail_after(5):
        while network.statistics().streams:  # noqa: ASYNC110 - sockets have no event for it
            await trio.sleep(0.01)


async def until_alone(network: Network) -> None:
    """Wait until no peer is connected."""
    with trio.fail_after(5):
        while network.connected_peers():  # noqa: ASYNC110 - sockets have no event for it
            await trio.sleep(0.01)
