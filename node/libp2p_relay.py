"""Being a relay: others that cannot be dialled are reached through this node (circuit relay v2).

A peer *reserves* a place here and keeps its connection to us; whoever wants to reach it *connects*
to us and names it, and we open a stream to it and copy bytes both ways. What is copied is a whole
secured connection between the two: we can neither read nor change it. The wire is libp2p's
(github.com/libp2p/specs/blob/master/relay/circuit-v2.md).

Why not py-libp2p's relay: it finds circuits by peer, so that two to one peer close each other; it
sleeps before it answers; and a source that goes away leaves its circuit until a write fails.

Rules of this file: only connections that lead through no relay themselves are served, so that no
chain of relays, and no loop, can be made; whatever others can make grow has a bound; a circuit ends
when either of its streams does, and then both are closed.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
    CONNECTION_FAILED,
    MALFORMED_MESSAGE,
    NO_RESERVATION,
    OK,
    PERMISSION_DENIED,
    RESERVATION_REFUSED,
    RESOURCE_LIMIT_EXCEEDED,
    HopMessage,
    Reservation,
    Status,
    StopMessage,
)
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as CircuitPeer
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr

from .libp2p_negotiation import MESSAGE_SECONDS, negotiate, receive_message, send_message
from .libp2p_swarm import DialError, GuardedSwarm
from .libp2p_yamux import yamux_stream_of
from .libp2p_yamux_stream import YamuxStream

logger = logging.getLogger(__name__)

HOP = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP = TProtocol("/libp2p/circuit/relay/0.2.0/stop")
_TOLD_ADDRESSES = 8


@dataclass(frozen=True)
class RelayLimits:
    """What a relay does for others. Bytes are not counted: windows bound what is under way."""

    reservations: int = 128
    """Peers that may be reached through us."""
    reservation_seconds: float = 1800.0
    """How long a reservation holds; the peer renews it."""
    circuits: int = 512
    """Circuits in all."""
    source_circuits: int = 64
    """Circuits that one peer may have opened: one for each peer that it wants to reach."""
    target_circuits: int = 128
    """Circuits to one peer: one for each peer that uses it."""


class CircuitRelay:
    """The relay in this node."""

    def __init__(
        self,
        swarm: GuardedSwarm,
        addresses: Callable[[], Sequence[Multiaddr]],
        clock: Callable[[], float],
        limits: RelayLimits,
    ) -> None:
        """``addresses``: where we can be dialled; ``clock``: unix seconds."""
        self._swarm = swarm
        self._addresses = addresses
        self._clock = clock
        self._limits = limits
        self._reserved_until: dict[ID, float] = {}
        self._sources: Counter[ID] = Counter()
        self._targets: Counter[ID] = Counter()

    @property
    def reservations(self) -> int:
        """Peers that are reached through us."""
        return len(self._reserved_until)

    @property
    def circuits(self) -> int:
        """Circuits that are open."""
        return self._targets.total()

    async def serve(self, net_stream: INetStream) -> None:
        """One request of a peer; a circuit lasts as long as this call."""
        stream = yamux_stream_of(net_stream)
        request = await receive_message(stream, HopMessage)
        if stream.muxed_conn.get_connection_type() is ConnectionType.RELAYED:
            await _answer(stream, PERMISSION_DENIED)
        elif request.type == HopMessage.RESERVE:
            await self._reserve(stream)
        elif request.type == HopMessage.CONNECT and request.peer.id:
            await self._connect(stream, ID(request.peer.id))
        else:
            await _answer(stream, MALFORMED_MESSAGE)

    async def _reserve(self, stream: YamuxStream) -> None:
        peer, now = stream.muxed_conn.peer_id, trio.current_time()
        self._forget_the_gone(now)
        if peer not in self._reserved_until and self.reservations >= self._limits.reservations:
            await _answer(stream, RESERVATION_REFUSED)
            return
        self._reserved_until[peer] = now + self._limits.reservation_seconds
        reservation = Reservation(
            expire=math.floor(self._clock() + self._limits.reservation_seconds),
            addrs=[address.to_bytes() for address in self._addresses()[:_TOLD_ADDRESSES]],
        )
        answer = HopMessage(type=HopMessage.STATUS, status=OK, reservation=reservation)
        await send_message(stream, answer)

    async def _connect(self, stream: YamuxStream, target: ID) -> None:
        source = stream.muxed_conn.peer_id
        self._forget_the_gone(trio.current_time())
        if target not in self._reserved_until:
            await _answer(stream, NO_RESERVATION)
            return
        if (
            self.circuits >= self._limits.circuits
            or self._sources[source] >= self._limits.source_circuits
            or self._targets[target] >= self._limits.target_circuits
        ):
            await _answer(stream, RESOURCE_LIMIT_EXCEEDED)
            return
        with self._counted(source, target):
            onward = await self._stop(target, source)
            if onward is None:
                await _answer(stream, CONNECTION_FAILED)
                return
            try:
                await _answer(stream, OK)
                await _copy_both_ways(stream, onward)
            finally:
                onward.close_now()

    async def _stop(self, target: ID, source: ID) -> YamuxStream | None:
        """A stream to ``target`` that it takes for a connection of ``source``, if it does."""
        stream: YamuxStream | None = None
        accepted = False
        try:
            with trio.fail_after(MESSAGE_SECONDS):
                stream = await negotiate(self._swarm.direct(target)[0], STOP)
            request = StopMessage(type=StopMessage.CONNECT, peer=CircuitPeer(id=source.to_bytes()))
            await send_message(stream, request)
            answer = await receive_message(stream, StopMessage)
            accepted = answer.type == StopMessage.STATUS and answer.status == OK
        except (DialError, MuxedStreamError, trio.TooSlowError) as error:
            logger.debug("no circuit to %s: %s", target, error)
        finally:
            if stream is not None and not accepted:
                stream.reset_now("no circuit was made")
        return stream if accepted else None

    @contextmanager
    def _counted(self, source: ID, target: ID) -> Iterator[None]:
        self._sources[source] += 1
        self._targets[target] += 1
        try:
            yield
        finally:
            for counter, peer in ((self._sources, source), (self._targets, target)):
                counter[peer] -= 1
                if not counter[peer]:
                    del counter[peer]

    def _forget_the_gone(self, now: float) -> None:
        """A reservation ends with its time and with the connection that it was made over."""
        for peer, until in list(self._reserved_until.items()):
            if until <= now or not self._swarm.direct(peer):
                del self._reserved_until[peer]


async def _answer(stream: YamuxStream, status: Status.ValueType) -> None:
    await send_message(stream, HopMessage(type=HopMessage.STATUS, status=status))


async def _copy_both_ways(one: YamuxStream, other: YamuxStream) -> None:
    async with trio.open_nursery() as nursery:

        async def copy(source: YamuxStream, sink: YamuxStream) -> None:
            try:
                while data := await source.receive():
                    await sink.write(data)
            except MuxedStreamError as error:
                logger.debug("a circuit broke: %s", error)
                one.reset_now("the circuit broke")
                other.reset_now("the circuit broke")
            nursery.cancel_scope.cancel()

        nursery.start_soon(copy, one, other)
        nursery.start_soon(copy, other, one)
