"""What would a node do in its swarm? What ``petals-node doctor`` finds by asking others.

It joins as a node without a model, under a name that is kept nowhere, and leaves again.
"""

import dataclasses
import random  # noqa: TID251 - this is the wiring
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import trio
from huggingface_hub import errors

from ...inference.hub import HubSource, open_source
from ...protocol.announcement import Announcement
from ...protocol.errors import ConfigError, ModelError, PeerError, PetalsError
from ...protocol.placement import choose_span
from ..config import NodeConfig
from ..reachability import Reach
from .findings import Finding, bad, good, note
from .machine import gigabytes, space

if TYPE_CHECKING:
    from ...inference.checkpoint import Checkpoint
    from ..node import Node

MEET = 5.0
"""Seconds to wait for somebody on the local network."""
LOOK_INTERVAL = 0.05
FIND_OUT = 15.0
"""Seconds to wait for peers to dial us back."""


async def swarm(
    config: NodeConfig, folder: Path, peers: list[Announcement], *, listening: bool
) -> AsyncIterator[Finding]:
    """Who can be met, and how we are reached if we may listen; adds those who serve to ``peers``.

    ``folder`` is a data directory that may be thrown away afterwards.
    """
    if not config.bootstrap and not config.looks_around:
        yield note(
            "swarm",
            "no peer is named: a node would begin a swarm of its own",
            "name a peer with --bootstrap, or look on the local network with --mdns",
        )
        return
    visitor = dataclasses.replace(
        config,
        model=None,
        data_dir=folder,
        serve=listening,
        announce=config.announce if listening else (),
        mdns=config.looks_around,
    )
    from ..node import Node

    try:
        async with Node(visitor) as node:
            met = await _meet(node, visitor)
            yield met
            if met.advice is None:
                peers += await node.swarm_view()
                models = sorted({peer.model_name for peer in peers})
                served = (
                    f"{', '.join(models)}; nodes that serve: {len(peers)}" if peers else "nothing"
                )
                yield good("served", served)
                if listening:
                    yield await _reached(node)
    except ConfigError as error:
        yield bad("swarm", str(error))
    except PeerError as error:
        yield bad(
            "swarm",
            str(error),
            "look whether such a peer runs and its address is right (it prints it when it starts), "
            "whether a firewall is between, and whether the swarm has a key (--swarm-key)",
        )


async def _meet(node: "Node", config: NodeConfig) -> Finding:
    until = trio.current_time() + MEET
    while not (met := int(node.statistics()["connections"])):
        if trio.current_time() > until:
            break
        await trio.sleep(LOOK_INTERVAL)
    if met:
        return good("swarm", f"connected to {met} peers")
    where = "at the peers named" if config.bootstrap else "on the local network"
    advice = "name a peer of the swarm with --bootstrap, or begin one with this node"
    return note("swarm", f"nobody was met {where} within {MEET:g} s", advice)


async def _reached(node: "Node") -> Finding:
    with trio.move_on_after(FIND_OUT):
        while node.reachability.reach is Reach.UNKNOWN:
            await node.reachability_changed()
    reachability = node.reachability
    words = reachability.in_words(None).removeprefix("Reachability: ")
    if reachability.reach is Reach.PUBLIC:
        return good("reachability", words)
    return note("reachability", words)


def serving(config: NodeConfig, peers: Sequence[Announcement]) -> list[Finding]:
    """What the node would serve of its model."""
    if config.model is None:
        return [note("blocks", "no model is named (--model): it would be a bootstrap peer")]
    if config.fetched_model is not None:
        said = f"{config.model} is fetched from peers; what fits is known when its config is here"
        return [note("blocks", said)]
    from .. import serving

    try:
        findings = _downloads(config.model)
        if findings is None:
            checkpoint = serving.open_model(config)
            return [_blocks(checkpoint, config, peers)]
    except PetalsError as error:
        return [bad("blocks", str(error))]
    return findings


def _blocks(checkpoint: "Checkpoint", config: NodeConfig, peers: Sequence[Announcement]) -> Finding:
    from ...inference.device import resolve_device
    from ...inference.memory import default_cache_tokens
    from .. import serving

    device = resolve_device(config.device)
    capacity = serving.capacity(checkpoint, config)
    precision = checkpoint.precision(config.dtype, device, config.quantization)
    total = checkpoint.num_blocks
    others = [peer for peer in peers if _is_of(peer, checkpoint)]
    span = capacity.span or choose_span(
        others,
        total,
        capacity.num_blocks,
        random.Random(),  # noqa: S311 - as a node would draw
    )
    tokens = config.cache_tokens or default_cache_tokens(checkpoint, len(span), precision, device)
    block = checkpoint.block_bytes(precision, device)
    return good(
        "blocks",
        f"it would serve {span} of {checkpoint.name}'s {total} blocks, in {capacity.dtype}: "
        f"{gigabytes(block * len(span))} of weights, and cache for {tokens} tokens",
    )


def _is_of(peer: Announcement, checkpoint: "Checkpoint") -> bool:
    """By name where the fingerprint takes all of a large model."""
    from .. import serving

    if checkpoint.quick:
        return peer.model == checkpoint.fingerprint
    return peer.model_name == serving.announced_name(checkpoint)


def _downloads(model: str) -> list[Finding] | None:
    """What of a model of the hub has to be fetched before more can be said; None: nothing."""
    source = open_source(model, cache_dir=None)
    if not isinstance(source, HubSource):
        return None
    sharded = any(
        source.find(name)
        for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    )
    cached = any(
        huggingface_hub.try_to_load_from_cache(model, name)
        for name in ("model.safetensors", "pytorch_model.bin")
    )
    if sharded or cached or source.local_only:
        return None
    try:
        files = huggingface_hub.HfApi().model_info(model, files_metadata=True).siblings or []
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelError(f"{model}: the hub cannot say what files it has: {error}") from error
    sizes = [file.size or 0 for file in files if file.rfilename.endswith((".safetensors", ".bin"))]
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    return [
        space("downloads", cache, max(sizes, default=0), "$HF_HOME"),
        note("blocks", f"{model} is not here yet; what fits is known when it is"),
    ]
