"""What the swarm says of itself, summed up by model in plain values.

The same for everybody who shows it: ``petals-node status --json`` and the HTTP API write them as they
are, the command line and the web page draw them.
"""

from collections.abc import Iterable, Sequence
from statistics import mode
from typing import Any

from ..protocol.announcement import Announcement, PeerState
from ..protocol.placement import block_throughput
from ..protocol.span import coverage, gaps

Models = Sequence[dict[str, Any]]


def reachability(multiaddrs: Sequence[str]) -> str:
    """Whether others dial a node directly, or only through a relay; it may have no address at all."""
    if not multiaddrs:
        return "none"
    return "relayed" if all("/p2p-circuit" in address for address in multiaddrs) else "direct"


def summarise(announcements: Iterable[Announcement]) -> list[dict[str, Any]]:
    """The models that are served, by name, each with its coverage and its peers in block order.

    Two fingerprints under one name are two models. Only peers that are online count as coverage.
    """
    by_model: dict[tuple[str, str], list[Announcement]] = {}
    for announcement in announcements:
        key = (announcement.model_name, announcement.model)
        by_model.setdefault(key, []).append(announcement)
    return [
        _summarise_model(name, fingerprint, peers)
        for (name, fingerprint), peers in sorted(by_model.items())
    ]


def _summarise_model(name: str, fingerprint: str, peers: list[Announcement]) -> dict[str, Any]:
    num_blocks = mode(peer.num_blocks for peer in peers)  # one peer may say anything
    serving = [peer for peer in peers if peer.state is PeerState.ONLINE]
    online = [peer.span for peer in serving if peer.span is not None]
    return {
        "model": name,
        "fingerprint": fingerprint,
        "num_blocks": num_blocks,
        "coverage": coverage(online, num_blocks),
        "missing": [[gap.start, gap.end] for gap in gaps(online, num_blocks)],
        "throughput": block_throughput(serving, num_blocks),
        "peers": [_summarise_peer(peer) for peer in sorted(peers, key=_by_blocks)],
    }


def _by_blocks(peer: Announcement) -> tuple[int, int, str]:
    span = peer.span
    return (span.start, span.end, peer.peer_id) if span else (1 << 30, 0, peer.peer_id)


def _summarise_peer(peer: Announcement) -> dict[str, Any]:
    return {
        "peer_id": peer.peer_id,
        "public_name": peer.public_name,
        "multiaddrs": list(peer.multiaddrs),
        "reachability": reachability(peer.multiaddrs),
        "blocks": [peer.span.start, peer.span.end] if peer.span else None,
        "state": peer.state,
        "dtype": peer.dtype,
        "decode_speed": peer.decode_speed,
        "prefill_speed": peer.prefill_speed,
        "sessions": peer.sessions,
        "session_blocks": peer.session_blocks,
        "cache_tokens_left": peer.cache_tokens_left,
        "version": peer.version,
    }
