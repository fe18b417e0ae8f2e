"""Blocks that nobody serves for a while, originators that die, and sessions that go back."""

import signal
from collections.abc import Iterator

import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.generation import GenerationHandle
from petals.node.originate import Session
from support.processes import (
    ProcessSwarm,
    figures_until,
    idle,
    originating,
    swarm,
)
from support.reference import ReferenceModel

PROMPT = "And it came to pass in those days, that there went out a decree"
PARAMS = SamplingParams(max_new_tokens=100)
MIDDLE = "3:6"


@pytest.fixture(scope="module")
def processes(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    """Two nodes hold the middle; a test that ends one of them starts another."""
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(random_bloom.name, "0:3", MIDDLE, MIDDLE, "6:8")
        yield running


async def started(handle: GenerationHandle, tokens: int) -> None:
    """Until ``tokens`` have been generated."""
    async for _ in handle:
        if handle.status().tokens >= tokens:
            return
    raise AssertionError(f"it ended after {handle.status().tokens} tokens")


async def test_all_hops_of_the_middle_are_gone_until_one_comes(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    """Nobody serves some blocks for a while: the session waits, and goes on from where it was."""
    async with originating(processes, random_bloom.name, patience=120.0) as node:
        handle = await node.submit(PROMPT, PARAMS)
        await started(handle, 10)
        for middle in processes.nodes:
            if middle.blocks == (3, 6):
                middle.send_signal(signal.SIGKILL)
                middle.wait()
        processes.nodes[:] = [left for left in processes.nodes if left.running]
        await trio.to_thread.run_sync(processes.serve, random_bloom.name, MIDDLE, MIDDLE)
        result = await handle.result()
        assert [list(result.token_ids)] == random_bloom.generate((PROMPT,), PARAMS)
        assert result.recoveries >= 1


async def write(session: Session, token_ids: list[int], params: SamplingParams) -> list[int]:
    """Extend the session's only sequence; the new tokens."""
    new: list[int] = []

    def take(tokens: list[int]) -> list[bool]:
        new.extend(tokens)
        return [False]

    await session.write([token_ids], params, take)
    return new


async def test_a_session_goes_back_and_on_differently(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    """Turns of a chat, edited: each text is the one that a fresh run over all tokens would give."""
    model, params = random_bloom, SamplingParams(max_new_tokens=12)
    tokenizer = model.tokenizer
    first = tokenizer("Who art thou, lord of the house?")["input_ids"]
    second = tokenizer(" And whence comest thou?")["input_ids"]
    edited = tokenizer(" Nay, but tell me the name of the city.")["input_ids"]
    async with originating(processes, model.name) as node, node.open_session(200) as session:
        before = first + await write(session, first, params)
        assert before == first + model.generate_from(first, params)
        after = before + second + await write(session, second, params)
        assert after == before + second + model.generate_from(before + second, params)
        assert session.token_ids == [after]

        # Into the second turn, to the end of the first (whose last token never went around), and
        # into the middle of the first prompt.
        for position in (len(before) + 3, len(before), len(before) - 1, 4):
            session.rewind(position)
            kept = before[:position] if position <= len(before) else after[:position]
            assert session.token_ids == [kept]
            new = await write(session, edited, params)
            assert new == model.generate_from(kept + edited, params)
            after = kept + edited + new
        assert session.token_ids == [after]


async def test_a_session_goes_back_over_a_hop_that_died_between_two_turns(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    model, params = random_bloom, SamplingParams(max_new_tokens=12)
    first = model.tokenizer("Who art thou, lord of the house?")["input_ids"]
    edited = model.tokenizer(" Nay, but tell me the name of the city.")["input_ids"]
    async with originating(processes, model.name) as node, node.open_session(200) as session:
        kept = (first + await write(session, first, params))[: len(first) + 5]
        assert session.ring is not None
        middle = processes.node(session.ring.route[1].peer_id)
        middle.send_signal(signal.SIGKILL)
        middle.wait()
        processes.nodes.remove(middle)
        session.rewind(len(kept))
        new = await write(session, edited, params)
        assert new == model.generate_from(kept + edited, params)
        assert session.ring.recoveries >= 1


async def test_an_originator_that_is_killed_leaves_nothing_behind(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    async with originating(processes, random_bloom.name) as node:
        originator = processes.generate(random_bloom.name, PROMPT, "--max-new-tokens", "500")
        first = processes.nodes[0]
        await figures_until(node, first, lambda figures: figures["sessions"] == 1)
        originator.send_signal(signal.SIGKILL)
        for left in processes.nodes:
            await figures_until(node, left, idle)
