"""One program: a node that serves originates, too, and may be a hop of its own sessions."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from petals.inference.torch_thread import TorchThread
from petals.node.config import NodeConfig
from petals.node.node import Node
from petals.protocol.span import Span
from support.processes import DEADLINE, LOOPBACK, ProcessSwarm, originating
from support.reference import ReferenceModel

PROMPT = "And it came to pass"
PARAMS = SamplingParams(max_new_tokens=16, repetition_penalty=1.3)


@pytest.mark.parametrize("own", [Span(0, 4), Span(4, 8), Span(0, 8)], ids=str)
async def test_a_serving_node_goes_through_itself_and_others(
    own: Span, demo: ReferenceModel, tmp_swarm: ProcessSwarm, tmp_path: Path
) -> None:
    others = {Span(0, 4): ["4:8"], Span(4, 8): ["0:4"], Span(0, 8): []}[own]
    tmp_swarm.serve("demo", *others)
    config = NodeConfig(
        model="demo",
        blocks=own,
        bootstrap=(tmp_swarm.address,),
        listen=(LOOPBACK,),
        data_dir=tmp_path / "own",
        dtype="float32",
    )
    async with Node(config) as node:
        generation = await node.generate(PROMPT, PARAMS)
        assert [list(generation.token_ids)] == demo.generate((PROMPT,), PARAMS)
        assert generation.recoveries == 0
        assert node.peer_id in {hop.peer_id for hop in generation.route}
        assert len(generation.route) == 1 + len(others)
        with trio.fail_after(DEADLINE):
            while node.statistics()["sessions"]:  # noqa: ASYNC110 - no event tells
                await trio.sleep(0.01)


async def test_a_token_crosses_to_torchs_thread_once(
    demo: ReferenceModel, tmp_swarm: ProcessSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head, sampling and the embedding of what was sampled are one job."""
    tmp_swarm.serve("demo", "0:8")
    jobs: list[object] = []
    run = TorchThread.run

    def counted(thread: TorchThread, function: Callable[[], Any]) -> Future[Any]:
        jobs.append(function)
        return run(thread, function)

    async with originating(tmp_swarm, "demo") as node:
        await node.generate(PROMPT, PARAMS)
        monkeypatch.setattr(TorchThread, "run", counted)
        generation = await node.generate(PROMPT, PARAMS)
    assert len(jobs) == 1 + len(generation.token_ids)  # the prompt's embedding is one, too
