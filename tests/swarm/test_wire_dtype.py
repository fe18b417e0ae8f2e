"""Hidden states that travel in fewer bits: less is sent, and sessions recover all the same."""

from collections.abc import Iterator

import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from support.processes import ProcessSwarm, figures_until, idle, originating, swarm
from support.reference import ReferenceModel

PROMPT = "And it came to pass in those days, that there went out a decree"
PARAMS = SamplingParams(max_new_tokens=60)
MIDDLE = "3:6"
BYTES = "bytes_received /petals/session/1"


@pytest.fixture(scope="module")
def processes(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(random_bloom.name, "0:3", MIDDLE, "6:8", options=["--dtype", "float32"])
        yield running


async def test_fewer_bits_are_fewer_bytes(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    prompt, params = random_bloom.prompt(300), SamplingParams(max_new_tokens=1)
    [expected] = random_bloom.generate((prompt,), params)
    received = {}
    for wire_dtype in ("float32", "bfloat16", "int8"):
        async with originating(processes, random_bloom.name, wire_dtype=wire_dtype) as node:
            before = await figures_until(node, processes.nodes[1], idle)
            generation = await node.generate(prompt, params)
            after = await figures_until(node, processes.nodes[1], idle)
        assert list(generation.token_ids) == expected
        received[wire_dtype] = after[BYTES] - before.get(BYTES, 0)
    assert received["bfloat16"] < 0.6 * received["float32"]
    assert received["int8"] < 0.4 * received["float32"]


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16", "int8"])
async def test_a_session_recovers_in_it(
    random_bloom: ReferenceModel, processes: ProcessSwarm, wire_dtype: str
) -> None:
    async with originating(
        processes, random_bloom.name, wire_dtype=wire_dtype, patience=120.0
    ) as node:
        handle = await node.submit(PROMPT, PARAMS)
        async for _ in handle:
            break
        lost = processes.node(handle.status().route[1].peer_id)
        lost.process.kill()
        processes.nodes.remove(lost)
        await trio.to_thread.run_sync(processes.serve, random_bloom.name, MIDDLE)
        result = await handle.result()
        assert len(result.token_ids) == PARAMS.max_new_tokens
        assert result.recoveries >= 1
