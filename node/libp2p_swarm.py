"""py-libp2p's connections, with what they lack for staying up: bounds, deadlines, no leaks.

Each class here is the library's with some methods overridden; the docstring of each override says what
went wrong without it. The versions that were measured are named in ``pyproject.toml``;
``tests/node/test_libp2p_network.py`` shows that the guards still hold when that changes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio
from libp2p.abc import INetConn, IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from multiaddr import Multiaddr

from ..protocol.admission import AdmissionLimits
from .libp2p_circuit_addresses import is_circuit, with_peer, without_peer
from .libp2p_peerstore import ADDRESSES_PER_PEER, BoundedPeerStore
from .libp2p_sockets import GuardedTcp
from .libp2p_upgrade import upgrader_of
from .libp2p_yamux import Traffic, YamuxConnection
from .libp2p_yamux_stream import YamuxLimits
from .private import Privacy

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 0.5


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


class _NoAutoConnector(AutoConnector):
    """The library dials whomever it has heard of until half its connections are used up."""

    async def maybe_connect(self) -> None:
        """Do not."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Do not."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Do not keep, for ever, when each peer was last seen."""


class GuardedSwarm(Swarm):
    """Dialling with deadlines over all addresses, accepting without leaks."""

    def __init__(
        self, key_pair: KeyPair, limits: HostLimits, traffic: Traffic, privacy: Privacy
    ) -> None:
        peer_id = ID.from_pubkey(key_pair.public_key)
        tcp = GuardedTcp(privacy.swarm_key)
        super().__init__(
            peer_id,
            BoundedPeerStore(key_pair),
            upgrader_of(key_pair, privacy, limits.yamux, traffic),
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
        return list(dict.fromkeys(map(without_peer, usable)))[:ADDRESSES_PER_PEER]

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


def key_pair_of(private_key: bytes) -> KeyPair:
    """libp2p's key pair of a raw Ed25519 seed."""
    key = Ed25519PrivateKey.from_bytes(private_key)
    return KeyPair(key, key.get_public_key())


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
