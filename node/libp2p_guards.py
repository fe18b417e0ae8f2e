"""py-libp2p's host, with what it lacks for staying up: bounds, deadlines, and handlers that may fail.

Each class here is the library's with one or two methods overridden; the docstring of each override
says what went wrong without it. The versions that were measured are named in ``pyproject.toml``;
``tests/node/test_libp2p_network.py`` shows that the guards still hold when that changes.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio
from libp2p.abc import IListener, IMuxedConn, INetConn, INetStream, IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_key_pair
from libp2p.custom_types import StreamHandlerFn, TMuxerOptions, TProtocol, TSecurityOptions
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import (
    _mk_identify_protobuf,
    _remote_address_to_multiaddr,
)
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.identity.identify_push.identify_push import ID_PUSH as IDENTIFY_PUSH
from libp2p.identity.update import update_peerstore_from_identify
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.envelope import Envelope
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.exceptions import SecurityUpgradeFailure
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import encode_varint_prefixed, read_length_prefixed_protobuf
from multiaddr import Multiaddr

from ..protocol.admission import AdmissionLimits
from ..protocol.errors import PetalsError
from .libp2p_circuit_addresses import is_circuit, with_peer, without_peer
from .libp2p_swarm_key import KeyedConnection
from .libp2p_yamux import PROTOCOL_ID as YAMUX
from .libp2p_yamux import Traffic, YamuxConnection
from .libp2p_yamux_stream import YamuxLimits, YamuxStream
from .private import Privacy
from .wakeup import holding

logger = logging.getLogger(__name__)

# It logs at "warning" what is daily life among peers; LIBP2P_DEBUG is the library's own switch.
if not os.environ.get("LIBP2P_DEBUG"):
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
# That module logs to the root logger, which as a side effect would print everybody's log to stderr.
setattr(swarm_connection, "logging", logging.getLogger(swarm_connection.__name__))  # noqa: B010

_READ_BYTES = 256 * 1024  # four Noise messages: one system call instead of eight
_LONGEST_READ = 1024 * 1024  # the library asks for at most 64 KiB, unless a peer made it ask
_IDENTIFY_SECONDS = 5.0
_CLOSE_SECONDS = 0.5
_KNOWN_PEERS = 5000
_ADDRESSES_PER_PEER = 8  # the most that a dial tries
_ADDRESS_BYTES = 256
_PROTOCOLS_PER_PEER = 64
_PROTOCOL_LENGTH = 128
_IDENTIFY_BYTES = 32 * 1024  # the real ones are below 2 KB


@dataclass(frozen=True)
class HostLimits:
    """Bounds and deadlines of a host, in seconds where they are times."""

    connections: int = AdmissionLimits.max_connections
    """Connections in all."""
    peer_connections: int = AdmissionLimits.peer_connections
    """Connections of one peer; when there are more, the oldest is closed."""
    handshakes: int = 64
    """Dialled by others and still shaking hands; when there are more, the oldest is closed: strangers
    who say nothing must not keep everybody out until ``accept_seconds`` have passed."""
    dial_seconds: float = 5.0
    """For one address, from the first packet to the connection that can carry streams."""
    accept_seconds: float = 10.0
    """For a dialler to shake hands with us."""
    open_seconds: float = 10.0
    """For opening a stream: dialling if need be, and agreeing on the protocol."""
    yamux: YamuxLimits = field(default_factory=YamuxLimits)
    """Bounds of each connection."""

    @classmethod
    def admitting(cls, limits: AdmissionLimits) -> "HostLimits":
        """The usual ones, with what others may have of this node."""
        return cls(
            connections=limits.max_connections,
            peer_connections=limits.peer_connections,
            yamux=YamuxLimits(streams=limits.peer_streams, opens_per_second=limits.peer_opens),
        )

    @property
    def inbound(self) -> int:
        """How many connections others may have dialled: our own dialling must not depend on them."""
        return self.connections - self.connections // 5


class DialError(Exception):
    """None of a peer's addresses could be reached; the message says why for each."""


class ExactReader(ABC):
    """Bytes below a secured connection, whose ``read(n)`` returns all n, or fewer at the end only.

    The library's ``read_exactly`` gives up after 101 partial reads, and lets a dialler make it
    allocate whatever length it names.
    """

    _ahead = b""

    async def read(self, n: int | None = None) -> bytes:
        """Exactly ``n`` bytes unless the stream ends; any number with None."""
        if n is not None and n > _LONGEST_READ:
            raise ValueError(f"the peer makes us read {n} bytes at once")
        if n is None:
            ahead, self._ahead = self._ahead, b""
            return ahead or await self._receive()
        pieces, missing = [], n
        while missing > 0:
            if not self._ahead:
                self._ahead = await self._receive()
                if not self._ahead:
                    break
            piece, self._ahead = self._ahead[:missing], self._ahead[missing:]
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @abstractmethod
    async def _receive(self) -> bytes:
        """What has arrived; b"" at the end."""


class BufferedSocket(ExactReader, TrioTCPStream):
    """A socket that asks the kernel once for several Noise messages.

    The library's own ``read`` and ``write`` wait for a turn of the loop to take a lock that is free,
    for every message.
    """

    async def write(self, data: bytes) -> None:
        """Send ``data``; nothing on a socket that we have closed ourselves."""
        async with holding(self.write_lock):
            try:
                await self.stream.send_all(data)
            except trio.BrokenResourceError as error:
                raise ConnectionClosedError(f"the peer broke the connection: {error}") from error
            except trio.ClosedResourceError:
                return

    async def _receive(self) -> bytes:
        """What the kernel has; b"" at the end, and on a socket that we have closed ourselves."""
        async with holding(self.read_lock):
            try:
                return bytes(await self.stream.receive_some(_READ_BYTES))
            except trio.BrokenResourceError as error:
                raise ConnectionClosedError(f"the peer broke the connection: {error}") from error
            except trio.ClosedResourceError:
                return b""


class GuardedTcp(TCP):
    """TCP with buffered reads, to addresses that say no more than where to dial; with a key or not."""

    def __init__(self, swarm_key: bytes | None) -> None:
        super().__init__()
        self._swarm_key = swarm_key

    def wrapped(self, stream: trio.SocketStream, *, initiator: bool) -> RawConnection:
        """The raw connection over a socket."""
        raw = RawConnection(
            BufferedSocket(stream), initiator=initiator, connection_type=ConnectionType.DIRECT
        )
        return raw if self._swarm_key is None else KeyedConnection(raw, self._swarm_key)

    def can_dial(self, maddr: Multiaddr) -> bool:
        """The library's would dial the relay of a circuit address."""
        return super().can_dial(maddr) and not is_circuit(maddr)

    async def _dial_resolved(
        self, maddr: Multiaddr, source: tuple[str, int] | None = None
    ) -> IRawConnection:
        connection = await super()._dial_resolved(maddr, source)
        assert isinstance(connection, RawConnection)
        assert isinstance(connection.stream, TrioTCPStream)
        return self.wrapped(connection.stream.stream, initiator=True)


class _AllowedOnly(TransportUpgrader):
    """Hangs up on whoever is not allowed here as soon as it has proved who it is."""

    def __init__(self, privacy: Privacy, security: TSecurityOptions, muxers: TMuxerOptions) -> None:
        super().__init__(security, muxers)
        self._privacy = privacy

    async def upgrade_security(
        self,
        raw_conn: IRawConnection,
        is_initiator: bool,  # noqa: FBT001 - the library's signature
        peer_id: ID | None = None,
    ) -> ISecureConn:
        """Shake hands. Raises SecurityUpgradeFailure."""
        secured = await super().upgrade_security(raw_conn, is_initiator, peer_id)
        if not self._privacy.allows(str(secured.get_remote_peer())):
            await secured.close()
            raise SecurityUpgradeFailure(f"{secured.get_remote_peer()} is not on our list")
        return secured


class _YamuxOnly(MuxerMultistream):
    """The library makes its own Yamux whatever class one asks for."""

    def __init__(self, limits: YamuxLimits, traffic: Traffic) -> None:
        super().__init__({TProtocol(YAMUX): YamuxConnection})
        self._limits, self._traffic = limits, traffic

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Negotiate Yamux and make the connection."""
        await self.select_transport(conn)
        return YamuxConnection(conn, peer_id, self._limits, self._traffic)


class Listener(IListener):
    """Sockets of one listening address, served in the network's own nursery.

    The library's listener runs in a system task, where a bug ends the process, and shares its port
    (SO_REUSEPORT) with whoever binds it too, so that two nodes on one port both seem to work.
    """

    def __init__(self, sockets: Sequence[trio.SocketListener]) -> None:
        self._sockets = tuple(sockets)

    async def listen(self, maddr: Multiaddr) -> None:
        """Not used: the network listens by itself."""
        raise NotImplementedError

    async def serve(self, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
        """Accept connections until closed or cancelled."""
        try:
            await trio.serve_listeners(handler, list(self._sockets))
        except* trio.ClosedResourceError:
            pass

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """Where the sockets are bound."""
        addresses = []
        for listener in self._sockets:
            host, port = listener.socket.getsockname()[:2]
            family = "ip6" if ":" in host else "ip4"
            addresses.append(Multiaddr(f"/{family}/{host}/tcp/{port}"))
        return tuple(addresses)

    async def close(self) -> None:
        """Stop listening."""
        for listener in self._sockets:
            await trio.aclose_forcefully(listener)


class _NoAutoConnector(AutoConnector):
    """The library dials whomever it has heard of until half its connections are used up."""

    async def maybe_connect(self) -> None:
        """Do not."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Do not."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Do not keep, for ever, when each peer was last seen."""


class _PeerStore(PeerStore):
    """The library forgets its own key first when it knows too many peers.

    And of each it keeps all that anybody says, which it also tells whoever asks.
    """

    def __init__(self, key_pair: KeyPair) -> None:
        super().__init__(max_peers=_KNOWN_PEERS)
        self._own_id = ID.from_pubkey(key_pair.public_key)
        self.add_key_pair(self._own_id, key_pair)

    def _enforce_peer_limit(self) -> None:
        own = self.peer_data_map.pop(self._own_id)
        super()._enforce_peer_limit()
        self.peer_data_map[self._own_id] = own

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        """Keep the latest few that are not too long."""
        short = [address for address in addrs if len(address.to_bytes()) <= _ADDRESS_BYTES]
        super().add_addrs(peer_id, short, ttl)
        if peer_id != self._own_id and peer_id in self.peer_data_map:
            del self.peer_data_map[peer_id].addrs[:-_ADDRESSES_PER_PEER]

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Keep a list of usual length."""
        known = len(self.peer_data_map[peer_id].protocols) if peer_id in self.peer_data_map else 0
        short = [protocol for protocol in protocols if len(protocol) <= _PROTOCOL_LENGTH]
        super().add_protocols(peer_id, short[: max(0, _PROTOCOLS_PER_PEER - known)])

    def consume_peer_record(self, envelope: Envelope, ttl: int) -> bool:  # noqa: ARG002
        """Take it and forget it: we have no use for the library's records, which have no bound."""
        return True


class GuardedSwarm(Swarm):
    """Dialling with deadlines over all addresses, accepting without leaks."""

    def __init__(
        self, key_pair: KeyPair, limits: HostLimits, traffic: Traffic, privacy: Privacy
    ) -> None:
        peer_id = ID.from_pubkey(key_pair.public_key)
        noise_key = new_x25519_key_pair().private_key
        # Noise only: the library's default would also accept a dialler in plain text.
        upgrader = _AllowedOnly(
            privacy,
            {NOISE: NoiseTransport(key_pair, noise_privkey=noise_key)},
            {TProtocol(YAMUX): YamuxConnection},
        )
        upgrader.muxer_multistream = _YamuxOnly(limits.yamux, traffic)
        tcp = GuardedTcp(privacy.swarm_key)
        super().__init__(
            peer_id,
            _PeerStore(key_pair),
            upgrader,
            [tcp],
            retry_config=RetryConfig(max_retries=0),
            connection_config=ConnectionConfig(
                max_connections=limits.connections,
                high_watermark=limits.connections,
                min_connections=0,
                low_watermark=0,
                max_connections_per_peer=limits.peer_connections,
                inbound_upgrade_timeout=limits.accept_seconds,
                outbound_upgrade_timeout=limits.dial_seconds,
            ),
        )
        self.auto_connector = _NoAutoConnector(self)
        self._tcp = tcp
        self._privacy = privacy
        self._limits = limits
        self._handshakes: dict[trio.CancelScope, None] = {}
        self._inbound = 0
        self._dialling: dict[ID, trio.Lock] = {}

    def alive(self, peer_id: ID | None = None) -> list[SwarmConn]:
        """The connections that can carry streams, to one peer or to all; direct ones first."""
        alive = [
            connection
            for connection in self.get_connections(peer_id)
            if isinstance(connection, SwarmConn)
            and not connection.is_closed
            and not connection.muxed_conn.is_closed
        ]
        return sorted(alive, key=is_relayed)

    def direct(self, peer_id: ID) -> list[SwarmConn]:
        """The live connections to a peer that lead through no relay."""
        return [connection for connection in self.alive(peer_id) if not is_relayed(connection)]

    async def connect(
        self, peer_id: ID, addresses: Sequence[Multiaddr] = (), *, directly: bool = False
    ) -> SwarmConn:
        """The connection to a peer, dialled if there is none. Raises DialError.

        ``directly``: not through a relay. The library tries only the first TCP address, waits 250 ms
        even when it answers, waits two minutes for a listener that says nothing, and refuses a
        failed peer for a minute.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        found = self.direct if directly else self.alive
        if connections := found(peer_id):
            return connections[0]
        if peer_id == self.self_id:
            raise DialError("this is our own peer id")
        if not self._privacy.allows(str(peer_id)):
            raise DialError("it is not on our list of allowed peers (--allow-peers)")
        lock = self._dialling.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                if connections := found(peer_id):
                    return connections[0]
                return await self._dial(peer_id, addresses, directly=directly)
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._dialling.pop(peer_id, None)

    async def _dial(
        self, peer_id: ID, addresses: Sequence[Multiaddr], *, directly: bool
    ) -> SwarmConn:
        failures = []
        for address in self._candidates(peer_id, addresses, directly=directly):
            try:
                return await self._dial_one(peer_id, address)
            except DialError as error:
                failures.append(f"{address}: {error}")
        self.peerstore.clear_addrs(peer_id)  # stale; the directory will tell newer ones
        raise DialError("; ".join(failures) or "we know no address of it")

    async def _dial_one(self, peer_id: ID, address: Multiaddr) -> SwarmConn:
        if len(self.alive()) >= self._limits.connections:
            raise DialError("this node has as many connections as it may")
        transport = self.transport_manager.transport_for_dialing(address)
        if transport is None:
            raise DialError("this node cannot dial such addresses")
        raw: IRawConnection | None = None
        connection: INetConn | None = None
        try:
            with trio.fail_after(self._limits.dial_seconds):
                raw = await transport.dial(with_peer(address, peer_id))
                connection = await self.upgrade_outbound_raw_conn(raw, peer_id)
        except Exception as error:
            late = f"no answer within {self._limits.dial_seconds:g} s"
            reason = late if isinstance(error, trio.TooSlowError) else _root_cause(error)
            doubt = "" if raw is None or "swarm key" in reason else self._doubt
            raise DialError(reason + doubt) from error
        finally:
            if raw is not None and connection is None:
                with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                    await raw.close()
        assert isinstance(connection, SwarmConn)
        return connection

    @property
    def _doubt(self) -> str:
        """What may be wrong with a peer that is there and does not shake hands."""
        if self._privacy.swarm_key is not None:
            return " (wrong swarm key? or we are not on its list of allowed peers)"
        return " (is it in a private swarm, with a --swarm-key or a list that we are not on?)"

    def _candidates(
        self, peer_id: ID, addresses: Sequence[Multiaddr], *, directly: bool
    ) -> list[Multiaddr]:
        """What is dialled, in order: first what the caller says; of that the direct ones first."""
        try:
            known = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            known = []
        ordered = [*sorted(addresses, key=is_circuit), *sorted(known, key=is_circuit)]
        usable = [address for address in ordered if not (directly and is_circuit(address))]
        return list(dict.fromkeys(map(without_peer, usable)))[:_ADDRESSES_PER_PEER]

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """``connect`` for the library's own callers."""
        try:
            return [await self.connect(peer_id)]
        except DialError as error:
            raise SwarmException(f"cannot reach {peer_id}: {error}") from error

    def over_tcp(self, stream: trio.SocketStream, *, initiator: bool) -> RawConnection:
        """A connection over a socket that was opened elsewhere."""
        return self._tcp.wrapped(stream, initiator=initiator)

    async def adopt(self, peer_id: ID, raw: RawConnection) -> None:
        """Shake hands, as who has dialled, over such a connection. Raises DialError."""
        adopted = False
        try:
            with trio.fail_after(self._limits.dial_seconds):
                await self.upgrade_outbound_raw_conn(raw, peer_id)
            adopted = True
        except Exception as error:
            raise DialError(_root_cause(error)) from error
        finally:
            if not adopted:
                with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                    await raw.close()

    async def is_there(self, peer_id: ID, address: Multiaddr) -> bool:
        """Whether that peer answers at a TCP address: dialled anew, and hung up at once."""
        raw: IRawConnection | None = None
        try:
            raw = await self._tcp.dial(address)
            await self.upgrader.upgrade_security(raw, is_initiator=True, peer_id=peer_id)
        except Exception as error:  # noqa: BLE001 - the library raises whatever it met
            logger.debug("%s is not at %s: %s", peer_id, address, _root_cause(error))
            return False
        else:
            return True
        finally:
            if raw is not None:
                with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                    await raw.close()

    async def accept(self, stream: trio.SocketStream) -> None:
        """Serve a connection to one of our sockets until it closes. Raises nothing."""
        await self.serve_inbound(self._tcp.wrapped(stream, initiator=False))

    async def serve_inbound(self, raw: RawConnection) -> None:
        """Serve one inbound connection until it closes. Raises nothing.

        The library keeps a task, a socket and a slot of its limit for each connection that was
        ever accepted, so that after some hundreds it accepts no more.
        """
        if self._inbound >= self._limits.inbound:
            return
        if len(self._handshakes) >= self._limits.handshakes:
            next(iter(self._handshakes)).cancel()
        try:
            with trio.fail_after(self._limits.accept_seconds) as handshake:
                self._handshakes[handshake] = None
                try:
                    connection = await self.upgrade_inbound_raw_conn(raw, Multiaddr("/ip4/0.0.0.0"))
                finally:
                    del self._handshakes[handshake]
            assert isinstance(connection, YamuxConnection)
            self._inbound += 1
            try:
                if self._inbound > self._limits.inbound:  # several were after the last place
                    await connection.close()
                await connection.event_closed.wait()
            finally:
                self._inbound -= 1
        except Exception as error:  # noqa: BLE001 - a stranger's handshake must not end the host
            logger.debug("an inbound connection failed: %r", error)

    def _trim_connections(self, peer_id: ID) -> None:
        """The library lets a peer have any number of connections that are younger than 20 s."""
        connections = self.connections[peer_id]
        excess = len(connections) - self._limits.peer_connections
        for connection in connections[:excess]:
            self.manager.run_task(self._close_connection_async, connection)
        self.connections[peer_id] = connections[excess:]


class GuardedHost(BasicHost):
    """A host that outlives its handlers."""

    def __init__(
        self,
        swarm: GuardedSwarm,
        nursery: trio.Nursery,
        identified: Callable[[ID], Awaitable[None]],
    ) -> None:
        self.addresses: Callable[[], Sequence[Multiaddr]] = tuple
        """Says where we can be dialled; set by whoever knows."""
        super().__init__(swarm, disable_identify_address_discovery=True)
        self.remove_stream_handler(
            IDENTIFY_PUSH
        )  # we ask when we connect; nobody need tell us more
        self.set_stream_handler(IDENTIFY, self._tell_identity)
        self._nursery = nursery
        self._identified = identified
        self._identifying: dict[ID, trio.Event] = {}

    def get_addrs(self) -> list[Multiaddr]:
        """Where we can be dialled. The library would cut a circuit address in the middle."""
        return [with_peer(address, self.get_id()) for address in self.addresses()]

    def set_stream_handler(self, protocol_id: TProtocol, stream_handler: StreamHandlerFn) -> None:
        """Note the protocol for the statistics."""

        async def labelled(stream: INetStream) -> None:
            yamux_stream_of(stream).protocol = str(protocol_id)
            await stream_handler(stream)

        super().set_stream_handler(protocol_id, labelled)

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        """An exception of a handler would end the host; a stream left open, hang the peer."""
        stream = yamux_stream_of(net_stream)
        try:
            await super()._swarm_stream_handler(net_stream)
        except PetalsError as error:  # the peer broke a rule or went away: daily life
            logger.info("a stream of %s failed: %s", stream.protocol, error)
            stream.reset_now("the handler failed")
        except Exception:
            logger.exception("a handler of %s failed", stream.protocol)
            stream.reset_now("the handler failed")
        finally:
            stream.close_now()

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """In our nursery, with a deadline: the library's system task may outlive the host."""
        if peer_id not in self._identifying and peer_id != self.get_id():
            self._identifying[peer_id] = trio.Event()
            self._nursery.start_soon(self._identify, peer_id, reason)

    async def _tell_identity(self, stream: INetStream) -> None:
        """The library waits half a second for addresses, which who listens nowhere never has."""
        remote = yamux_stream_of(stream).get_remote_address()
        told = _mk_identify_protobuf(self, _remote_address_to_multiaddr(remote))
        await stream.write(encode_varint_prefixed(told.SerializeToString()))

    async def wait_identified(self, peer_id: ID) -> None:
        """Return when a peer just connected has said what it speaks, or has failed to."""
        if peer_id in self._identifying:
            await self._identifying[peer_id].wait()

    async def _identify(self, peer_id: ID, reason: str) -> None:
        try:
            with trio.move_on_after(_IDENTIFY_SECONDS):
                await self._identify_peer(peer_id, reason=reason)
                await self._identified(peer_id)
        except Exception as error:  # noqa: BLE001 - what a stranger says of itself may be anything
            logger.debug("%s cannot be identified: %r", peer_id, error)
        finally:
            self._identifying.pop(peer_id).set()

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        """The library would read a MiB, and keep in a cache whatever it takes for an address."""
        stream = await self.new_stream(peer_id, [IDENTIFY])
        try:
            data = await read_length_prefixed_protobuf(stream, max_length=_IDENTIFY_BYTES)
        finally:
            yamux_stream_of(stream).close_now()
        told = Identify()
        told.ParseFromString(data)
        addresses = [raw for raw in told.listen_addrs if len(raw) <= _ADDRESS_BYTES]
        del told.listen_addrs[:]
        told.listen_addrs.extend(addresses[:_ADDRESSES_PER_PEER])
        await update_peerstore_from_identify(self.peerstore, peer_id, told)
        connections = self._network.get_connections(peer_id)
        if connections:
            self._identified_peers[peer_id] = reason
        if len(told.observed_addr) <= _ADDRESS_BYTES:
            yamux_stream_of(stream).muxed_conn.seen_as = Multiaddr(told.observed_addr)


def key_pair_of(private_key: bytes) -> KeyPair:
    """libp2p's key pair of a raw Ed25519 seed."""
    key = Ed25519PrivateKey.from_bytes(private_key)
    return KeyPair(key, key.get_public_key())


def yamux_stream_of(stream: INetStream) -> YamuxStream:
    """Our stream below the library's."""
    below = getattr(stream, "muxed_stream", None)
    assert isinstance(below, YamuxStream)
    return below


def yamux_of(connection: INetConn) -> YamuxConnection:
    """Our connection below the library's."""
    below = connection.muxed_conn
    assert isinstance(below, YamuxConnection)
    return below


def is_relayed(connection: SwarmConn) -> bool:
    """Whether a connection leads through a relay."""
    return connection.get_connection_type() is ConnectionType.RELAYED


def _root_cause(error: BaseException) -> str:
    """The innermost reason in words: the library wraps what the system said several times."""
    while isinstance(inner := error.__cause__ or error.__context__, Exception):
        error = inner
    if isinstance(error, BaseExceptionGroup):
        return _root_cause(error.exceptions[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
