"""A process that sends and receives raw bytes over py-libp2p as it comes, with nothing of ours below it.

Started twice by ``weights.py``: what fetching weights is measured by. Writes its address as a line of
JSON; each line on its input says from which address how many bytes are to be fetched, and is answered
like those of ``weights_worker.py``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

PROTOCOL = TProtocol("/bench/raw/1")
LISTEN = Multiaddr("/ip4/127.0.0.1/tcp/0")
READ = 1 << 20
WRITE = 65507
"""A Yamux frame that fills one message of Noise: half as fast again as longer writes, of which the
library makes frames that take two."""


def library_host() -> IHost:
    """The library's own host, with the protocols that ours speaks too."""
    keys = create_new_key_pair()
    noise = NoiseTransport(keys, noise_privkey=new_x25519_key_pair().private_key)
    return new_host(keys, sec_opt={NOISE: noise}, muxer_opt={TProtocol(YAMUX): Yamux})


async def send(stream: INetStream) -> None:
    """As many bytes as are asked for, in decimal and a line's end."""
    asked = b""
    while not asked.endswith(b"\n"):
        asked += await stream.read(READ)
    left, piece = int(asked), bytes(WRITE)
    while left:
        await stream.write(piece[: min(left, WRITE)])
        left -= min(left, WRITE)
    await stream.close()


async def receive(host: IHost, asked: dict[str, Any]) -> int:
    """Raw bytes, thrown away."""
    peer = info_from_p2p_addr(Multiaddr(asked["multiaddr"]))
    await host.connect(peer)  # nothing, if it is connected
    stream = await host.new_stream(peer.peer_id, [PROTOCOL])
    await stream.write(b"%d\n" % asked["bytes"])
    received = 0
    while received < asked["bytes"]:
        received += len(await stream.read(READ))
    await stream.close()
    return received


async def main() -> None:
    host = library_host()
    async with host.run([LISTEN]):
        host.set_stream_handler(PROTOCOL, send)
        sys.stdout.write(json.dumps({"multiaddr": str(host.get_addrs()[0])}) + "\n")
        sys.stdout.flush()
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            begin = time.perf_counter()
            size = await receive(host, json.loads(line))
            answer = {"bytes": size, "seconds": time.perf_counter() - begin}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main)
