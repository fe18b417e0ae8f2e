"""Ports: what the node needs of a network, with no word about libp2p.

``libp2p_network.py`` implements them on py-libp2p; tests implement them in memory. A peer id is
libp2p's base58 text; a multiaddr is its text form. Every call that waits takes its deadline from
the implementation's settings or the caller's cancel scope and raises ``PeerError`` when the peer
cannot be reached, never hangs.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class NetworkStatistics:
    """What a network has open and has carried."""

    connections: int
    """Live connections, of both directions."""
    peers: int
    """Peers that they lead to."""
    streams: int
    """Streams not closed by both sides yet, the network's own among them."""
    bytes_sent: Mapping[str, int]
    """Payload by stream protocol."""
    bytes_received: Mapping[str, int]
    """Payload by stream protocol."""
    directory_keys: int
    """Keys of the directory that we hold entries of, for others."""
    directory_peers: int
    """Holders that we know."""


class Stream(Protocol):
    """A bidirectional byte stream to one peer, authenticated and encrypted.

    Safe against cancellation: cancelling a caller of ``send`` or ``receive`` never corrupts the
    connection that the stream shares with others (at worst, this stream is reset).
    """

    @property
    def peer_id(self) -> str:
        """Who is at the other end, as the transport has proved it."""
        ...

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send the buffers in order; returns when they are handed to the transport.

        One caller at a time. Raises PeerError when the stream is broken.
        """
        ...

    def send_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        """``send`` without waiting; False: it may have to wait, or fails, and nothing was sent.

        Not while ``send`` is running.
        """
        ...

    async def receive(self) -> bytes:
        """The next bytes, at least one, or b"" when the peer has closed its side in an orderly way.

        One caller at a time. Raises PeerError when the stream is broken.
        """
        ...

    async def wait(self, take: Callable[[bytes], bool]) -> None:
        """Until ``receive`` would not wait, or ``take`` has returned False.

        Meanwhile ``take`` has what comes, in the turn of the loop in which it comes; it must not
        raise. One caller at a time, of ``receive``, too.
        """
        ...

    async def close(self) -> None:
        """Close both directions. Idempotent, does not raise, bounded in time even if cancelled."""
        ...


StreamHandler = Callable[[Stream], Awaitable[None]]
"""Serves one inbound stream; the network closes the stream when it returns or raises."""


class Network(Protocol):
    """Connections to peers."""

    @property
    def peer_id(self) -> str:
        """Our own peer id."""
        ...

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Where we can be dialled, each with a ``/p2p/<peer id>`` at its end."""
        ...

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of ``protocol`` with ``handler``, each in a task of its own."""
        ...

    async def open_stream(self, peer_id: str, multiaddrs: Sequence[str], protocol: str) -> Stream:
        """Open a stream, over the connection we have or else by dialling the addresses in turn.

        ``multiaddrs`` may be empty (then only an existing connection or a known address will do).
        Raises PeerError if nothing answers in time or the peer does not speak ``protocol``.
        """
        ...

    async def join(self, bootstrap: Sequence[str]) -> int:
        """Connect to bootstrap peers (again, when all connections are lost); how many answered.

        Our own addresses among them are skipped. Raises ConfigError for an address that cannot be
        right.
        """
        ...

    def connected_peers(self) -> tuple[str, ...]:
        """The peers that we have a live connection to."""
        ...

    async def release(self, peer_id: str) -> None:
        """Close the connections to a peer that carry no stream, of either side."""
        ...

    def round_trip(self, peer_id: str) -> float | None:
        """Seconds to a connected peer and back, smoothed; None if not known (yet)."""
        ...

    def statistics(self) -> NetworkStatistics:
        """A snapshot."""
        ...


class Counting(Protocol):
    """What a holder keeps beside the entries, which are bounded; see ``protocol/tally.py``."""

    def count(self, key: bytes, entries: Sequence[bytes], now: float) -> None:
        """These valid entries were written at a key."""
        ...

    def sums(self, key: bytes, now: float) -> bytes | None:
        """What has been counted at a key; None: nothing."""
        ...

    def sweep(self, now: float) -> None:
        """Forget what has expired."""
        ...


class Directory(Protocol):
    """The Kademlia DHT, as far as announcements need it: keys with maps of entries by peer id.

    An entry is opaque bytes to the network except for what the ``merge`` function that the
    directory was built with makes of it.
    """

    async def put(self, key: bytes, entry: bytes) -> int:
        """Merge our signed entry into the map at ``key`` at all closest holders.

        Returns how many holders took it (0: none could be reached; try again later).
        """
        ...

    async def get(self, key: bytes) -> list[bytes]:
        """All valid entries under ``key``, merged over the closest holders (newest per peer)."""
        ...

    async def sums(self, key: bytes) -> list[bytes]:
        """What each of the other closest holders has counted of the entries under ``key``, unverified.

        More than the bounded map shows: of all that were ever written and still hold.
        """
        ...
