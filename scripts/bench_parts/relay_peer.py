"""A process with a network and no model: sends back what it is sent, or counts it.

Started by ``relay.py`` with the addresses of the relay through which alone it is to be reached, or with
none if it is to be dialled; writes its peer id and addresses as a line of JSON, and ends with its input.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractAsyncContextManager

import trio
from petals.node.identity import new_identity
from petals.node.libp2p_network import Libp2pNetwork, open_network
from petals.node.network import Stream

LISTEN = "/ip4/127.0.0.1/tcp/0"
ECHO = "/petals-bench/echo/1"
SINK = "/petals-bench/sink/1"
SIZE_BYTES = 8
"""Of the length that is sent to the sink first; it answers with one byte when it has so much."""


def network(*relays: str, serve: bool) -> AbstractAsyncContextManager[Libp2pNetwork]:
    """One on loopback that holds nothing for others; reached through ``relays`` if there are any."""
    return open_network(
        new_identity(),
        merge=lambda *_, **_options: [],
        clock=time.time,
        listen=[LISTEN] if serve else [],
        bootstrap=relays,
        reachability="private" if relays else "public",
    )


async def echo(stream: Stream) -> None:
    """Send back what comes."""
    while data := await stream.receive():
        await stream.send([data])


async def sink(stream: Stream) -> None:
    """Take in as much as is announced, again and again."""
    received = bytearray()
    while data := await stream.receive():
        received += data
        if len(received) >= SIZE_BYTES:
            size = int.from_bytes(received[:SIZE_BYTES], "big")
            left = size - len(received) + SIZE_BYTES
            received.clear()
            while left > 0:
                left -= len(await stream.receive() or b"\0" * left)
            await stream.send([b"."])


async def main() -> None:
    """Tell where we are, and serve."""
    async with network(*sys.argv[1:], serve=True) as ours:
        ours.handle(ECHO, echo)
        ours.handle(SINK, sink)
        sys.stdout.write(json.dumps([ours.peer_id, ours.multiaddrs]) + "\n")
        sys.stdout.flush()
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


if __name__ == "__main__":
    trio.run(main)
