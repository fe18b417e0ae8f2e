"""``scripts/bench relay``: what a relay costs, on loopback: packets, bulk, and a session's steps.

Two peers and two nodes with the embedded model run in processes of their own, one of each to be dialled
and one behind a relay, which is a process as well; they take turns. No hole is punched on loopback
(``node/libp2p_dcutr.py``), so what is relayed stays so.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio
from petals.inference.checkpoint import open_checkpoint
from petals.node.libp2p_network import Libp2pNetwork
from petals.node.network import Stream

from .local import AUTO
from .loopback_swarm import LoopbackSwarm, loopback_swarm
from .relay_peer import ECHO, SINK, SIZE_BYTES, network
from .report import Report, Row, number
from .settings import Settings
from .swarm import Prompts

MODEL = pathlib.Path("demo")
PACKET = 28 * 1024
"""Bytes of a row of BLOOM-176B's hidden states in 16 bit."""
PIECE = 1024 * 1024
"""Bytes that bulk is sent in at once."""
PROMPT = 32
DIRECTLY, RELAYED = "directly", "over a relay"
START_SECONDS = 60.0


@dataclass(frozen=True)
class Peer:
    """A process of ``relay_peer.py``."""

    peer_id: str
    multiaddrs: Sequence[str]


def run(settings: Settings, report: Report, parts: Sequence[str] | None) -> None:
    """Everything, in turns."""
    if parts:
        raise SystemExit("--part: relay has none")
    trio.run(measure, settings, report)


async def measure(settings: Settings, report: Report) -> None:
    """Start everything, then measure."""
    async with AsyncExitStack() as stack:
        report.say("starting the relay, and a node and a peer on either side of it")
        swarms = {
            DIRECTLY: await stack.enter_async_context(loopback_swarm(MODEL, 1, AUTO.dtype)),
            RELAYED: await stack.enter_async_context(
                loopback_swarm(MODEL, 1, AUTO.dtype, options=("--reachability", "private"))
            ),
        }
        peers = {
            DIRECTLY: await stack.enter_async_context(peer()),
            RELAYED: await stack.enter_async_context(peer(swarms[RELAYED].bootstrap)),
        }
        for multiaddr in peers[RELAYED].multiaddrs:
            assert "/p2p-circuit" in multiaddr, multiaddr
        await first_streams(settings, report, peers)
        ours = await stack.enter_async_context(network(serve=False))
        await packets(settings, report, ours, peers)
        await bulk(settings, report, ours, peers)
        await steps(settings, report, swarms)


@asynccontextmanager
async def peer(*relays: str) -> AsyncIterator[Peer]:
    """One that is reached through the relays, or directly if there are none."""
    scripts = str(pathlib.Path(__file__).parent.parent)
    paths = [scripts, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-P", "-m", "bench_parts.relay_peer", *relays],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = b""
        with trio.fail_after(START_SECONDS):
            while not line.endswith(b"\n"):
                data = await process.stdout.receive_some()
                if not data:
                    raise RuntimeError("a peer did not start; see above")
                line += data
        yield Peer(*json.loads(line))
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def first_streams(settings: Settings, report: Report, peers: dict[str, Peer]) -> None:
    """How long it takes to open a stream to a peer that one knows only the address of."""
    samples: dict[str, list[float]] = {way: [] for way in peers}
    for _ in range(settings.rounds):
        for way, each in peers.items():
            async with network(serve=False) as ours:
                begin = time.perf_counter()
                stream = await opened(ours, each, ECHO)
                samples[way].append(time.perf_counter() - begin)
                await stream.close()
    compare(report, "the first stream to a peer", samples, 1.0, "s")


async def packets(
    settings: Settings, report: Report, ours: Libp2pNetwork, peers: dict[str, Peer]
) -> None:
    """A row there and back, many times."""
    streams = {way: await opened(ours, each, ECHO) for way, each in peers.items()}
    packet = os.urandom(PACKET)
    samples: dict[str, list[float]] = {way: [] for way in peers}
    for turn in range(settings.rounds + 1):
        for way, stream in streams.items():
            for _ in range(settings.round_trips):
                begin = time.perf_counter()
                await stream.send([packet])
                left = PACKET
                while left > 0:
                    left -= len(await received(stream))
                if turn:
                    samples[way].append(time.perf_counter() - begin)
    compare(report, f"{PACKET // 1024} KiB there and back", samples, 1e3, "ms")


async def bulk(
    settings: Settings, report: Report, ours: Libp2pNetwork, peers: dict[str, Peer]
) -> None:
    """Many bytes one way, until the peer says that it has all."""
    streams = {way: await opened(ours, each, SINK) for way, each in peers.items()}
    piece = os.urandom(PIECE)
    samples: dict[str, list[float]] = {way: [] for way in peers}
    for turn in range(settings.rounds + 1):
        for way, stream in streams.items():
            begin = time.perf_counter()
            size = settings.bulk_pieces * PIECE
            await stream.send([size.to_bytes(SIZE_BYTES, "big")])
            for _ in range(settings.bulk_pieces):
                await stream.send([piece])
            await received(stream)
            if turn:
                samples[way].append(size / 1e6 / (time.perf_counter() - begin))
    compare(report, "bulk", samples, 1.0, "MB/s")


async def steps(settings: Settings, report: Report, swarms: dict[str, LoopbackSwarm]) -> None:
    """A token of a session through one node that serves all blocks."""
    prompts = Prompts(open_checkpoint(MODEL).vocab_size)
    samples: dict[str, list[float]] = {way: [] for way in swarms}
    for turn in range(settings.rounds + 1):
        for way, swarm in swarms.items():
            written = await swarm.write(prompts.new(PROMPT), settings.relayed_tokens)
            if turn:
                samples[way].append(written.token)
    compare(report, f"{MODEL} through one node, a token", samples, 1e3, "ms")


async def opened(ours: Libp2pNetwork, each: Peer, protocol: str) -> Stream:
    """A stream to a peer."""
    return await ours.open_stream(each.peer_id, each.multiaddrs, protocol)


async def received(stream: Stream) -> bytes:
    """What comes next."""
    data = await stream.receive()
    if not data:
        raise RuntimeError("the peer has ended the stream")
    return data


def compare(
    report: Report, name: str, samples: dict[str, list[float]], scale: float, unit: str
) -> None:
    """Both ways' medians; the ratio is that over the relay by the direct one."""
    direct, relayed = (statistics.median(samples[way]) * scale for way in (DIRECTLY, RELAYED))
    report.add(Row(f"{name}, {DIRECTLY}", direct, unit))
    report.add(
        Row(f"{name}, {RELAYED}", relayed, unit, f"{DIRECTLY}: {number(direct)}", relayed / direct)
    )
