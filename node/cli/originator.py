"""What the originating commands (generate, chat, status) have in common: configuration, figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...inference.sampling_params import SamplingParams
from ..config import NodeConfig
from . import arguments

if TYPE_CHECKING:
    from ..originate import Generation


def node_config(
    *,
    model: str | None,
    bootstrap: Sequence[str] | None,
    dtype: str = "auto",
    wire_dtype: str = "auto",
    device: str = "auto",
) -> NodeConfig:
    """The configuration of a node that serves no blocks, and keeps nothing on the disk."""
    return NodeConfig(
        model=model,
        serve=False,
        bootstrap=arguments.some_bootstrap_peers(bootstrap),
        dtype=dtype,
        wire_dtype=wire_dtype,
        device=device,
    )


def sampling_params(**given: Any) -> SamplingParams:
    """The sampling parameters, with the defaults of ``SamplingParams`` for what was not given."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if "stop" in chosen:
        chosen["stop"] = tuple(chosen["stop"])
    return SamplingParams(**chosen)


def figures(generation: "Generation") -> str:
    """One line about how a generation went, for people."""
    parts = [
        f"{len(generation.token_ids)} tokens",
        f"{generation.tokens_per_second:.1f} tokens/s",
        f"first after {generation.time_to_first_token:.2f} s",
        "route " + route_text(generation.route),
    ]
    if generation.recoveries:
        parts.append(f"{generation.recoveries} recoveries")
    return ", ".join(parts)


def route_text(route: Sequence[Any]) -> str:
    """A route for people: who computes which blocks, in order."""
    return " → ".join(f"{short_peer_id(hop.peer_id)} ({hop.span})" for hop in route)


def short_peer_id(peer_id: str) -> str:
    """The end of a peer id, which is where peer ids differ."""
    return f"…{peer_id[-8:]}"


def result_record(generation: "Generation") -> dict[str, Any]:
    """The JSON object that ``generate --json`` ends with."""
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "tokens_per_second": generation.tokens_per_second,
        "time_to_first_token": generation.time_to_first_token,
        "route": [
            {"peer_id": hop.peer_id, "blocks": [hop.span.start, hop.span.end]}
            for hop in generation.route
        ],
        "recoveries": generation.recoveries,
    }
