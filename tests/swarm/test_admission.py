"""What one peer may have of a live node, and what it is told when it asks for more."""

from collections.abc import AsyncIterator, Iterator

import pytest
import trio
from petals.node.identity import new_identity
from petals.protocol.admission import RETRY_AFTER
from petals.protocol.errors import ErrorCode
from petals.protocol.frames import Close, Open, Output, Refused, Step
from support.processes import ProcessSwarm, figures_of, swarm
from support.reference import ReferenceModel
from support.strangers import HELLO, Attack, RawStream, Stranger, attacking, said

CACHE_TOKENS = 10_000
SESSIONS = 3
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def processes(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        options = ["--cache-tokens", str(CACHE_TOKENS), "--peer-sessions", str(SESSIONS)]
        running.serve(random_bloom.name, "0:4", "4:8", options=[*options, "--peer-backlog", "1"])
        yield running


@pytest.fixture
async def attack(random_bloom: ReferenceModel, processes: ProcessSwarm) -> AsyncIterator[Attack]:
    async with attacking(processes, random_bloom) as begun:
        yield begun


async def refusal(stranger: Stranger, opening: Open) -> Refused:
    """How the node refuses a session."""
    [refused] = await stranger.ask(said(HELLO, opening))
    assert isinstance(refused, Refused)
    assert refused.code is ErrorCode.BUSY
    return refused


async def end(*controls: RawStream) -> None:
    """Close sessions; when this returns, the node has."""
    for control in controls:
        await control.send(said(Close("over")))
        await control.rest()


async def test_a_peer_with_many_sessions_is_told_when_to_ask_again(attack: Attack) -> None:
    before = (await figures_of(attack.honest, attack.node)).get("refused busy", 0)
    async with attack.stranger() as greedy, attack.stranger() as other:
        first, *others = [await greedy.session(attack.opening(greedy)) for _ in range(SESSIONS)]
        refused = await refusal(greedy, attack.opening(greedy))
        assert "you have 3 sessions here" in refused.reason
        assert refused.retry_after == RETRY_AFTER
        await end(await other.session(attack.opening(other)))
        await end(first)
        await end(*others, await greedy.session(attack.opening(greedy)))
    figures = await figures_of(attack.honest, attack.node)
    assert figures["refused busy"] == before + 1


async def test_one_session_may_be_large_and_several_share_half_of_the_cache(
    attack: Attack,
) -> None:
    async with attack.stranger() as stranger:
        large = await stranger.session(attack.opening(stranger, max_tokens=CACHE_TOKENS * 6 // 10))
        refused = await refusal(stranger, attack.opening(stranger, max_tokens=1))
        assert "6000 of the 5000 tokens of KV cache that one peer may have" in refused.reason
        assert refused.retry_after == RETRY_AFTER
        await end(large)
        smaller = [
            await stranger.session(attack.opening(stranger, max_tokens=tokens))
            for tokens in (2000, 3000)
        ]
        refused = await refusal(stranger, attack.opening(stranger, max_tokens=1))
        assert "5000 of the 5000" in refused.reason
        await end(*smaller)


async def test_sessions_that_linger_give_way_to_the_next_of_their_peer(attack: Attack) -> None:
    identity = new_identity()
    for _ in range(3):
        async with attack.stranger(identity) as stranger:
            for _ in range(SESSIONS):
                await stranger.session(attack.opening(stranger))
            await stranger.cut()


async def test_more_steps_than_may_wait_are_computed_all_the_same(attack: Attack) -> None:
    """Each session sends the same rows again and again, all of them more than may wait at once."""
    rows, rewinds = 700, 3
    hidden = attack.hidden(1, rows)
    assert SESSIONS * 2 * len(hidden.data) > MIB

    async def insist(stranger: Stranger) -> None:
        opening = attack.opening(stranger, max_tokens=rows)
        control = await stranger.session(opening)
        link = await stranger.link(opening)
        await link.send(said(*(Step(0, n, n, 0, rows - 1, hidden) for n in range(rewinds))))
        while True:
            output = await control.frame()
            assert isinstance(output, Output)
            if output.rewind == rewinds - 1:
                assert output.position == rows - 1
                break
        await end(control)

    async with attack.stranger() as stranger, trio.open_nursery() as nursery:
        for _ in range(SESSIONS):
            nursery.start_soon(insist, stranger)
