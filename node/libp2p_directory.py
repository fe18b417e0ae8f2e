"""The announcements' directory on libp2p's Kademlia: each key holds a map of signed entries.

libp2p's own ``put_value`` lets the last writer win and ``get_value`` returns one value; here every
holder merges what it is sent into what it has, and a reader merges what all the closest holders
say. The wire protocol stays the stock one (``/ipfs/kad/1.0.0``: FIND_NODE, PUT_VALUE, GET_VALUE);
what is ours is the value (a list of entries), what a holder does with it, and the lookups.

What a holder has counted of the entries under a key (``Counting``) it says under that key with ``SUMS``
behind it. Nobody looks that name up: it is asked of those who hold the key.

Rules of this file: an entry is opaque except to ``merge``, which everything goes through, ours and
others', when it arrives and again when it is read (so the expired go); every question to a peer has
a deadline; a peer enters the routing table only when it is known to answer such questions, and
leaves it when it doesn't.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from secrets import SystemRandom
from typing import Protocol

import msgpack
import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import PROTOCOL_ID as KADEMLIA
from libp2p.kad_dht.common import format_time_rfc3339
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError
from libp2p.records.validator import NamespacedValidator, Validator
from multiaddr import Multiaddr

from ..protocol.errors import LocalProtocolError, PeerError, RemoteProtocolError
from .libp2p_negotiation import receive_message, send_message
from .libp2p_yamux_stream import YamuxStream
from .network import Counting

logger = logging.getLogger(__name__)


class MergeEntries(Protocol):
    """Makes one map of entries out of two."""

    def __call__(
        self, existing: list[bytes], incoming: list[bytes], now: float, *, whole: bool = False
    ) -> list[bytes]:
        """The entries to keep, in any order.

        Of ``incoming``, which may be anything, the forged, expired and oversized are dropped; of each
        writer the newest stays; the result fits into a record, unless ``whole`` is asked for.
        """
        ...


OpenStream = Callable[[ID, TProtocol], Awaitable[YamuxStream]]
"""Opens a stream over the connection there is, or dials; raises PeerError in bounded time."""

SUMS = b"/sums"
_NAMESPACE = "petals"
_MAX_KEY_BYTES = 50  # longer ones are never looked up: stock peers take them for no peer id
_KNOWN_SECONDS = 7200  # how long addresses are kept that a peer told us itself
_HEARSAY_SECONDS = 3600  # and that another told us
_MAX_RECORD_BYTES = 256 * 1024  # four times what a merged map should hold
_MAX_ENTRIES = 1024
_MAX_MESSAGE_BYTES = 1024 * 1024
_MAX_REMEMBERED = 256  # keys whose holders are; a model of 80 blocks has ten
_dice = SystemRandom()


@dataclass(frozen=True)
class DirectoryLimits:
    """Bounds and deadlines of the directory, in seconds where they are times."""

    holders: int = 12
    """How many of the closest peers hold a key. All of them may vanish within a minute before an
    entry is lost, since its writer writes it again every 20 s."""
    readers: int = 3
    """How many of them a reader asks, if there are as many as there shall be. Each holds all entries, or, of
    very many, a sample of its own."""
    holders_seconds: float = 600.0
    """How long it is remembered who holds a key, if none of them fails: looking them up costs more than
    writing to them. Only where there are as many holders as there shall be: in a smaller swarm
    everybody who comes is one more."""
    parallel: int = 10
    """Questions in flight in one lookup."""
    question_seconds: float = 3.0
    """For one question to one peer, dialling it included."""
    lookup_seconds: float = 10.0
    """For a whole put or get; what is known by then is what it returns."""
    handler_seconds: float = 30.0
    """How long a peer may keep a stream of questions open."""
    streams: int = 64
    """Inbound question streams served at once; more are refused."""
    stored_keys: int = 1024
    """Keys that we hold entries of, for others; new ones are refused beyond it. Each can grow to the
    64 KiB of a record, so that all are 64 MiB at most; a model of 80 blocks has eleven."""
    refresh_seconds: float = 60.0
    """Between lookups that keep the routing table fresh."""


class _MergingStore(ValueStore):
    """What this node holds for others."""

    def __init__(
        self,
        host: IHost,
        merge: MergeEntries,
        counting: Counting | None,
        clock: Callable[[], float],
        limits: DirectoryLimits,
    ) -> None:
        super().__init__(host, host.get_id())
        self._merge, self._counting = merge, counting
        self._clock, self._limits = clock, limits
        self._entries: dict[bytes, list[bytes]] = {}
        self._merged_at: dict[bytes, float] = {}

    def put_record(self, key: bytes, record: Record) -> None:
        """Merge the entries of an incoming record; raises if none of them is acceptable."""
        self.merge_in(key, unpack_record(record.value))

    def merge_in(self, key: bytes, incoming: list[bytes]) -> None:
        """Merge ``incoming`` into the map; raises RemoteProtocolError if nothing of it is valid."""
        now = self._clock()
        acceptable = self._merge([], incoming, now)
        if not acceptable:
            raise RemoteProtocolError("no entry of the record is valid")
        if key not in self._entries and len(self._entries) >= self._limits.stored_keys:
            raise RemoteProtocolError("no room for another key")
        self._replace(key, self._merge(self._entries.get(key, []), acceptable, now), now)
        if self._counting is not None:
            self._counting.count(key, acceptable, now)

    def get(self, key: bytes) -> Record | None:
        """The live entries as one record, or what has been counted of them; or None."""
        value = self._value(key)
        if value is None:
            return None
        return Record(key=key, value=value, timeReceived=format_time_rfc3339())

    def _value(self, key: bytes) -> bytes | None:
        if key.endswith(SUMS):
            if self._counting is None:
                return None
            return self._counting.sums(key.removesuffix(SUMS), self._clock())
        entries = self.live(key)
        return pack_record(entries) if entries else None

    def live(self, key: bytes) -> list[bytes]:
        """The entries, without those that had expired a second ago: merging verifies signatures."""
        now = self._clock()
        if key in self._entries and now >= self._merged_at[key] + 1:
            self._replace(key, self._merge(self._entries[key], [], now), now)
        return self._entries.get(key, [])

    def sweep(self) -> None:
        """Drop what has expired."""
        for key in list(self._entries):
            self.live(key)
        if self._counting is not None:
            self._counting.sweep(self._clock())

    def size(self) -> int:
        """How many keys there are."""
        return len(self._entries)

    def _replace(self, key: bytes, entries: list[bytes], now: float) -> None:
        self._entries.pop(key, None)
        self._merged_at.pop(key, None)
        if entries:
            self._entries[key], self._merged_at[key] = entries, now


class _RefusingProviders(ProviderStore):
    """We have no use for provider records, and nothing bounds them."""

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Drop it."""


class _EntryValidator(Validator):
    """Lets the store's merge decide: the library would choose one value and drop the other."""

    def validate(self, key: str, value: bytes) -> None:  # noqa: ARG002 - the library's signature
        """Raise if the value is not a list of entries."""
        unpack_record(value)

    def select(self, key: str, values: list[bytes]) -> int:  # noqa: ARG002 - the same
        """The newest, which the store merges into what it has."""
        return len(values) - 1


class _Kademlia(KadDHT):
    """The library's answering half, without what it does by itself."""

    def __init__(
        self, host: IHost, mode: DHTMode, store: _MergingStore, limits: DirectoryLimits
    ) -> None:
        self._limits = limits
        super().__init__(
            host,
            mode,
            validator=NamespacedValidator({_NAMESPACE: _EntryValidator()}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
            max_peers_per_subnet=0,  # many nodes on one machine or LAN are normal here
        )
        self.value_store = store
        self.provider_store = _RefusingProviders(host=host, peer_routing=self.peer_routing)
        self._inbound_limiter = trio.CapacityLimiter(limits.streams)

    async def handle_stream(self, stream: INetStream) -> None:
        """With a deadline: a peer that asks nothing would hold its place for ever."""
        with trio.move_on_after(self._limits.handler_seconds):
            await super().handle_stream(stream)

    async def add_peer(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        """Only peers that say they answer: the library lets whoever asks displace holders."""
        del skip_server_mode_check
        try:
            protocols = self.host.get_peerstore().get_protocols(peer_id)
        except PeerStoreError:
            return False
        if str(KADEMLIA) not in protocols:
            return False
        return await super().add_peer(peer_id)


class Libp2pDirectory:
    """The ``Directory`` port."""

    def __init__(
        self,
        host: IHost,
        open_stream: OpenStream,
        *,
        merge: MergeEntries,
        counting: Counting | None,
        serve: bool,
        clock: Callable[[], float],
        limits: DirectoryLimits | None = None,
    ) -> None:
        self._host = host
        self._open_stream = open_stream
        self._merge = merge
        self._clock = clock
        self._limits = limits or DirectoryLimits()
        self._serves = serve
        self._remembered: dict[bytes, tuple[list[ID], float]] = {}
        """Who holds a key, and until when that is believed."""
        self._store = _MergingStore(host, merge, counting, clock, self._limits)
        mode = DHTMode.SERVER if serve else DHTMode.CLIENT
        self._kademlia = _Kademlia(host, mode, self._store, self._limits)
        self._table = self._kademlia.routing_table

    def hold(self, wanted: bool) -> None:  # noqa: FBT001 - a switch
        """Hold entries for others, or stop: who cannot be dialled only keeps them waiting."""
        self._serves = wanted
        self._kademlia.mode = DHTMode.SERVER if wanted else DHTMode.CLIENT
        if wanted:
            self._host.set_stream_handler(KADEMLIA, self._kademlia.handle_stream)
        else:
            self._host.remove_stream_handler(KADEMLIA)

    async def put(self, key: bytes, entry: bytes) -> int:
        """Merge our entry into the map at ``key``; how many other holders took it."""
        _check_key(key)
        request = Message(
            type=Message.MessageType.PUT_VALUE,
            key=key,
            record=Record(key=key, value=pack_record([entry])),
        )
        taken = 0

        async def store_at(peer: ID) -> None:
            nonlocal taken
            reply = await self._ask(peer, request)
            if reply is not None and reply.key == key:
                taken += 1
            else:
                self._remembered.pop(key, None)

        with trio.move_on_after(self._limits.lookup_seconds):
            holders = await self._holders(key)
            if self._serves and self._among_closest(key, holders):
                self._store.merge_in(key, [entry])
            async with trio.open_nursery() as nursery:
                for peer in holders:
                    nursery.start_soon(store_at, peer)
        return taken

    async def get(self, key: bytes) -> list[bytes]:
        """All valid entries under ``key``, merged over the closest holders."""
        _check_key(key)
        found: dict[bytes, None] = {}  # most holders say the same; each entry is verified once

        def collect(value: bytes) -> None:
            try:
                found.update(dict.fromkeys(unpack_record(value)))
            except RemoteProtocolError as error:
                logger.debug("a holder sent a bad record: %s", error)

        with trio.move_on_after(self._limits.lookup_seconds):
            holders = await self._holders(key)
            # others each time: of very many each holds a sample of its own, and some may hold back
            drawn = _dice.sample(holders, len(holders))
            all_hold = len(holders) >= self._limits.holders
            few = self._limits.readers if all_hold else len(holders)
            await self._read(key, key, drawn[:few], collect)
            if not found:
                await self._read(key, key, drawn[few:], collect)
        return self._merge(self._store.live(key), list(found), self._clock(), whole=True)

    async def sums(self, key: bytes) -> list[bytes]:
        """What each of the other holders of ``key`` has counted there, unverified."""
        _check_key(key)
        found: list[bytes] = []
        with trio.move_on_after(self._limits.lookup_seconds):
            await self._read(key, key + SUMS, await self._holders(key), found.append)
        return found

    async def _read(
        self, key: bytes, asked: bytes, holders: Sequence[ID], collect: Callable[[bytes], None]
    ) -> None:
        """Ask holders of ``key`` for the value at ``asked``."""
        question = Message(type=Message.MessageType.GET_VALUE, key=asked)

        async def ask(peer: ID) -> None:
            reply = await self._ask(peer, question)
            if reply is None:
                self._remembered.pop(key, None)
            elif reply.HasField("record") and reply.record.key == asked:
                collect(reply.record.value)

        async with trio.open_nursery() as nursery:
            for peer in holders:
                nursery.start_soon(ask, peer)

    async def _holders(self, key: bytes) -> list[ID]:
        """The closest other peers to a key, the closest first, as they were found out lately."""
        holders, until = self._remembered.get(key, ([], 0.0))
        if trio.current_time() >= until:
            holders = await self._lookup(key)
            self._remembered.pop(key, None)
            if len(holders) >= self._limits.holders:
                until = trio.current_time() + self._limits.holders_seconds
                self._remembered[key] = holders, until
                if len(self._remembered) > _MAX_REMEMBERED:
                    del self._remembered[next(iter(self._remembered))]
        return holders

    async def met(self, peer_id: ID) -> None:
        """A peer is connected and identified: if it answers questions, remember it.

        Without this a bootstrap peer knows nobody until it has been asked something.
        """
        await self._kademlia.add_peer(peer_id)

    async def run(self) -> None:
        """Keep the routing table fresh and drop expired entries, until cancelled."""
        while True:
            await trio.sleep(self._limits.refresh_seconds)
            try:
                for peer_id in self._host.get_connected_peers():
                    # The library forgets after two hours what a peer said when it connected.
                    if addresses := self._addresses(peer_id):
                        self._host.get_peerstore().add_addrs(peer_id, addresses, _KNOWN_SECONDS)
                self._store.sweep()
                await self.refresh()
            except Exception:
                logger.exception("refreshing the directory failed")

    async def refresh(self) -> None:
        """Look ourselves up, which fills the routing table with our neighbours."""
        name = self._host.get_id().to_bytes()
        with trio.move_on_after(self._limits.lookup_seconds):
            await self._lookup(name)

    @property
    def stored_keys(self) -> int:
        """How many keys we hold entries of."""
        return self._store.size()

    @property
    def known_peers(self) -> int:
        """How many peers the routing table holds."""
        return self._table.size()

    def _among_closest(self, name: bytes, holders: Sequence[ID]) -> bool:
        ranked = sort_peer_ids_by_distance(name, [*holders, self._host.get_id()])
        return self._host.get_id() in ranked[: self._limits.holders]

    async def _lookup(self, name: bytes) -> list[ID]:
        """Ask ever closer peers until the closest ones have all answered; return those."""
        question = Message(type=Message.MessageType.FIND_NODE, key=name)
        known = set(self._table.find_local_closest_peers(name, self._limits.holders * 2))
        answered: set[ID] = set()
        asked: set[ID] = set()

        async def ask(peer: ID) -> None:
            reply = await self._ask(peer, question)
            if reply is None:
                self._table.remove_peer(peer)
                known.discard(peer)
                return
            answered.add(peer)
            known.update(self._introduced(reply) - asked)
            await self._table.add_peer(peer, skip_server_mode_check=True)

        while True:
            best = sort_peer_ids_by_distance(name, list(known))[: self._limits.holders]
            batch = [peer for peer in best if peer not in asked][: self._limits.parallel]
            if not batch:
                return [peer for peer in best if peer in answered]
            asked.update(batch)
            async with trio.open_nursery() as nursery:
                for peer in batch:
                    nursery.start_soon(ask, peer)

    def _introduced(self, reply: Message) -> set[ID]:
        """The peers that a reply names, their addresses noted."""
        introduced = set()
        for peer in list(reply.closerPeers)[: self._limits.holders * 2]:
            try:
                peer_id = ID(peer.id)
                addresses = [Multiaddr(address) for address in list(peer.addrs)[:8]]
            except Exception as error:  # noqa: BLE001 - the parser raises a dozen kinds
                logger.debug("a holder introduced a peer that cannot be read: %r", error)
                continue
            if peer_id == self._host.get_id():
                continue
            if not self._addresses(peer_id):  # what it said itself counts for more
                self._host.get_peerstore().add_addrs(peer_id, addresses, _HEARSAY_SECONDS)
            introduced.add(peer_id)
        return introduced

    def _addresses(self, peer_id: ID) -> list[Multiaddr]:
        try:
            return self._host.get_peerstore().addrs(peer_id)
        except PeerStoreError:
            return []

    async def _ask(self, peer: ID, question: Message) -> Message | None:
        """One question to one peer, or None if it does not answer properly in time."""
        stream = None
        with trio.move_on_after(self._limits.question_seconds):
            try:
                stream = await self._open_stream(peer, KADEMLIA)
                await send_message(stream, question)
                reply = await receive_message(
                    stream, Message, limit=_MAX_MESSAGE_BYTES, seconds=self._limits.question_seconds
                )
            except Exception as error:  # noqa: BLE001 - a peer may send anything, or vanish
                if not isinstance(error, PeerError):
                    logger.debug("%s did not answer: %r", peer, error)
            else:
                return reply if reply.type == question.type else None
            finally:
                if stream is not None:
                    stream.close_now()
        return None


def pack_record(entries: Sequence[bytes]) -> bytes:
    """A record's value: a msgpack list of entries."""
    return bytes(msgpack.packb(list(entries)))


def unpack_record(value: bytes) -> list[bytes]:
    """The entries of a record's value; raises RemoteProtocolError if it is anything else."""
    if len(value) > _MAX_RECORD_BYTES:
        raise RemoteProtocolError(
            f"a record has at most {_MAX_RECORD_BYTES} bytes, not {len(value)}"
        )
    try:
        entries = msgpack.unpackb(value, max_array_len=_MAX_ENTRIES, max_map_len=0, max_ext_len=0)
    except Exception as error:
        raise RemoteProtocolError(f"a record that is not msgpack: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, bytes) for entry in entries):
        raise RemoteProtocolError("a record that is not a list of entries")
    return entries


def _check_key(key: bytes) -> None:
    if not key.startswith(f"/{_NAMESPACE}/".encode()) or len(key) > _MAX_KEY_BYTES:
        raise LocalProtocolError(
            f"{key!r} is no key of the directory: they begin with /{_NAMESPACE}/ and have at most "
            f"{_MAX_KEY_BYTES} bytes"
        )
