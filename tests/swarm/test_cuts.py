"""Connections that break between processes that live: nothing is computed again."""

from collections.abc import Callable
from functools import partial

import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.generation import GenerationHandle
from petals.node.ring import Ring
from petals.protocol.chain import ChainState
from support.processes import (
    DEADLINE,
    ProcessSwarm,
    figures_of,
    figures_until,
    idle,
    originating,
)
from support.proxies import proxies
from support.reference import ReferenceModel

SPANS = ("0:4", "4:8")
ONE = ("And it came to pass in those days",)
FOUR = ("The king", "Who art thou, lord of the house?", "In the beginning was a word", "Behold")
# Long enough for the fastest session to be under way when the slowest has come to the last cut.
GREEDY = SamplingParams(max_new_tokens=160)
SEEDED = SamplingParams(max_new_tokens=160, temperature=0.8, top_p=0.95, seed=5)
SESSIONS = [(ONE, GREEDY), (FOUR, GREEDY), (ONE, SEEDED), (FOUR, SEEDED)]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE):
        while not condition():  # noqa: ASYNC110 - what it looks at wakes nobody
            await trio.sleep(0.01)


async def until_each_has(handles: list[GenerationHandle], tokens: int) -> None:
    await until(lambda: all(handle.status().tokens >= tokens for handle in handles))


def all_mended(rings: list[Ring], cuts: int) -> bool:
    return all(ring.reconnects >= cuts and ring.state is ChainState.RUNNING for ring in rings)


def ring_of(handle: GenerationHandle) -> Ring:
    session = handle._session
    assert session is not None and session.ring is not None
    return session.ring


async def test_connections_that_are_cut_cost_a_pause_and_nothing_else(
    random_bloom: ReferenceModel, tmp_swarm: ProcessSwarm
) -> None:
    """The first hop's (ours to it), then the second's (ours, and the first one's), then both."""
    model = random_bloom
    async with proxies(*SPANS) as running:
        await trio.to_thread.run_sync(tmp_swarm.serve_behind, running, model.name)
        async with originating(tmp_swarm, model.name, patience=60.0) as node:
            before = [await figures_of(node, hop) for hop in tmp_swarm.nodes]
            handles = [await node.submit(prompts, params) for prompts, params in SESSIONS]
            await until_each_has(handles, 1)
            rings = [ring_of(handle) for handle in handles]
            first, second = running.values()
            for number, cut in enumerate([(first,), (second,), (first, second)], start=1):
                await until_each_has(handles, 10 * number)
                for proxy in cut:
                    assert proxy.cut() > 0
                # A cut before the last one is mended would be a hop that cannot be reached.
                await until(partial(all_mended, rings, number))
            rows = 0
            for handle, (prompts, params) in zip(handles, SESSIONS, strict=True):
                results = await handle.results()
                assert [list(result.token_ids) for result in results] == model.generate(
                    prompts, params
                )
                assert results[0].recoveries == 0
                lengths = [len(ids) for ids in model.tokenizer(list(prompts))["input_ids"]]
                rows += sum(lengths) + len(lengths) * (params.max_new_tokens - 1)
            for hop, then in zip(tmp_swarm.nodes, before, strict=True):
                now = await figures_until(node, hop, idle)
                assert now["rows"] - then["rows"] == rows
