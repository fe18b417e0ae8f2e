"""``petals-node status``: who serves which blocks of which model, in a table or as JSON.

``summarise`` turns announcements into plain values; the rest shows them.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

import trio

from ...protocol.announcement import Announcement, PeerState, as_model_name
from ...protocol.span import Span, coverage, gaps
from ..config import NodeConfig
from . import failures, originator

if TYPE_CHECKING:
    from rich.table import Table


def status(config: NodeConfig, *, model: str | None, json_result: bool) -> int:
    """Ask the swarm and show what it says, of one model or of all."""
    name = None
    if model is not None:
        path = Path(model)
        name = as_model_name(path.name if path.is_dir() else model)
    models = summarise(trio.run(_ask, config, name))
    if json_result:
        sys.stdout.write(json.dumps({"models": models}) + "\n")
    else:
        show(models)
    return failures.OK


async def _ask(config: NodeConfig, name: str | None) -> Sequence[Announcement]:
    from ..node import Node

    async with Node(config) as node:
        return await node.swarm_view(name)


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
    online = [
        peer.span for peer in peers if peer.span is not None and peer.state is PeerState.ONLINE
    ]
    return {
        "model": name,
        "fingerprint": fingerprint,
        "num_blocks": num_blocks,
        "coverage": coverage(online, num_blocks),
        "missing": [[gap.start, gap.end] for gap in gaps(online, num_blocks)],
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
        "blocks": [peer.span.start, peer.span.end] if peer.span else None,
        "state": peer.state,
        "dtype": peer.dtype,
        "decode_speed": peer.decode_speed,
        "prefill_speed": peer.prefill_speed,
        "sessions": peer.sessions,
        "cache_tokens_left": peer.cache_tokens_left,
        "version": peer.version,
    }


def show(models: Sequence[dict[str, Any]]) -> None:
    """Write the models for people."""
    from rich.console import Console

    # A pipe has no width: give it enough that no figure is cut off.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not models:
        console.print("No peer serves a model here.", highlight=False)
    for model in models:
        console.print(headline(model), markup=False, highlight=False)
        console.print(_table(model))


def headline(model: dict[str, Any]) -> str:
    """One line about a model: is it whole, and how often is each block there."""
    counts = model["coverage"]
    if model["missing"]:
        spans = ", ".join(str(Span(start, end)) for start, end in model["missing"])
        state = f"cannot run: nobody serves blocks {spans}"
    else:
        state = f"every block served at least {min(counts)}×"
    return (
        f"{model['model']} ({model['fingerprint'][:8]}): {model['num_blocks']} blocks, {state}; "
        f"coverage {' '.join(map(str, counts))}"
    )


def _table(model: dict[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for heading in ("peer", "name", "state", "dtype"):
        table.add_column(heading)
    table.add_column("blocks", justify="right")
    for heading in ("decode", "prefill", "sessions", "cache left"):
        table.add_column(heading, justify="right")
    for peer in model["peers"]:
        blocks = peer["blocks"]
        table.add_row(
            originator.short_peer_id(peer["peer_id"]),
            escape(peer["public_name"] or ""),
            peer["state"],
            peer["dtype"],
            f"{blocks[0]}:{blocks[1]}" if blocks else "",
            _speed(peer["decode_speed"]),
            _speed(peer["prefill_speed"]),
            str(peer["sessions"]),
            f"{peer['cache_tokens_left']} tokens",
        )
    return table


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f} tokens/s" if tokens_per_second else "not measured"
