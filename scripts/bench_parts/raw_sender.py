"""A process that sends bytes on a raw stream of the transport: what fetching weights is measured by.

Started by ``weights.py``; writes its address as a line of JSON, and ends with its input.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import trio
from petals.node.identity import new_identity
from petals.node.libp2p_network import open_network
from petals.node.network import Stream
from petals.protocol.announcement import merge_entries

PROTOCOL = "/bench/raw/1"
LISTEN = "/ip4/127.0.0.1/tcp/0"
PIECE = 1 << 20


async def send(stream: Stream) -> None:
    """As many bytes as are asked for, in decimal and a line's end."""
    asked = b""
    while not asked.endswith(b"\n"):
        asked += await stream.receive()
    left, piece = int(asked), bytes(PIECE)
    while left:
        await stream.send([piece[: min(left, PIECE)]])
        left -= min(left, PIECE)


async def main() -> None:
    async with open_network(
        new_identity(),
        merge=partial(merge_entries, salt=b"bench"),
        clock=time.time,
        listen=[LISTEN],
    ) as network:
        network.handle(PROTOCOL, send)
        address = {"peer_id": network.peer_id, "multiaddr": network.multiaddrs[0]}
        sys.stdout.write(json.dumps(address) + "\n")
        sys.stdout.flush()
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


if __name__ == "__main__":
    trio.run(main)
