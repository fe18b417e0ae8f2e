"""From a relayed connection to a direct one, through the routers on both sides (libp2p's DCUtR).

Whoever was reached over a relay acts: if the other can be dialled, it dials it; else both sides, told
by a message over the relay, dial each other at the same moment, each from the port that the other
dials. To each router the other's first packet then looks like an answer. The wire is libp2p's
(github.com/libp2p/specs/blob/master/relay/DCUtR.md).

Why not py-libp2p's: it dials whatever and as many addresses as it is told, for as long as it likes,
and drives itself. What it does with sockets is what works, and is done here.

Rules of this file: a few addresses, a few seconds, one attempt for each relayed connection; where that
fails, the relayed one stays, and serves. Who dialled over the relay is the client of the new connection
too, for there is only one, which neither has accepted. It says nothing about whether others can dial
us, and is remembered (``punched``) so that nobody takes it for that.
"""

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address

import trio
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr

from .libp2p_dialback import host_of
from .libp2p_negotiation import negotiate, receive_message, send_message
from .libp2p_swarm import DialError, GuardedSwarm, is_relayed
from .libp2p_yamux import yamux_of, yamux_stream_of

logger = logging.getLogger(__name__)

DCUTR = TProtocol("/libp2p/dcutr")
UPGRADE_SECONDS = 2.0
"""How long, at most, who opens a first stream over a relay waits for the direct connection: streams
stay on the connection that they were opened on."""
_LEAST_SECONDS = 0.5
_ROUND_TRIPS = 10  # over the relay, that an upgrade takes
_UNKNOWN_ROUND_TRIP = 0.1
_PUNCH_SECONDS = 5.0
_ADDRESSES = 3
_PAUSE = 0.1  # between two dials of one address that was refused
_IDLE_LOOK_SECONDS = 5.0


class HolePuncher:
    """Makes direct connections out of relayed ones."""

    def __init__(
        self,
        swarm: GuardedSwarm,
        nursery: trio.Nursery,
        port: Callable[[], int | None],
    ) -> None:
        """``port``: the one that our sockets listen on, if they do."""
        self._swarm = swarm
        self._nursery = nursery
        self._port = port
        self._punched: set[ID] = set()

    def punched(self, peer: ID) -> bool:
        """Whether a direct connection to that peer was made here."""
        self._punched = {each for each in self._punched if self._swarm.direct(each)}
        return peer in self._punched

    async def upgraded(self, connection: SwarmConn) -> SwarmConn:
        """The direct connection to the same peer if one comes soon, else the relayed one."""
        below = yamux_of(connection)
        if not is_relayed(connection) or below.upgrade_awaited:
            return connection
        below.upgrade_awaited = True
        started = trio.current_time()
        # there is no event for what the library registers
        while not below.is_closed and not self._swarm.direct(below.peer_id):
            round_trip = below.round_trip or _UNKNOWN_ROUND_TRIP
            patience = min(UPGRADE_SECONDS, _LEAST_SECONDS + _ROUND_TRIPS * round_trip)
            if trio.current_time() - started > patience:
                break
            await trio.sleep(0.02)
        return next(iter(self._swarm.alive(below.peer_id)), connection)

    async def upgrade(self, connection: SwarmConn) -> None:
        """Try to replace a relayed connection that the peer has opened. Raises nothing."""
        peer = yamux_of(connection).peer_id
        try:
            if not self._swarm.direct(peer):
                await self._upgrade(connection, peer)
        except (DialError, MuxedStreamError) as error:
            logger.info("the connection to %s stays relayed: %s", peer, error)
            return
        # what still runs over the relay shall end there; then it is only a burden to the relay
        while yamux_of(connection).streams:  # noqa: ASYNC110 - there is no hurry
            await trio.sleep(_IDLE_LOOK_SECONDS)
        if self._swarm.direct(peer):
            await connection.close()

    async def _upgrade(self, connection: SwarmConn, peer: ID) -> None:
        try:
            await self._swarm.connect(peer, (), directly=True)
        except DialError as error:
            logger.debug("%s cannot be dialled directly: %s", peer, error)
        else:
            logger.info("%s could be dialled directly", peer)
            return
        stream = await negotiate(connection, DCUTR)
        with _source(self._port()) as source:
            try:
                started = trio.current_time()
                await send_message(stream, self._connect_message(source))
                answer = await receive_message(stream, HolePunch)
                round_trip = trio.current_time() - started
                await send_message(stream, HolePunch(type=HolePunch.SYNC))
            finally:
                stream.close_now()
            await trio.sleep(round_trip / 2)
            raw = await self._punch(_dialled(answer), source)
        logger.info("a hole was punched to %s", peer)
        self._punched.add(peer)
        connection_made = self._swarm.over_tcp(raw, initiator=False)
        self._nursery.start_soon(self._swarm.serve_inbound, connection_made)

    async def serve(self, net_stream: INetStream) -> None:
        """The other side of ``upgrade``: the peer that we have dialled over a relay asks."""
        stream = yamux_stream_of(net_stream)
        peer = stream.muxed_conn.peer_id
        if stream.muxed_conn.get_connection_type() is not ConnectionType.RELAYED:
            return
        with _source(self._port()) as source:
            question = await receive_message(stream, HolePunch)
            await send_message(stream, self._connect_message(source))
            await receive_message(stream, HolePunch)
            try:
                raw = await self._punch(_dialled(question), source)
                self._punched.add(peer)
                await self._swarm.adopt(peer, self._swarm.over_tcp(raw, initiator=True))
            except DialError as error:
                logger.info("the connection to %s stays relayed: %s", peer, error)

    def _connect_message(self, port: int) -> HolePunch:
        """Where we seem to be: peers see our router, which as a rule keeps the port."""
        seen = (yamux_of(connection).seen_as for connection in self._swarm.alive())
        hosts = {host for each in seen if each is not None and (host := host_of(each)) is not None}
        addresses = [
            Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}") for host in hosts
        ]
        return HolePunch(
            type=HolePunch.CONNECT,
            ObsAddrs=[address.to_bytes() for address in addresses[:_ADDRESSES]],
        )

    async def _punch(self, addresses: Sequence[tuple[str, int]], source: int) -> trio.SocketStream:
        """The first connection that comes about. Raises DialError."""
        made: list[trio.SocketStream] = []

        async def dial(host: str, port: int) -> None:
            while not made:
                try:
                    made.append(await _dial_from(source, host, port))
                except OSError as error:
                    logger.debug("punching to %s: %s", host, error)
                    await trio.sleep(_PAUSE)
                else:
                    nursery.cancel_scope.cancel()

        with trio.move_on_after(_PUNCH_SECONDS):
            async with trio.open_nursery() as nursery:
                for host, port in addresses:
                    nursery.start_soon(dial, host, port)
        for superfluous in made[1:]:
            await trio.aclose_forcefully(superfluous)
        if not made:
            raise DialError("no hole could be punched through the routers")
        return made[0]


@contextmanager
def _source(listening: int | None) -> Iterator[int]:
    """A port of ours to dial from: that which we listen on, else one that is kept free meanwhile."""
    if listening is not None:
        yield listening
        return
    with socket.socket() as keeper:
        _share_port(keeper)
        keeper.bind(("", 0))
        yield keeper.getsockname()[1]


async def _dial_from(source: int, host: str, port: int) -> trio.SocketStream:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dialling = trio.socket.socket(family)
    try:
        _share_port(dialling)
        await dialling.bind(("", source))
        await dialling.connect((host, port))
    except BaseException:
        dialling.close()
        raise
    return trio.SocketStream(dialling)


def _share_port(each: socket.socket | trio.socket.SocketType) -> None:
    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _dialled(message: HolePunch) -> list[tuple[str, int]]:
    """Where the other side says that it seems to be; nobody makes us dial our own machine."""
    found: dict[tuple[str, int], None] = {}
    for raw in message.ObsAddrs[:_ADDRESSES]:
        try:
            address = Multiaddr(raw)
            host = host_of(address)
        except Exception as error:  # noqa: BLE001 - the parser raises a dozen kinds
            logger.debug("an address to punch to that cannot be read: %r", error)
            continue
        if host is not None and not ip_address(host).is_loopback:
            found[host, int(address.value_for_protocol("tcp") or 0)] = None
    return list(found)
