"""Hops that answer with what cannot be: they are replaced, and not used again where that is certain."""

import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.config import NodeConfig
from petals.node.frame_stream import FrameStream
from petals.node.node import Node, wall_clock
from petals.node.relay import RelayedSession
from petals.protocol.frames import Output, Step
from petals.protocol.span import Span
from petals.protocol.tensor import WireTensor
from support.processes import (
    DEADLINE,
    LOOPBACK,
    ProcessSwarm,
    figures_until,
    idle,
    originating,
    swarm,
)
from support.reference import ReferenceModel

PROMPT = "Lying lips are an abomination"
PARAMS = SamplingParams(max_new_tokens=24)
LAST, MIDDLE = Span(6, 8), Span(3, 6)

Frame = Step | Output
Lie = Callable[[Frame], Frame]


@pytest.fixture(scope="module")
def processes(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(random_bloom.name, "0:3", str(MIDDLE), str(LAST))
        yield running


def with_nan(frame: Frame) -> Frame:
    values = bytearray(bytes(frame.hidden.data))
    values[:4] = struct.pack("<f", float("nan"))
    return replace(frame, hidden=replace(frame.hidden, data=bytes(values)))


def too_narrow(frame: Frame) -> Frame:
    batch, rows, width = frame.hidden.shape
    shape = (batch, rows, width - 1)
    size = 4 * batch * rows * (width - 1)
    return replace(frame, hidden=WireTensor(frame.hidden.dtype, shape, bytes(size)))


def of_tokens_that_nobody_sent(frame: Frame) -> Frame:
    return replace(frame, position=frame.position + 1)


@asynccontextmanager
async def liar(
    processes: ProcessSwarm, model: ReferenceModel, span: Span, lie: Lie, folder: Path
) -> AsyncIterator[Node]:
    """A node in this process that computes as it should, and says something else."""
    config = NodeConfig(
        model=model.name,
        blocks=span,
        bootstrap=(processes.address,),
        listen=(LOOPBACK,),
        data_dir=folder,
    )
    async with Node(config) as node:
        relay = node._server and node._server.relay
        assert relay

        async def send(session: RelayedSession, stream: FrameStream, rows: int) -> None:
            def next_lie() -> Frame | None:
                outgoing = session.hop.next_outgoing(rows)
                return None if outgoing is None else lie(outgoing)

            await session.outbox.run(stream, next_lie)

        relay._send_outgoing = send  # type: ignore[method-assign]
        yield node


@pytest.mark.parametrize(
    ("span", "lie", "banned"),
    [
        (LAST, with_nan, True),
        (LAST, too_narrow, True),
        (LAST, of_tokens_that_nobody_sent, True),
        # We have only its successor's word for it.
        (MIDDLE, with_nan, False),
        (MIDDLE, too_narrow, False),
    ],
)
async def test_a_liar_is_replaced(
    random_bloom: ReferenceModel,
    processes: ProcessSwarm,
    tmp_path: Path,
    span: Span,
    lie: Lie,
    banned: bool,
) -> None:
    honest = next(node for node in processes.nodes if node.blocks == (span.start, span.end))
    async with (
        liar(processes, random_bloom, span, lie, tmp_path) as node,
        originating(processes, random_bloom.name, patience=DEADLINE) as originator,
    ):
        originator._swarm.refused(honest.peer_id, wall_clock(), DEADLINE)
        handle = await originator.submit(PROMPT, PARAMS)
        with trio.fail_after(DEADLINE):
            while originator._swarm.failures(node.peer_id) == 0 and not originator._swarm.banned:  # noqa: ASYNC110
                await trio.sleep(0.01)
        originator._swarm.succeeded(honest.peer_id)
        result = await handle.result()
        assert [list(result.token_ids)] == random_bloom.generate((PROMPT,), PARAMS)
        assert (node.peer_id in originator._swarm.banned) is banned
        for left in processes.nodes:
            await figures_until(originator, left, idle)
