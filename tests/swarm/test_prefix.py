"""Sessions that begin alike: the second one need not compute what the first one has."""

from collections.abc import Iterator

import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.node import Node
from petals.protocol.prefix import PREFIX_ROWS
from support.processes import Figures, ProcessSwarm, figures_until, idle, originating, swarm
from support.reference import ReferenceModel

SPANS = ("0:3", "3:6", "6:8")
LENGTH = 230
"""Tokens of the prompt: seven boundaries, and some rows behind the last one."""
REUSED = LENGTH // PREFIX_ROWS * PREFIX_ROWS
PARAMS = SamplingParams(max_new_tokens=16)


@pytest.fixture(scope="module")
def processes(
    tmp_path_factory: pytest.TempPathFactory, random_bloom: ReferenceModel
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(random_bloom.name, *SPANS, options=["--dtype", "float32"])
        yield running


async def figures(node: Node, processes: ProcessSwarm) -> list[Figures]:
    """Every hop's, once no session is open there."""
    return [await figures_until(node, process, idle) for process in processes.nodes]


async def test_the_same_prompt_again_reuses_every_hops_rows(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    prompt = random_bloom.prompt(LENGTH)
    [expected] = random_bloom.generate((prompt,), PARAMS)
    async with originating(processes, random_bloom.name) as node:
        first = await node.generate(prompt, PARAMS)
        before = await figures(node, processes)
        assert list(first.token_ids) == expected
        assert [each["prefix_hits"] for each in before] == [0, 0, 0]
        assert all(each["prefix_tokens"] >= REUSED for each in before)
        assert all(each["cache_tokens_used"] == 0 for each in before)

        second = await node.generate(prompt, PARAMS)
        after = await figures(node, processes)
        assert list(second.token_ids) == expected
    for old, new in zip(before, after, strict=True):
        assert new["prefix_hits"] == 1
        assert new["prefix_tokens_reused"] == REUSED
        assert new["rows"] - old["rows"] == LENGTH - REUSED + PARAMS.max_new_tokens - 1


async def test_another_originator_and_another_end_of_the_prompt(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    """What is shared is what begins alike, whoever asks; the rest is computed."""
    shared = random_bloom.prompt(LENGTH)
    async with originating(processes, random_bloom.name) as node:
        await node.generate(shared, PARAMS)
        before = await figures(node, processes)
    other = shared[: len(shared) // 2] + " and they said unto him, Who art thou? " * 4
    [expected] = random_bloom.generate((other,), PARAMS)
    async with originating(processes, random_bloom.name) as node:
        generation = await node.generate(other, PARAMS)
        after = await figures(node, processes)
    assert list(generation.token_ids) == expected
    for old, new in zip(before, after, strict=True):
        reused = new["prefix_tokens_reused"] - old["prefix_tokens_reused"]
        assert PREFIX_ROWS <= reused < REUSED


async def test_a_hop_lost_in_a_session_that_reuses_rows(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    """The replacement has nothing to reuse: its predecessor replays what it was itself spared."""
    prompt, params = random_bloom.prompt(LENGTH), SamplingParams(max_new_tokens=60)
    async with originating(processes, random_bloom.name, patience=120.0) as node:
        await node.generate(prompt, PARAMS)
        handle = await node.submit(prompt, params)
        async for _ in handle:
            break
        lost = processes.node(handle.status().route[1].peer_id)
        lost.process.kill()
        processes.nodes.remove(lost)
        await trio.to_thread.run_sync(processes.serve, random_bloom.name, SPANS[1])
        result = await handle.result()
        assert [list(result.token_ids)] == random_bloom.generate((prompt,), params)
        assert result.recoveries >= 1
