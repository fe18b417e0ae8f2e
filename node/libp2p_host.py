"""py-libp2p's host, which finds the handler of a stream and tells peers who we are: kept from falling.

Rules of this file: a handler may fail, and what a peer says of itself may be anything; neither ends the
host. Each override's docstring says what went wrong without it.
"""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import (
    _mk_identify_protobuf,
    _remote_address_to_multiaddr,
)
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.identity.identify_push.identify_push import ID_PUSH as IDENTIFY_PUSH
from libp2p.identity.update import update_peerstore_from_identify
from libp2p.network.connection import swarm_connection
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.utils.varint import encode_varint_prefixed, read_length_prefixed_protobuf
from multiaddr import Multiaddr

from ..protocol.errors import PetalsError
from .libp2p_circuit_addresses import with_peer
from .libp2p_peerstore import ADDRESS_BYTES, ADDRESSES_PER_PEER
from .libp2p_swarm import GuardedSwarm
from .libp2p_yamux import yamux_stream_of

logger = logging.getLogger(__name__)

# It logs at "warning" what is daily life among peers; LIBP2P_DEBUG is the library's own switch.
if not os.environ.get("LIBP2P_DEBUG"):
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
# That module logs to the root logger, which as a side effect would print everybody's log to stderr.
setattr(swarm_connection, "logging", logging.getLogger(swarm_connection.__name__))  # noqa: B010

_IDENTIFY_SECONDS = 5.0
_IDENTIFY_BYTES = 32 * 1024  # the real ones are below 2 KB


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
        except (PetalsError, MuxedStreamError, StreamError) as error:
            # the peer broke a rule or went away: daily life
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
        addresses = [raw for raw in told.listen_addrs if len(raw) <= ADDRESS_BYTES]
        del told.listen_addrs[:]
        told.listen_addrs.extend(addresses[:ADDRESSES_PER_PEER])
        await update_peerstore_from_identify(self.peerstore, peer_id, told)
        connections = self._network.get_connections(peer_id)
        if connections:
            self._identified_peers[peer_id] = reason
        if len(told.observed_addr) <= ADDRESS_BYTES:
            yamux_stream_of(stream).muxed_conn.seen_as = Multiaddr(told.observed_addr)
