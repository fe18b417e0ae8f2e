"""A process that fetches weights, or raw bytes, as often as it is told.

Started by ``weights.py``. Each line of JSON on its input is answered by one on its output: how many
bytes came, and in how many seconds; to remove what was fetched is not counted.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio
from petals.node.identity import new_identity
from petals.node.libp2p_network import Libp2pNetwork, open_network
from petals.node.shard_fetch import Fetching, ShardFetch, fetch_manifest
from petals.node.shard_store import ShardStore
from petals.protocol.announcement import Announcement, PeerState, merge_entries
from petals.protocol.frames import PROTOCOL_VERSION, Hello
from petals.protocol.manifest import ENDS, Manifest
from petals.protocol.swarm import Swarm

from .raw_sender import PROTOCOL

HELLO = Hello(PROTOCOL_VERSION, "bench")


async def main() -> None:
    folder = Path(sys.argv[1])
    async with open_network(
        new_identity(), merge=partial(merge_entries, salt=b"bench"), clock=time.time
    ) as network:
        manifests: dict[str, Manifest] = {}
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            asked = json.loads(line)
            if asked["what"] == "raw":
                begin = time.perf_counter()
                size = await receive(network, asked)
                seconds = time.perf_counter() - begin
            else:
                model = asked["fingerprint"]
                if model not in manifests:
                    manifests[model] = await fetch_manifest(network, giver(asked), model, HELLO)
                size, seconds = await fetch(network, asked, manifests[model], folder)
            answer = {"bytes": size, "seconds": seconds}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


async def receive(network: Libp2pNetwork, asked: dict[str, Any]) -> int:
    """Raw bytes, thrown away."""
    stream = await network.open_stream(asked["peer_id"], [asked["multiaddr"]], PROTOCOL)
    await stream.send([b"%d\n" % asked["bytes"]])
    received = 0
    while received < asked["bytes"]:
        received += len(await stream.receive())
    await stream.close()
    return received


async def fetch(
    network: Libp2pNetwork, asked: dict[str, Any], manifest: Manifest, folder: Path
) -> tuple[int, float]:
    """Blocks until so many bytes, or so many seconds, are full; verified, and onto the disk.

    Returns the bytes and the seconds.
    """

    async def find() -> list[Announcement]:
        return [giver(asked)]

    received, seconds, until = 0, 0.0, time.perf_counter() + asked["seconds"]
    numbers = list(range(ENDS, len(manifest.shards)))
    while received < asked["bytes"] and time.perf_counter() < until:
        with TemporaryDirectory(dir=folder) as fresh:
            begin = time.perf_counter()
            store = ShardStore(Path(fresh), manifest)
            missing, wanted = {}, received
            for number in numbers:
                if wanted < asked["bytes"]:
                    store.open(number)
                    missing[number] = range(manifest.shards[number].num_chunks)
                    wanted += manifest.shards[number].size
            fetching = ShardFetch(
                store,
                network=network,
                swarm=Swarm(network.peer_id),
                hello=HELLO,
                find=find,
                clock=time.time,
                dice=random.Random(),
            )
            progress = Fetching("blocks", wanted - received, 0)
            with trio.move_on_after(max(0.0, until - time.perf_counter())):
                await fetching.run(missing, progress, patience=math.inf)
            received += progress.done
            seconds += time.perf_counter() - begin
    return received, seconds


def giver(asked: dict[str, Any]) -> Announcement:
    """Who has the weights."""
    return Announcement(
        peer_id=asked["peer_id"],
        multiaddrs=(asked["multiaddr"],),
        model=asked["fingerprint"],
        model_name="bench",
        num_blocks=1,
        span=None,
        state=PeerState.ONLINE,
        dtype="none",
        decode_speed=0.0,
        prefill_speed=0.0,
        cache_tokens_left=0,
        sessions=0,
        version="1",
        sequence=1,
        expires_at=time.time() + 300,
    )


if __name__ == "__main__":
    trio.run(main)
