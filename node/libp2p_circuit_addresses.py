"""Circuit addresses: ``/ip4/…/tcp/…/p2p/RELAY/p2p-circuit``, and who is where in them.

Such an address leads through a relay to a peer that cannot be dialled; the peer's own
``/p2p/PEER`` may follow. Only relays that can be dialled themselves count: one circuit never leads
through another.
"""

from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.protocols import P_P2P, P_P2P_CIRCUIT


def is_circuit(address: Multiaddr) -> bool:
    """Whether the address leads through a relay."""
    return any(protocol.code == P_P2P_CIRCUIT for protocol in address.protocols())


def circuit_address(relay: ID, relay_address: Multiaddr) -> Multiaddr:
    """Where to dial who has a reservation at ``relay``, itself dialled at ``relay_address``."""
    return Multiaddr(f"{without_peer(relay_address)}/p2p/{relay}/p2p-circuit")


def relay_of(address: Multiaddr) -> tuple[ID, Multiaddr]:
    """The relay of a circuit address, and where to dial it. Raises ValueError if it names none."""
    before, _, behind = str(without_peer(address)).partition("/p2p-circuit")
    relay_address = Multiaddr(before) if before else None
    peer_id = None if relay_address is None else relay_address.get_peer_id()
    if relay_address is None or not peer_id or behind:
        raise ValueError("a circuit address is /ip4/…/tcp/…/p2p/RELAY/p2p-circuit")
    return ID.from_string(peer_id), without_peer(relay_address)


def without_peer(address: Multiaddr) -> Multiaddr:
    """The address without ``/p2p/PEER`` at its end, so that the same place is dialled once."""
    protocols = list(address.protocols())
    if not protocols or protocols[-1].code != P_P2P:
        return address
    return address.decapsulate_code(P_P2P)


def with_peer(address: Multiaddr, peer: ID) -> Multiaddr:
    """The address with ``/p2p/PEER`` at its end, whatever was there."""
    return Multiaddr(f"{without_peer(address)}/p2p/{peer}")
