"""What is kept of peers, in bounds: others say of themselves whatever they like, and there are many."""

from collections.abc import Sequence

from libp2p.crypto.keys import KeyPair
from libp2p.peer.envelope import Envelope
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from multiaddr import Multiaddr

ADDRESSES_PER_PEER = 8
"""The most that a dial tries."""
ADDRESS_BYTES = 256
_KNOWN_PEERS = 5000
_PROTOCOLS_PER_PEER = 64
_PROTOCOL_LENGTH = 128


class BoundedPeerStore(PeerStore):
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
        short = [address for address in addrs if len(address.to_bytes()) <= ADDRESS_BYTES]
        super().add_addrs(peer_id, short, ttl)
        if peer_id != self._own_id and peer_id in self.peer_data_map:
            del self.peer_data_map[peer_id].addrs[:-ADDRESSES_PER_PEER]

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Keep a list of usual length."""
        known = len(self.peer_data_map[peer_id].protocols) if peer_id in self.peer_data_map else 0
        short = [protocol for protocol in protocols if len(protocol) <= _PROTOCOL_LENGTH]
        super().add_protocols(peer_id, short[: max(0, _PROTOCOLS_PER_PEER - known)])

    def consume_peer_record(self, envelope: Envelope, ttl: int) -> bool:  # noqa: ARG002
        """Take it and forget it: we have no use for the library's records, which have no bound."""
        return True
