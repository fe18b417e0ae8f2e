"""``petals-node seed``: give a model to whoever knows its fingerprint."""

from typing import TYPE_CHECKING, Any

from ...protocol.manifest import SCHEME

if TYPE_CHECKING:
    from ..node import Node


def seeding_event(node: "Node") -> dict[str, Any]:
    """What is said once others can have the model."""
    return {
        "event": "seeding",
        "peer_id": node.peer_id,
        "multiaddr": next(iter(node.multiaddrs), None),
        "model": node.model_name,
        "fingerprint": node.fingerprint,
        "bytes": node.model_bytes,
    }


def seeding_in_words(event: dict[str, Any]) -> str:
    """The same for people: how the others get it."""
    address = event["multiaddr"]
    join = "" if address is None else f" --bootstrap {address}"
    return (
        f"Giving {event['model']} ({event['bytes'] / 1e6:.1f} MB) to whoever asks. Others serve it with\n"
        f"  petals-node run --model {SCHEME}{event['fingerprint']}{join}"
    )
