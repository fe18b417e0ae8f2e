"""Asking a peer to dial us back, and dialling back who asks (libp2p's AutoNAT, version 1).

The only proof that others can dial a node is that one did. The wire is libp2p's
(github.com/libp2p/specs/blob/master/autonat/autonat-v1.md).

Rules of this file: we dial only the very IP address that the question came from, so that nobody can
make us knock at somebody else's door; few at once, and each peer seldom; the dial ends when the
other side has proved who it is, and is no connection of ours. Whoever asks over a relay is refused,
for its address is the relay's.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

import trio
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr

from .libp2p_negotiation import negotiate, receive_message, send_message
from .libp2p_swarm import DialError, GuardedSwarm
from .libp2p_yamux import yamux_stream_of

logger = logging.getLogger(__name__)

AUTONAT = TProtocol("/libp2p/autonat/1.0.0")


@dataclass(frozen=True)
class DialBackLimits:
    """What is dialled for others, and how long is waited; seconds where they are times."""

    at_once: int = 8
    """Peers that are dialled back at the same time."""
    peer_pause: float = 5.0
    """Between two questions of one peer that are answered."""
    remembered: int = 1000
    """Peers of whom it is known when they asked last."""
    addresses: int = 3
    """Of one peer that are dialled."""
    dial_seconds: float = 4.0
    """For all addresses of one peer."""
    answer_seconds: float = 8.0
    """How long we wait for an answer."""


class DialBack:
    """Both sides of it."""

    def __init__(self, swarm: GuardedSwarm, limits: DialBackLimits) -> None:
        self._swarm = swarm
        self._limits = limits
        self._dialling = 0
        self._asked_at: dict[ID, float] = {}

    async def ask(
        self, connection: SwarmConn, addresses: Sequence[Multiaddr]
    ) -> list[Multiaddr] | None:
        """At which of ``addresses`` a connected peer has dialled us; None if it cannot say.

        It stops at the first one that leads to us.
        """
        question = Message(
            type=Message.DIAL,
            dial=Message.Dial(
                peer=Message.PeerInfo(
                    id=self._swarm.self_id.to_bytes(),
                    addrs=[address.to_bytes() for address in addresses],
                )
            ),
        )
        stream = None
        try:
            stream = await negotiate(connection, AUTONAT)
            await send_message(stream, question)
            answer = await receive_message(stream, Message, seconds=self._limits.answer_seconds)
        except (DialError, MuxedStreamError) as error:
            logger.debug("%s does not dial back: %s", connection.muxed_conn.peer_id, error)
            return None
        finally:
            if stream is not None:
                stream.close_now()
        told = answer.dialResponse
        if answer.type == Message.DIAL_RESPONSE and told.status == Message.E_DIAL_ERROR:
            return []
        if answer.type == Message.DIAL_RESPONSE and told.status == Message.OK:
            return [each for each in addresses if each.to_bytes() == told.addr] or None
        return None

    async def answer(self, net_stream: INetStream) -> None:
        """Dial back the peer that asks, and tell it what came of it."""
        stream = yamux_stream_of(net_stream)
        question = await receive_message(stream, Message)
        peer, remote = stream.muxed_conn.peer_id, stream.get_remote_address()
        relayed = stream.muxed_conn.get_connection_type() is ConnectionType.RELAYED
        reply = Message.DialResponse(status=Message.E_DIAL_REFUSED)
        if remote is not None and not relayed and self._admits(peer):
            wanted = _at(remote[0], question.dial.peer.addrs)[: self._limits.addresses]
            if wanted:
                reply = await self._dial_any(peer, wanted)
        await send_message(stream, Message(type=Message.DIAL_RESPONSE, dialResponse=reply))

    def _admits(self, peer: ID) -> bool:
        now = trio.current_time()
        late = now - self._asked_at.get(peer, -self._limits.peer_pause) >= self._limits.peer_pause
        if not late or self._dialling >= self._limits.at_once:
            return False
        self._asked_at.pop(peer, None)
        self._asked_at[peer] = now
        while len(self._asked_at) > self._limits.remembered:
            del self._asked_at[next(iter(self._asked_at))]
        return True

    async def _dial_any(self, peer: ID, addresses: Sequence[Multiaddr]) -> Message.DialResponse:
        reply = Message.DialResponse(status=Message.E_DIAL_ERROR)
        self._dialling += 1
        try:
            with trio.move_on_after(self._limits.dial_seconds):
                for address in addresses:
                    if await self._swarm.is_there(peer, address):
                        reply = Message.DialResponse(status=Message.OK, addr=address.to_bytes())
                        break
        finally:
            self._dialling -= 1
        return reply


def host_of(address: Multiaddr) -> str | None:
    """The IP address of ``/ip4/…/tcp/…`` or ``/ip6/…/tcp/…``, in its shortest form; else None."""
    parts = list(address.items())
    if [protocol.name for protocol, _ in parts] not in (["ip4", "tcp"], ["ip6", "tcp"]):
        return None
    return str(ip_address(str(parts[0][1])))


def _at(host: str, raw_addresses: Sequence[bytes]) -> list[Multiaddr]:
    """Those of the addresses that are plain TCP at ``host``."""
    wanted = ip_address(host.partition("%")[0])
    mapped = getattr(wanted, "ipv4_mapped", None)
    found = []
    for raw in raw_addresses:
        try:
            address = Multiaddr(raw)
            if host_of(address) == str(mapped or wanted):
                found.append(address)
        except Exception as error:  # noqa: BLE001 - the parser raises a dozen kinds
            logger.debug("an address to dial back that cannot be read: %r", error)
    return list(dict.fromkeys(found))
