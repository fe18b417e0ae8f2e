"""Whom the weights have come from, in words and as an event."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..shard_fetch import Fetching


def fetched_event(fetched: Sequence[Fetching]) -> dict[str, Any]:
    """What has come from whom."""
    received: Counter[str] = Counter()
    for each in fetched:
        received.update(each.received)
    return {
        "event": "fetched",
        "bytes": sum(each.total for each in fetched),
        "kept": sum(each.kept for each in fetched),
        "from": {peer_id or "fallback": size for peer_id, size in received.most_common()},
    }


def fetched_in_words(event: dict[str, Any]) -> str:
    """The same for people."""
    givers = ", ".join(
        f"{_megabytes(size)} from {_giver(peer_id)}" for peer_id, size in event["from"].items()
    )
    kept = f"{_megabytes(event['kept'])} were on the disk" if event["kept"] else ""
    parts = "; ".join(part for part in (givers, kept) if part)
    return f"Has {_megabytes(event['bytes'])} of weights and files: {parts}"


def _giver(peer_id: str) -> str:
    return "the fallback" if peer_id == "fallback" else f"…{peer_id[-8:]}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
