"""The network ports on py-libp2p: TCP, Noise, Yamux, Kademlia; nothing else of it is used.

This file and its neighbours ``libp2p_*.py`` are the only ones that import libp2p (which takes more
than a second: import them late). ``libp2p_yamux`` carries streams, ``libp2p_swarm`` and
``libp2p_host`` hold the library in bounds, ``libp2p_directory`` keeps the announcements,
``libp2p_addresses`` reads and writes addresses; here is what the node sees.

Rules of this file: everything runs in the one nursery of ``open_network`` and ends with it; every
call has a deadline; what the library raises becomes ``PeerError`` (the peer) or ``ConfigError``
(the user) here, in words.
"""

import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from ..protocol.errors import ConfigError, ErrorCode, PeerError
from .identity import Identity
from .libp2p_addresses import (
    announced_addresses,
    bind,
    is_loopback,
    parse_listen_multiaddr,
    parse_multiaddr,
    parse_peer_multiaddr,
    readable_multiaddr,
)
from .libp2p_circuit_addresses import with_peer
from .libp2p_circuits import CircuitLimits
from .libp2p_dcutr import DCUTR, HolePuncher
from .libp2p_dialback import DialBackLimits
from .libp2p_directory import DirectoryLimits, Libp2pDirectory, MergeEntries
from .libp2p_host import GuardedHost
from .libp2p_negotiation import negotiate
from .libp2p_reachability import ReachabilityKeeper
from .libp2p_relay import RelayLimits
from .libp2p_swarm import DialError, GuardedSwarm, HostLimits, is_relayed, key_pair_of
from .libp2p_yamux import Traffic, yamux_of, yamux_stream_of
from .libp2p_yamux_stream import MAX_PAYLOAD, YamuxStream
from .mdns import LanPeers
from .network import Counting, NetworkStatistics, Stream, StreamHandler
from .private import Privacy
from .reachability import Reachability
from .upnp.forwarding import ForwardingLimits
from .wakeup import Signal

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 1.5  # for all connections together, when the network ends
_INTERFACES_SECONDS = 30.0  # how long the machine's addresses are taken to stay the same
_LAN_LOOK_SECONDS = 0.5  # until neighbours are dialled again, who may have come meanwhile
_LAN_RETRY_SECONDS = 60.0
_SMALL_SEND = 16 * 1024  # buffers up to here are joined: a frame header must not travel alone


@dataclass(frozen=True)
class NetworkLimits:
    """Bounds and deadlines of the whole network."""

    host: HostLimits = field(default_factory=HostLimits)
    directory: DirectoryLimits = field(default_factory=DirectoryLimits)
    relay: RelayLimits = field(default_factory=RelayLimits)
    circuits: CircuitLimits = field(default_factory=CircuitLimits)
    dial_back: DialBackLimits = field(default_factory=DialBackLimits)
    forwarding: ForwardingLimits = field(default_factory=ForwardingLimits)
    settle_seconds: float = 12.0
    """How long a node that joins waits to know how it is reached, before it tells others."""
    lan_seconds: float = 4.0
    """How long it looks for peers on its own network, when it knows no others."""


class Libp2pStream:
    """The ``Stream`` port on one Yamux stream."""

    def __init__(self, stream: YamuxStream) -> None:
        self._stream = stream
        self._peer_id = str(stream.muxed_conn.peer_id)

    def __repr__(self) -> str:
        return f"<Libp2pStream to {self._peer_id}: {self._stream!r}>"

    @property
    def peer_id(self) -> str:
        """Who is at the other end, as Noise has proved it."""
        return self._peer_id

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send the buffers in order; a cancelled call resets the stream, having sent a part."""
        finished = False
        try:
            for buffer in _joined(buffers):
                await self._stream.write(buffer)
            finished = True
        except MuxedStreamError as error:
            raise self._broken(error) from error
        finally:
            if not finished:
                self._stream.reset_now("a message was cut off")

    def send_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        """Send what fits one frame, if there is room for it."""
        size = sum(map(_length, buffers))
        return size <= MAX_PAYLOAD and self._stream.write_now(b"".join(buffers))

    async def receive(self) -> bytes:
        """The next bytes, or b"" at the orderly end; a cancelled call has taken nothing."""
        try:
            return await self._stream.receive()
        except MuxedStreamError as error:
            raise self._broken(error) from error

    async def wait(self, take: Callable[[bytes], bool]) -> None:
        """Let ``take`` have what comes, while there is nothing to ``receive``."""
        await self._stream.wait(take)

    async def close(self) -> None:
        """Close both directions."""
        self._stream.close_now()

    def _broken(self, error: MuxedStreamError) -> PeerError:
        return PeerError(
            f"the stream to {self._peer_id} broke: {error}",
            code=ErrorCode.UNREACHABLE,
            peer_id=self._peer_id,
        )


class Libp2pNetwork:
    """The ``Network`` and ``Directory`` ports on one host; ``open_network`` makes it."""

    def __init__(
        self,
        identity: Identity,
        nursery: trio.Nursery,
        *,
        announce: Sequence[Multiaddr],
        bootstrap: Sequence[str],
        merge: MergeEntries,
        counting: Counting | None,
        serve: bool,
        reachability: str,
        upnp: bool,
        privacy: Privacy,
        mdns: bool,
        clock: Callable[[], float],
        limits: NetworkLimits,
    ) -> None:
        self._identity = identity
        self._nursery = nursery
        self._limits = limits
        self._serve = serve
        self._mdns = mdns
        self._lan_news = Signal()
        self._lan = LanPeers(self._lan_news.notify)
        self._announce = tuple(announce)
        self._bound: list[Multiaddr] = []
        self._interfaces: list[Multiaddr] = []
        self._interfaces_at = -math.inf
        self._traffic = Traffic()
        self._swarm = GuardedSwarm(
            key_pair_of(identity.private_key), limits.host, self._traffic, privacy
        )
        self._host = GuardedHost(self._swarm, nursery, self._identified)
        self._directory = Libp2pDirectory(
            self._host,
            self._open_for_directory,
            merge=merge,
            counting=counting,
            serve=serve and reachability != "private",
            clock=clock,
            limits=limits.directory,
        )
        self._puncher = HolePuncher(self._swarm, nursery, self._listening_port)
        self._host.set_stream_handler(DCUTR, self._puncher.serve)
        self._reachability = ReachabilityKeeper(
            self._host,
            self._swarm,
            wanted=reachability,
            bound=self._host.get_transport_addrs,
            direct=self._direct_addresses,
            relays=[parse_peer_multiaddr(text) for text in bootstrap],
            hold_directory=self._directory.hold,
            clock=clock,
            relay_limits=limits.relay,
            circuit_limits=limits.circuits,
            dial_back_limits=limits.dial_back,
            forwarding_limits=limits.forwarding if upnp and not announce else None,
            punched=self._puncher.punched,
        )
        self._host.addresses = self._reachability.addresses

    @property
    def peer_id(self) -> str:
        """Our own peer id."""
        return self._identity.peer_id

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Where we can be dialled."""
        return tuple(map(str, self._host.get_addrs()))

    @property
    def reachability(self) -> Reachability:
        """Whether others can dial us, or how else they reach us."""
        return self._reachability.reachability

    async def reachability_changed(self) -> None:
        """Return when ``reachability`` or ``multiaddrs`` become others."""
        await self._reachability.news.wait()

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of ``protocol``; the stream is closed when the handler ends."""

        async def serve(stream: INetStream) -> None:
            await handler(Libp2pStream(yamux_stream_of(stream)))

        self._host.set_stream_handler(TProtocol(protocol), serve)

    async def open_stream(self, peer_id: str, multiaddrs: Sequence[str], protocol: str) -> Stream:
        """Open a stream, dialling if need be. Raises PeerError within the limits' deadline."""
        peer = self._parse_peer(peer_id)
        addresses = [
            address for text in multiaddrs if (address := readable_multiaddr(text)) is not None
        ]
        return Libp2pStream(await self._open(peer, addresses, TProtocol(protocol), lasting=True))

    async def connect(self, multiaddr: str) -> str:
        """Connect to the peer at an address that ends in ``/p2p/<peer id>``; its peer id.

        Raises ConfigError for an address that cannot be right, PeerError when nobody answers.
        """
        peer, address = parse_peer_multiaddr(multiaddr)
        try:
            with trio.fail_after(self._limits.host.open_seconds):
                await self._swarm.connect(peer, [address])
        except (DialError, trio.TooSlowError) as error:
            raise self._unreachable(peer, error) from error
        return str(peer)

    async def join(self, bootstrap: Sequence[str]) -> int:
        """Connect to bootstrap peers and meet their neighbours; how many could be reached.

        All are dialled at once. Our own addresses among them are skipped, so that all nodes can
        have the same list. Raises ConfigError if one cannot be right.
        """
        return len(await self._join([*bootstrap, *self._lan_addresses()], []))

    async def _join(self, bootstrap: Sequence[str], failures: list[str]) -> set[str]:
        others = [text for text in bootstrap if str(parse_peer_multiaddr(text)[0]) != self.peer_id]
        reached: set[str] = set()

        async def dial(address: str) -> None:
            try:
                reached.add(await self.connect(address))
            except PeerError as error:
                logger.info("%s", error)
                failures.append(str(error))

        async with trio.open_nursery() as nursery:
            for address in others:
                nursery.start_soon(dial, address)
        for peer in reached:
            await self._host.wait_identified(ID.from_string(peer))
        if reached:
            await self._directory.refresh()
        return reached

    async def first_join(self, bootstrap: Sequence[str]) -> None:
        """``join``, then find out how others reach us.

        Raises PeerError with the reasons if there are others and none was reached.
        """
        failures: list[str] = []
        if self._mdns:
            self._nursery.start_soon(self._lan.run, *self._told_on_the_lan())
        if not await self._join(bootstrap, failures):
            if failures:
                raise PeerError(
                    "no bootstrap peer could be reached: " + "; ".join(failures),
                    code=ErrorCode.UNREACHABLE,
                )
            if self._mdns:
                await self._meet_the_lan()
        if self._mdns:
            self._nursery.start_soon(self._stay_with_the_lan)
        if self._serve:
            self._nursery.start_soon(self._reachability.run)
            await self._reachability.settled(self._limits.settle_seconds)

    async def _meet_the_lan(self) -> None:
        """Raises PeerError if nobody is there and we are nobody to join, either."""
        with trio.move_on_after(self._limits.lan_seconds):
            while not await self._join(self._lan_addresses(), []):
                if self.connected_peers():  # somebody has found us first
                    await self._directory.refresh()
                    break
                with trio.move_on_after(_LAN_LOOK_SECONDS):
                    await self._lan_news.wait()
        if not self._serve and not self.connected_peers():
            raise PeerError(
                f"nobody on this network answered within {self._limits.lan_seconds:g} s: start a "
                "node with `petals-node run`, or name a peer elsewhere with --bootstrap",
                code=ErrorCode.UNREACHABLE,
            )

    async def _stay_with_the_lan(self) -> None:
        while True:
            with trio.move_on_after(_LAN_RETRY_SECONDS):
                await self._lan_news.wait()
            await self._join(self._lan_addresses(), [])

    def _lan_addresses(self) -> list[str]:
        """Of the peers on this network that we are not connected to."""
        connected, usable = self.connected_peers(), []
        for text in self._lan.multiaddrs:
            address = readable_multiaddr(text)
            peer = None if address is None else address.get_peer_id()
            if peer and peer not in connected:
                usable.append(text)
        return usable

    def _told_on_the_lan(self) -> tuple[int, list[str]]:
        """Our port and addresses, for neighbours: those that they can dial whatever a router does."""
        bound = announced_addresses(self._host.get_transport_addrs())
        own = [with_peer(each, self._swarm.self_id) for each in bound if not is_loopback(each)]
        return self._listening_port() or 0, list(map(str, own))

    def connected_peers(self) -> tuple[str, ...]:
        """The peers that we have a live connection to."""
        return tuple(sorted({str(conn.muxed_conn.peer_id) for conn in self._swarm.alive()}))

    def peer_count(self) -> int:
        """How many peers we have a live connection to."""
        return len(self.connected_peers())

    async def release(self, peer_id: str) -> None:
        """Close the connections to a peer that carry no stream."""
        for connection in self._swarm.alive(self._parse_peer(peer_id)):
            if not getattr(connection.muxed_conn, "streams", ()):
                await connection.close()

    def round_trip(self, peer_id: str) -> float | None:
        """Seconds to a connected peer and back, smoothed over pings; None if not known yet."""
        connections = self._swarm.alive(self._parse_peer(peer_id))
        times = [getattr(connection.muxed_conn, "round_trip", None) for connection in connections]
        return min((time for time in times if time is not None), default=None)

    async def put(self, key: bytes, entry: bytes) -> int:
        """Merge our signed entry into the map at ``key``; how many other holders took it."""
        return await self._directory.put(key, entry)

    async def get(self, key: bytes) -> list[bytes]:
        """All valid entries under ``key``."""
        return await self._directory.get(key)

    async def sums(self, key: bytes) -> list[bytes]:
        """What each of the other holders of ``key`` has counted there."""
        return await self._directory.sums(key)

    def statistics(self) -> NetworkStatistics:
        """A snapshot."""
        connections = self._swarm.alive()
        return NetworkStatistics(
            connections=len(connections),
            peers=self.peer_count(),
            streams=sum(len(getattr(c.muxed_conn, "streams", ())) for c in connections),
            bytes_sent=dict(self._traffic.sent),
            bytes_received=dict(self._traffic.received),
            directory_keys=self._directory.stored_keys,
            directory_peers=self._directory.known_peers,
        )

    async def _open(
        self,
        peer: ID,
        addresses: Sequence[Multiaddr],
        protocol: TProtocol,
        *,
        lasting: bool = False,
    ) -> YamuxStream:
        """``lasting``: worth waiting a moment for a direct connection, rather than over a relay."""
        try:
            with trio.fail_after(self._limits.host.open_seconds):
                connection = await self._swarm.connect(peer, addresses)
                if lasting:
                    connection = await self._puncher.upgraded(connection)
                try:
                    return await negotiate(connection, protocol)
                except MuxedStreamError:
                    if not connection.muxed_conn.is_closed:
                        raise
                # The connection was lost under us, perhaps hours ago: a new one may do.
                connection = await self._swarm.connect(peer, addresses)
                return await negotiate(connection, protocol)
        except (DialError, MuxedStreamError, trio.TooSlowError) as error:
            raise self._unreachable(peer, error) from error

    async def _open_for_directory(self, peer: ID, protocol: TProtocol) -> YamuxStream:
        return await self._open(peer, (), protocol)

    async def _identified(self, peer: ID) -> None:
        await self._directory.met(peer)
        self._reachability.met()
        for connection in self._swarm.alive(peer):
            below = yamux_of(connection)
            if is_relayed(connection) and not below.is_initiator and not below.upgrade_awaited:
                below.upgrade_awaited = True
                self._nursery.start_soon(self._puncher.upgrade, connection)

    def _listening_port(self) -> int | None:
        bound = self._host.get_transport_addrs()
        return int(bound[0].value_for_protocol("tcp")) if bound else None

    def _direct_addresses(self) -> list[Multiaddr]:
        """Where we are told to be, or where our sockets are."""
        if self._announce:
            return list(self._announce)
        bound = self._host.get_transport_addrs()
        # The library asks with every message of the directory; interfaces change by the hour.
        now = time.monotonic()
        if bound != self._bound or now - self._interfaces_at > _INTERFACES_SECONDS:
            self._bound, self._interfaces_at = bound, now
            self._interfaces = announced_addresses(bound)
        return list(self._interfaces)

    def _unreachable(self, peer: ID, error: Exception) -> PeerError:
        late = f"no answer within {self._limits.host.open_seconds:g} s"
        reason = late if isinstance(error, trio.TooSlowError) else str(error)
        return PeerError(
            f"cannot reach {peer}: {reason}", code=ErrorCode.UNREACHABLE, peer_id=str(peer)
        )

    def _parse_peer(self, peer_id: str) -> ID:
        try:
            return ID.from_string(peer_id)
        except Exception as error:
            raise PeerError(f"{peer_id!r} is not a peer id", code=ErrorCode.BAD_REQUEST) from error

    @asynccontextmanager
    async def running(self, listen: Sequence[Multiaddr]) -> AsyncIterator[None]:
        """Listen and serve; ``open_network`` calls it."""
        listeners = await bind(listen)
        try:
            async with background_trio_service(self._swarm):
                for address, listener in zip(listen, listeners, strict=True):
                    self._swarm.listeners[str(address)] = listener
                    self._nursery.start_soon(listener.serve, self._swarm.accept)
                self._nursery.start_soon(self._directory.run)
                try:
                    yield
                finally:
                    await self._close_connections()
        finally:
            for listener in listeners:
                await listener.close()

    async def _close_connections(self) -> None:
        """All at once: the library closes them one after another, a fifth of a second each."""
        with trio.move_on_after(_CLOSE_SECONDS) as scope:
            scope.shield = True
            async with trio.open_nursery() as nursery:
                for connection in self._swarm.alive():
                    nursery.start_soon(connection.close)


@asynccontextmanager
async def open_network(
    identity: Identity,
    *,
    merge: MergeEntries,
    counting: Counting | None = None,
    clock: Callable[[], float],
    listen: Sequence[str] = (),
    announce: Sequence[str] = (),
    bootstrap: Sequence[str] = (),
    reachability: str = "public",
    upnp: bool = False,
    privacy: Privacy | None = None,
    mdns: bool = False,
    limits: NetworkLimits | None = None,
) -> AsyncIterator[Libp2pNetwork]:
    """The network while the block runs; leaving it closes everything within three seconds.

    With nothing to listen on it is a client: it dials, but holds nothing for others. ``clock`` is
    the wall clock in unix seconds, which entries expire by. ``announce`` replaces the addresses
    that others are told (for a forwarded port, say). ``reachability``: whether others can dial us,
    ``public`` or ``private``, or ``auto`` to find out. ``upnp``: ask the router to forward our port, if
    we are to find out and announce nothing else. ``privacy``: who may take part. ``mdns``: look for
    peers on this network, too. Raises ConfigError for an address that cannot be right or cannot be
    bound, PeerError if ``bootstrap`` names others and none can be reached.
    """
    listen_addresses = [parse_listen_multiaddr(text) for text in listen]
    announced = [parse_multiaddr(text, "announce") for text in announce]
    for text in bootstrap:  # what cannot be right is said before anything is opened
        parse_peer_multiaddr(text)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        network = Libp2pNetwork(
            identity,
            nursery,
            announce=announced,
            bootstrap=bootstrap,
            merge=merge,
            counting=counting,
            serve=bool(listen),
            reachability=reachability,
            upnp=upnp,
            privacy=privacy or Privacy(),
            mdns=mdns,
            clock=clock,
            limits=limits or NetworkLimits(),
        )
        # What the block raises is kept out of the nurseries, which would wrap it in a group.
        try:
            async with network.running(listen_addresses):
                try:
                    await network.first_join(bootstrap)
                    yield network
                except Exception as error:  # noqa: BLE001 - raised again below
                    failure = error
        except ConfigError as error:  # the addresses could not be bound
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _joined(buffers: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The buffers, small neighbours joined: a header of a few bytes must not travel alone."""
    small: list[bytes | memoryview] = []
    size = 0
    for buffer in buffers:
        length = _length(buffer)
        if size + length <= _SMALL_SEND:
            small.append(buffer)
            size += length
            continue
        if small:
            yield b"".join(small)
            small, size = [], 0
        if length <= _SMALL_SEND:
            small, size = [buffer], length
        else:
            yield buffer
    if small:
        yield b"".join(small)


def _length(buffer: bytes | memoryview) -> int:
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
