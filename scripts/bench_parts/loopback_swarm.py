"""Real processes of ``petals-node run`` on loopback, and a node in this process that originates."""

from __future__ import annotations

import os
import pathlib
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import trio
from petals.inference.checkpoint import open_checkpoint
from petals.inference.sampling_params import SamplingParams
from petals.node.cli.arguments import split_evenly
from petals.node.cli.processes import Child, child
from petals.node.config import NodeConfig
from petals.node.node import Node

from .torch_thread import TORCH

LISTEN = "/ip4/127.0.0.1/tcp/0"
START_DEADLINE = 300.0
"""Seconds until a process serves; loading takes most of it."""


@dataclass
class Written:
    """When the tokens of one session came."""

    begin: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds to the first token, route and prefill included."""
        return self.times[0] - self.begin

    @property
    def token(self) -> float:
        """Seconds a token behind the first one, the median."""
        return statistics.median(
            after - before for before, after in zip(self.times, self.times[1:], strict=False)
        )


class LoopbackSwarm:
    """A swarm of ``processes`` that each serve a part of a model. Made by ``loopback_swarm``."""

    def __init__(
        self, node: Node, servers: Sequence[Mapping[str, Any]], vocabulary: int, bootstrap: str
    ) -> None:
        self._node = node
        self.servers = servers
        """What each process but this one said when it served."""
        self.vocabulary = vocabulary
        self.bootstrap = bootstrap
        """The address of its bootstrap peer."""

    async def write(self, prompt: Sequence[int], tokens: int) -> Written:
        """Generate from a prompt in a session of its own."""
        written = Written()

        def on_tokens(sampled: list[int]) -> list[bool]:
            written.times.append(time.perf_counter())
            return [False] * len(sampled)

        params = SamplingParams(max_new_tokens=tokens)
        async with self._node.open_session(len(prompt) + tokens) as session:
            await session.write([list(prompt)], params, on_tokens)
        return written

    async def write_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Written]:
        """Generate from several prompts at once, each in a session of its own."""
        results: list[Written] = []

        async def write(prompt: Sequence[int]) -> None:
            results.append(await self.write(prompt, tokens))

        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(write, prompt)
        return results


@asynccontextmanager
async def loopback_swarm(
    model: pathlib.Path,
    processes: int,
    dtype: str,
    *,
    among_them: bool = False,
    options: Sequence[str] = (),
) -> AsyncIterator[LoopbackSwarm]:
    """Start ``processes`` nodes that serve; all of them are gone when the block ends.

    With ``among_them``, the first of them is the node in this process, as for whoever serves and has a
    program talk to the same node. Else it only originates, and there is a bootstrap peer. ``options`` are
    given to processes. Each may use all cores: one session keeps only one of them busy at a time.
    """
    checkpoint = open_checkpoint(model)
    spans = split_evenly(checkpoint.num_blocks, processes)
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    with TemporaryDirectory(prefix="petals-bench-") as folder:
        async with AsyncExitStack() as stack:

            async def start(name: str, *options: str) -> Child:
                always = (
                    "--json",
                    "--listen",
                    LISTEN,
                    "--data-dir",
                    str(pathlib.Path(folder, name)),
                )
                running = child(name, ["run", *always, *options], environment)
                return await stack.enter_async_context(running)

            async def our_node(**settings: Any) -> Node:
                config = NodeConfig(model=str(model), dtype=dtype, **settings)
                # On another thread, it and what this process measures beside it would both be slower.
                return await stack.enter_async_context(Node(config, torch_thread=TORCH))

            if among_them:
                own = pathlib.Path(folder, "own")
                node = await our_node(blocks=spans.pop(0), listen=(LISTEN,), data_dir=own)
                address = node.multiaddrs[0]
            else:
                address = (await serving(await start("bootstrap")))["multiaddr"]
            joining = ("--bootstrap", address, "--model", str(model), "--dtype", dtype)
            servers = [
                await start(f"server-{number}", *joining, *options, "--blocks", str(span))
                for number, span in enumerate(spans)
            ]
            said = [await serving(server) for server in servers]
            if not among_them:
                node = await our_node(serve=False, bootstrap=(address,))
            yield LoopbackSwarm(node, said, checkpoint.vocab_size, address)


async def serving(process: Child) -> dict[str, Any]:
    """What a process says when it serves."""
    with trio.fail_after(START_DEADLINE):
        return await process.wait_for("serving")
