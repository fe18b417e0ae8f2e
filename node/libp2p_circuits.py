"""Reaching others, and being reached, through relays (circuit relay v2, the two ends of it).

A circuit is a stream to a relay that carries a whole connection to somebody else, secured and
multiplexed as a connection over TCP is: the relay cannot read it, and everything above sees a
connection like any other, only that ``is_relayed`` says so. ``libp2p_relay`` is the middle.

Rules of this file: a relay is dialled directly, so one circuit never leads through another; only
relays at which we hold a reservation may bring us connections; a lost reservation is told at once
(``changed``) and made anew.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio
from libp2p.abc import IListener, INetStream, IRawConnection, ITransport
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import THandler
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
    MALFORMED_MESSAGE,
    NO_RESERVATION,
    OK,
    PERMISSION_DENIED,
    RESOURCE_LIMIT_EXCEEDED,
    HopMessage,
    Status,
    StopMessage,
)
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as CircuitPeer
from libp2p.stream_muxer.exceptions import MuxedStreamError, MuxedStreamReset
from multiaddr import Multiaddr

from .libp2p_circuit_addresses import (
    circuit_address,
    is_circuit,
    relay_of,
    with_peer,
    without_peer,
)
from .libp2p_negotiation import MESSAGE_SECONDS, negotiate, receive_message, send_message
from .libp2p_relay import HOP
from .libp2p_sockets import ExactReader
from .libp2p_swarm import DialError, GuardedSwarm
from .libp2p_yamux import yamux_of, yamux_stream_of
from .libp2p_yamux_stream import YamuxStream

logger = logging.getLogger(__name__)

_TARGET_SECONDS = 2 * MESSAGE_SECONDS  # the relay has to ask the target first
_SHORTEST_SECONDS = 60.0  # what a reservation is taken to hold, whatever the clocks say
_LONGEST_SECONDS = 3600.0
_RELAY_ADDRESSES = 3  # of one relay that are announced
_REFUSALS = {
    NO_RESERVATION: "the peer is not connected to it any more",
    RESOURCE_LIMIT_EXCEEDED: "it relays as much as it can",
    PERMISSION_DENIED: "it does not allow that",
}


@dataclass(frozen=True)
class CircuitLimits:
    """How a node that cannot be dialled keeps itself reachable."""

    relays: int = 2
    """Relays to be reached through: the swarm must not lose us when one of them stops."""
    retry_seconds: float = 5.0
    """Between two tries to have that many."""


class CircuitSocket(ExactReader, ReadWriteCloser):
    """A stream through a relay, where the library expects a socket."""

    def __init__(self, stream: YamuxStream) -> None:
        self._stream = stream

    async def write(self, data: bytes) -> None:
        """Send ``data``."""
        await self._stream.write(data)

    async def close(self) -> None:
        """Close both directions."""
        await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: the relay's would be taken for the peer's."""
        return None

    async def _receive(self) -> bytes:
        try:
            return await self._stream.receive()
        except MuxedStreamReset:
            raise
        except MuxedStreamError:  # closed by ourselves
            return b""


class CircuitTransport(ITransport):
    """Dials circuit addresses, for the library's swarm."""

    def __init__(self, swarm: GuardedSwarm) -> None:
        self._swarm = swarm

    def protocols(self) -> list[str]:
        """What the transport is called."""
        return ["p2p-circuit"]

    def can_dial(self, maddr: Multiaddr) -> bool:
        """Whether the address leads through a relay."""
        return is_circuit(maddr)

    def can_listen(self, maddr: Multiaddr) -> bool:  # noqa: ARG002 - the library's signature
        """No: circuits to us arrive as streams."""
        return False

    def create_listener(self, handler_function: THandler) -> IListener:
        """Not used: circuits to us arrive as streams."""
        raise NotImplementedError

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """A circuit to the peer at the end of the address. Raises DialError."""
        try:
            relay, relay_address = relay_of(maddr)
        except ValueError as error:
            raise DialError(str(error)) from error
        target = ID.from_string(maddr.get_peer_id() or "")
        connection = await self._swarm.connect(relay, [relay_address], directly=True)
        stream: YamuxStream | None = None
        made = False
        try:
            stream = await negotiate(connection, HOP)
            request = HopMessage(type=HopMessage.CONNECT, peer=CircuitPeer(id=target.to_bytes()))
            answer = await _ask(stream, request, seconds=_TARGET_SECONDS)
            made = answer.status == OK
        except MuxedStreamError as error:
            raise DialError(f"the relay failed: {error}") from error
        finally:
            if stream is not None and not made:
                stream.reset_now("no circuit was made")
        if not made:
            raise DialError(f"the relay refused: {_in_words(answer.status)}")
        return _raw(stream, maddr, initiator=True)


class Reservations:
    """Places at relays, so that others can reach us: made, renewed, replaced."""

    def __init__(
        self,
        swarm: GuardedSwarm,
        candidates: Callable[[], Iterable[tuple[ID, Sequence[Multiaddr]]]],
        changed: Callable[[], None],
        clock: Callable[[], float],
        limits: CircuitLimits,
    ) -> None:
        """``candidates``: relays to try and where to dial them, the best first."""
        self._swarm = swarm
        self._candidates = candidates
        self._changed = changed
        self._clock = clock
        self._limits = limits
        self._held: dict[ID, tuple[Multiaddr, ...]] = {}

    @property
    def addresses(self) -> list[Multiaddr]:
        """Where we can be reached through the relays."""
        return [address for addresses in self._held.values() for address in addresses]

    @property
    def relays(self) -> tuple[ID, ...]:
        """Those at which we have a place."""
        return tuple(self._held)

    async def accept(self, net_stream: INetStream) -> None:
        """Serve a circuit that a relay brings, until it closes."""
        stream = yamux_stream_of(net_stream)
        relay = stream.muxed_conn.peer_id
        request = await receive_message(stream, StopMessage)
        status: Status.ValueType = OK
        through = self._held.get(relay)
        if through is None:
            status = PERMISSION_DENIED
        elif request.type != StopMessage.CONNECT or not request.peer.id:
            status = MALFORMED_MESSAGE
        await send_message(stream, StopMessage(type=StopMessage.STATUS, status=status))
        if through is not None and status == OK:
            source = with_peer(through[0], ID(request.peer.id))
            await self._swarm.serve_inbound(_raw(stream, source, initiator=False))

    async def run(self) -> None:
        """Hold as many places as wanted, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for relay, addresses in self._candidates():
                    if len(self._held) >= self._limits.relays:
                        break
                    if relay in self._held or relay == self._swarm.self_id:
                        continue
                    granted = await self._reserve(relay, addresses)
                    if granted is not None:
                        nursery.start_soon(self._hold, relay, granted)
                await trio.sleep(self._limits.retry_seconds)

    async def _hold(self, relay: ID, granted: tuple[SwarmConn, float]) -> None:
        """Renew the place at half its time, and when the connection is lost, until that fails."""
        renewed: tuple[SwarmConn, float] | None = granted
        while renewed is not None:
            connection, seconds = renewed
            with trio.move_on_after(seconds / 2):
                await yamux_of(connection).event_closed.wait()
            renewed = await self._reserve(relay, [relay_of(self._held[relay][0])[1]])
        del self._held[relay]
        logger.info("the place at the relay %s is lost", relay)
        self._changed()

    async def _reserve(
        self, relay: ID, addresses: Sequence[Multiaddr]
    ) -> tuple[SwarmConn, float] | None:
        """A place at a relay: over which connection, and for how many seconds; or None."""
        stream: YamuxStream | None = None
        try:
            connection = await self._swarm.connect(relay, addresses, directly=True)
            stream = await negotiate(connection, HOP)
            answer = await _ask(
                stream, HopMessage(type=HopMessage.RESERVE), seconds=MESSAGE_SECONDS
            )
        except (DialError, MuxedStreamError) as error:
            logger.debug("no place at the relay %s: %s", relay, error)
            return None
        finally:
            if stream is not None:
                stream.close_now()
        through = self._through(relay, connection, addresses, answer)
        if answer.status != OK or not through:
            logger.debug("no place at the relay %s: %s", relay, _in_words(answer.status))
            return None
        if self._held.get(relay) != through:
            self._held[relay] = through
            self._changed()
        seconds = answer.reservation.expire - self._clock()
        return connection, min(max(seconds, _SHORTEST_SECONDS), _LONGEST_SECONDS)

    def _through(
        self, relay: ID, connection: SwarmConn, dialled: Sequence[Multiaddr], answer: HopMessage
    ) -> tuple[Multiaddr, ...]:
        """Circuit addresses through a relay: where we found it ourselves, and where it says it is."""
        known = [*connection.get_transport_addresses(), *dialled]
        for raw in answer.reservation.addrs[:_RELAY_ADDRESSES]:
            try:
                known.append(Multiaddr(raw))
            except Exception as error:  # noqa: BLE001 - the parser raises a dozen kinds
                logger.debug("a relay has an address that cannot be read: %r", error)
        direct = dict.fromkeys(without_peer(each) for each in known if not is_circuit(each))
        return tuple(circuit_address(relay, address) for address in direct)[:_RELAY_ADDRESSES]


async def _ask(stream: YamuxStream, request: HopMessage, *, seconds: float) -> HopMessage:
    await send_message(stream, request)
    answer = await receive_message(stream, HopMessage, seconds=seconds)
    if answer.type != HopMessage.STATUS:
        raise MuxedStreamError("it answers something else than it was asked")
    return answer


def _raw(stream: YamuxStream, address: Multiaddr, *, initiator: bool) -> RawConnection:
    return RawConnection(
        CircuitSocket(stream),
        initiator=initiator,
        connection_type=ConnectionType.RELAYED,
        addresses=[address],
    )


def _in_words(status: Status.ValueType) -> str:
    return _REFUSALS.get(status, f"status {status}")
