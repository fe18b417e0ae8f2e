"""Hops that die, hang, or leave under running sessions: nobody sees more than a pause.

Four sessions run at once through the same hops (greedy and seeded, one text and a batch of four), and
the fault hits all of them: each text must be the one that nothing has disturbed.
"""

import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.generation import GenerationHandle, GenerationState
from petals.node.node import Node, wall_clock
from petals.node.originate import Session
from petals.protocol.chain import ChainState
from support.processes import (
    DEADLINE,
    LEAVE_DEADLINE,
    ProcessSwarm,
    ServingNode,
    figures_of,
    figures_until,
    idle,
    originating,
    run_command,
    swarm,
)
from support.reference import ReferenceModel

SPANS = ("0:3", "3:6", "6:8")
SPARES = ("0:3", "3:6", "3:6", "6:8")
ONE = ("And it came to pass in those days",)
FOUR = (*ONE, "The king", "Who art thou, lord of the house?", "In the beginning was a word")
GREEDY = SamplingParams(max_new_tokens=100)
SEEDED = SamplingParams(max_new_tokens=100, temperature=0.8, top_p=0.95, seed=11)
SHORT = (
    SamplingParams(max_new_tokens=6),
    SamplingParams(max_new_tokens=6, temperature=0.8, seed=3),
)
TOKENS = 10
"""Before a fault."""
SESSIONS = [(ONE, GREEDY), (FOUR, GREEDY), (ONE, SEEDED), (FOUR, SEEDED)]


@pytest.fixture(scope="module")
def processes(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(random_bloom.name, *SPANS, *SPARES)
        yield running


def replenish(processes: ProcessSwarm, model: ReferenceModel) -> None:
    """Start a node for each that is gone."""
    processes.nodes[:] = [node for node in processes.nodes if node.running]
    wanted = list(SPANS + SPARES)
    for node in processes.nodes:
        assert node.blocks is not None
        wanted.remove("{}:{}".format(*node.blocks))
    processes.serve(model.name, *wanted)


@dataclass
class Sessions:
    """The four sessions, all on one route; and whom a fault may hit."""

    processes: ProcessSwarm
    node: Node
    handles: list[GenerationHandle] = field(default_factory=list)

    @property
    def hops(self) -> list[ServingNode]:
        """The processes on the route of the first session."""
        return [self.processes.node(hop.peer_id) for hop in self.handles[0].status().route]

    async def until_recovered(self, times: int = 1) -> None:
        """Until every session's route was mended so often."""
        await self.until(lambda handle: handle.status().recoveries >= times)

    async def until(self, condition: Callable[[GenerationHandle], bool]) -> None:
        """Until it holds for every session."""
        for handle in self.handles:

            def ended_or_holds(handle: GenerationHandle = handle) -> bool:
                return condition(handle) or handle.status().state.final

            await until(ended_or_holds)
            assert condition(handle), handle.status()


@contextlib.asynccontextmanager
async def running_sessions(
    model: ReferenceModel, processes: ProcessSwarm
) -> AsyncIterator[Sessions]:
    """Run the four, and see that they end as they should whatever is done to them meanwhile."""
    await trio.to_thread.run_sync(replenish, processes, model)
    async with originating(processes, model.name, patience=60.0) as node:
        sessions = Sessions(processes, node)
        with out_of_favour(node, processes):
            for prompts, params in SESSIONS:
                sessions.handles.append(await node.submit(prompts, params))
            await sessions.until(lambda handle: handle.status().tokens >= TOKENS)
        yield sessions
        for handle, (prompts, params) in zip(sessions.handles, SESSIONS, strict=True):
            texts = [list(result.token_ids) for result in await handle.results()]
            assert texts == model.generate(prompts, params)
        for left in processes.nodes:
            if left.running:
                await figures_until(node, left, idle)


async def until(condition: Callable[[], bool]) -> None:
    """Until it holds; what it looks at wakes nobody."""
    with trio.fail_after(DEADLINE):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def spares_of(processes: ProcessSwarm) -> list[ServingNode]:
    """All but the first node of each span."""
    first = {node.blocks: node for node in reversed(processes.nodes)}
    return [node for node in processes.nodes if node is not first[node.blocks]]


def favoured(processes: ProcessSwarm) -> list[ServingNode]:
    """The first node of each span, in the order of a route: whoever died is replaced at the end."""
    spares = spares_of(processes)
    return sorted(
        (node for node in processes.nodes if node not in spares), key=lambda node: node.blocks or ()
    )


@contextlib.contextmanager
def out_of_favour(node: Node, processes: ProcessSwarm) -> Iterator[None]:
    """Let sessions that begin now take the first node of each span."""
    spares = [spare.peer_id for spare in spares_of(processes)]
    for peer_id in spares:
        node._swarm.refused(peer_id, wall_clock(), DEADLINE)
    yield
    for peer_id in spares:
        node._swarm.succeeded(peer_id)


def kill(*hops: ServingNode) -> None:
    for hop in hops:
        hop.send_signal(signal.SIGKILL)
    for hop in hops:
        hop.wait()


async def test_each_hop_in_turn_is_killed_while_tokens_go_through_it(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    async with running_sessions(random_bloom, processes) as sessions:
        for number, hop in enumerate(sessions.hops, start=1):
            kill(hop)
            await sessions.until_recovered(number)


@pytest.mark.parametrize("positions", [(1, 2), (0, 2), (0, 1, 2)], ids=str)
async def test_several_hops_are_killed_at_once(
    random_bloom: ReferenceModel, processes: ProcessSwarm, positions: tuple[int, ...]
) -> None:
    """Two neighbours, all but one, all."""
    async with running_sessions(random_bloom, processes) as sessions:
        hops = sessions.hops
        kill(*(hops[position] for position in positions))
        await sessions.until_recovered()


async def test_a_replacement_is_killed_as_soon_as_it_takes_part(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    async with running_sessions(random_bloom, processes) as sessions:
        kill(sessions.hops[1])
        first = sessions.handles[0]
        await sessions.until(lambda handle: first.status().recoveries >= 1)
        ring = first._session and first._session.ring
        assert ring
        kill(processes.node(ring.route[1].peer_id))
        await sessions.until(lambda handle: first.status().recoveries >= 2)


async def test_a_hop_is_drained(random_bloom: ReferenceModel, processes: ProcessSwarm) -> None:
    async with running_sessions(random_bloom, processes) as sessions:
        hop = sessions.hops[1]
        drain = partial(run_command, "drain", "--data-dir", str(hop.folder))
        drained = await trio.to_thread.run_sync(drain)
        assert drained.returncode == 0, drained.stderr
        assert drained.stdout == "The node has left the swarm.\n"
        assert await trio.to_thread.run_sync(hop.wait, LEAVE_DEADLINE) == 0
        again = await trio.to_thread.run_sync(drain)
        assert again.returncode == 2
        assert "no node runs in" in again.stderr
        await sessions.until_recovered()


async def test_a_hop_hangs(random_bloom: ReferenceModel, processes: ProcessSwarm) -> None:
    async with running_sessions(random_bloom, processes) as sessions:
        hop = sessions.hops[1]
        hop.send_signal(signal.SIGSTOP)
        try:
            await sessions.until_recovered()
            await sessions.until(lambda handle: handle.status().state is GenerationState.DONE)
        finally:
            hop.send_signal(signal.SIGCONT)


async def test_a_hop_is_killed_in_the_middle_of_a_prompt(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    """The hop is stopped before, so that the prompts are surely still under way."""
    model = random_bloom
    await trio.to_thread.run_sync(replenish, processes, model)
    tokens = model.tokenizer(model.prompt(600))["input_ids"]
    prompts = [tokens[start : start + 300] for start in (0, 100, 200, 300)]
    async with (
        originating(processes, model.name, patience=60.0) as node,
        contextlib.AsyncExitStack() as stack,
    ):
        first, middle, _ = favoured(processes)
        before = await figures_of(node, first)
        with out_of_favour(node, processes):
            sessions = [
                await stack.enter_async_context(node.open_session(320, batch=batch))
                for batch in (1, 4, 1, 4)
            ]
            await until(lambda: all(is_running(session) for session in sessions))
        middle.send_signal(signal.SIGSTOP)
        texts: list[list[list[int]]] = [[[] for _ in range(batch)] for batch in (1, 4, 1, 4)]

        async def write(number: int) -> None:
            def take(new: list[int]) -> list[bool]:
                for text, token in zip(texts[number], new, strict=True):
                    text.append(token)
                return [False] * len(new)

            batch = prompts[: len(texts[number])]
            await sessions[number].write(batch, SHORT[number // 2], take)

        async with trio.open_nursery() as nursery:
            for number in range(len(sessions)):
                nursery.start_soon(write, number)
            await figures_until(node, first, lambda now: now["rows"] > before["rows"])
            kill(middle)
        for number, text in enumerate(texts):
            ids = torch.tensor(prompts[: len(text)])
            expected = model._continue(ids, torch.ones_like(ids), SHORT[number // 2])
            assert text == expected
            ring = sessions[number].ring
            assert ring is not None and ring.recoveries >= 1


def is_running(session: Session) -> bool:
    return session.ring is not None and session.ring.state is ChainState.RUNNING


async def test_a_replaced_hop_costs_the_others_nothing(
    random_bloom: ReferenceModel, processes: ProcessSwarm
) -> None:
    """The survivors compute every row once, and no hidden state of a replay passes through us."""
    await trio.to_thread.run_sync(replenish, processes, random_bloom)
    model, tokens = random_bloom, 60
    prompt = "A prompt of which no hop has seen the beginning. " + model.prompt(280)
    length = len(model.tokenizer(prompt)["input_ids"])
    params = SamplingParams(max_new_tokens=tokens)
    first, middle, last = favoured(processes)
    survivors = [first, last]
    async with originating(processes, model.name, patience=60.0) as node:
        before = [await figures_of(node, hop) for hop in survivors]
        with out_of_favour(node, processes):
            handle = await node.submit(prompt, params)
            await until(lambda: handle.status().tokens >= 20)
        sent = node.statistics()["bytes_sent /petals/session/1"]
        kill(middle)
        result = await handle.result()
        assert [list(result.token_ids)] == model.generate((prompt,), params)
        assert result.recoveries >= 1
        rows = length + tokens - 1
        for hop, then in zip(survivors, before, strict=True):
            now = await figures_until(node, hop, idle)
            assert now["rows"] - then["rows"] == rows
        row_bytes = 4 * model.model.config.hidden_size
        replay = length * row_bytes
        assert node.statistics()["bytes_sent /petals/session/1"] - sent < replay / 2
