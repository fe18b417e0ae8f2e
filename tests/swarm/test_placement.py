"""A swarm that organises itself: nodes of unequal capacity find their places, and take those of the dead."""

import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.node import Node
from petals.protocol.announcement import Announcement, PeerState
from petals.protocol.errors import PeerError
from petals.protocol.placement import block_throughput, placed
from petals.protocol.span import Span, coverage
from support.best_placement import programmed_bottleneck
from support.haste import hurry
from support.processes import ProcessSwarm, ServingNode, originating, swarm
from support.reference import ReferenceModel, random_model

NUM_BLOCKS = 16
CAPACITIES = (
    (4, 90), (2, 60), (6, 200), (3, 50), (5, 75), (8, 320), (2, 30), (4, 140), (3, 110), (7, 90),
    (1, 20), (5, 160),
)  # fmt: skip
"""Blocks and tokens per second of each node."""
KILLED = (2, 5, 7, 9)
"""Of those, drawn by lot; the others can hold the model one and a half times."""
SETTLED = 180.0
"""Seconds in which moves that pay, one after the other, have come to their end."""
HASTE = 3.0
"""Clocks go so much faster than those of a person's nodes, and computing does not."""
WHOLE = 90.0 / HASTE
"""Seconds in which the blocks of nodes that died are served again."""
PATIENCE = 3 * WHOLE
"""Seconds that a text waits for them: whoever serves them again has yet to be heard of, and found."""
LONG = SamplingParams(max_new_tokens=400)
PROMPTS = ("And it came to pass", "The king")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ReferenceModel:
    return random_model(tmp_path_factory.mktemp("deep-bloom"), n_layer=NUM_BLOCKS)


async def said_by(asker: Node, nodes: Sequence[ServingNode]) -> list[Announcement]:
    """What running nodes say of themselves; those that serve, and are not about to move."""
    said: list[Announcement] = []

    async def ask(node: ServingNode) -> None:
        with contextlib.suppress(PeerError):
            announcement, _ = await asker.describe(node.peer_id, [node.multiaddr])
            if announcement is not None and announcement.state is PeerState.ONLINE:
                said.append(announcement)

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(ask, node)
    return said


def least_coverage(said: Sequence[Announcement]) -> int:
    return min(coverage([peer.span for peer in said if peer.span is not None], NUM_BLOCKS))


async def test_nodes_find_their_places_and_those_of_the_dead(
    model: ReferenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(HASTE, monkeypatch.setattr)
    with swarm(tmp_path, haste=HASTE) as processes:
        for blocks, throughput in CAPACITIES:
            await trio.to_thread.run_sync(join, processes, model, blocks, throughput)
        async with originating(processes, model.name, patience=PATIENCE) as asker:
            await balanced(asker, processes)
            handles = [await asker.submit(prompt, LONG) for prompt in PROMPTS]
            for handle in handles:
                while handle.status().tokens < 10:  # noqa: ASYNC110 - which wakes nobody
                    await trio.sleep(0.01)
            left = kill_some(processes)
            with trio.fail_after(WHOLE):
                while least_coverage(await said_by(asker, left)) < 1:  # noqa: ASYNC110
                    await trio.sleep(0.5)
            for handle, prompt in zip(handles, PROMPTS, strict=True):
                (expected,) = model.generate((prompt,), LONG)
                assert list((await handle.result()).token_ids) == expected


def join(processes: ProcessSwarm, model: ReferenceModel, blocks: int, throughput: int) -> None:
    processes.serve_some(model.name, "--num-blocks", str(blocks), "--throughput", str(throughput))


async def balanced(asker: Node, processes: ProcessSwarm) -> None:
    """Until every block is served, and the weakest almost as well as it could be."""
    bottleneck = best = 0.0
    before: list[Span | None] = []
    with trio.move_on_after(SETTLED):
        while True:
            said = await said_by(asker, processes.nodes)
            spans = [peer.span for peer in sorted(said, key=lambda peer: peer.peer_id)]
            everybody = len(said) == len(CAPACITIES) and least_coverage(said) > 0
            if everybody and spans != before:  # the programme takes seconds
                before = spans
                best = programmed_bottleneck(placed(said, NUM_BLOCKS), NUM_BLOCKS)
                bottleneck = min(block_throughput(said, NUM_BLOCKS))
                if bottleneck >= 0.9 * best:
                    return
            await trio.sleep(1.0)
    raise AssertionError(f"the bottleneck is {bottleneck} tokens/s, and could be {best}")


def kill_some(processes: ProcessSwarm) -> list[ServingNode]:
    """Those that are left."""
    dying = [processes.nodes[number] for number in KILLED]
    for node in dying:
        node.send_signal(signal.SIGKILL)
    for node in dying:
        node.wait()
    return [node for node in processes.nodes if node not in dying]
