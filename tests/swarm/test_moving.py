"""A node that moves to other blocks while a session goes through it: the session does not notice."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node import serving
from petals.node.config import NodeConfig
from petals.node.node import Node, wall_clock
from petals.protocol.announcement import PeerState
from petals.protocol.errors import ModelError
from petals.protocol.span import Span
from support.processes import DEADLINE, LOOPBACK, ProcessSwarm, originating, swarm
from support.reference import ReferenceModel

PROMPT = "And they departed from there"
PARAMS = SamplingParams(max_new_tokens=600)
HERE, THERE = Span(3, 6), Span(5, 8)


@pytest.fixture(scope="module")
def processes(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(random_bloom.name, "0:3", str(HERE), "6:8")
        yield running


def config(processes: ProcessSwarm, model: ReferenceModel, folder: Path) -> NodeConfig:
    return NodeConfig(
        model=model.name,
        blocks=HERE,
        bootstrap=(processes.address,),
        listen=(LOOPBACK,),
        data_dir=folder,
    )


@pytest.mark.parametrize("roomy", [True, False], ids=["beside", "instead"])
async def test_a_session_goes_on_when_its_hop_moves(
    random_bloom: ReferenceModel,
    processes: ProcessSwarm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    roomy: bool,
) -> None:
    monkeypatch.setattr(serving, "fits_beside", lambda *_: roomy)
    other = next(node for node in processes.nodes if node.blocks == (HERE.start, HERE.end))
    async with (
        Node(config(processes, random_bloom, tmp_path)) as node,
        originating(processes, random_bloom.name, patience=DEADLINE) as originator,
    ):
        server = node._server
        assert server is not None
        originator._swarm.refused(other.peer_id, wall_clock(), DEADLINE)
        handle = await originator.submit(PROMPT, PARAMS)
        with trio.fail_after(DEADLINE):
            while handle.status().tokens < 10:  # noqa: ASYNC110 - which wakes nobody
                await trio.sleep(0.01)
        assert node.peer_id in {hop.peer_id for hop in handle.status().route}
        originator._swarm.succeeded(other.peer_id)
        before = server.served
        assert before is not None
        await server.move(THERE)
        result = await handle.result()
        assert [list(result.token_ids)] == random_bloom.generate((PROMPT,), PARAMS)
        assert handle.status().recoveries >= 1
        assert (server.span, server.state, server.moving_to) == (THERE, PeerState.ONLINE, None)
        assert server.served is not None
        blocks, old = server.served.engine.blocks, before.engine.blocks
        assert (blocks.module(5) is old.module(5)) is roomy, "what both have is not loaded twice"
        assert before.engine.statistics().sessions == 0


@pytest.mark.parametrize("roomy", [True, False], ids=["beside", "instead"])
async def test_a_node_that_cannot_move_stays(
    random_bloom: ReferenceModel,
    processes: ProcessSwarm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    roomy: bool,
) -> None:
    monkeypatch.setattr(serving, "fits_beside", lambda *_: roomy)
    async with Node(config(processes, random_bloom, tmp_path)) as node:
        server = node._server
        assert server is not None
        with pytest.raises(ModelError, match="8 blocks"):
            await server.move(Span(6, 9))
        assert (server.span, server.state, server.moving_to) == (HERE, PeerState.ONLINE, None)
        announced, _ = await node.describe(node.peer_id, node.multiaddrs)
        assert announced is not None
        assert announced.span == HERE
