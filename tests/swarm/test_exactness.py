"""Whatever route a text takes through real processes: its tokens are those of transformers."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import petals
import pytest
import trio
from petals.inference.sampling_params import SamplingParams
from petals.node.cli.arguments import split_evenly
from petals.node.generation import Generation
from petals.node.node import Node
from petals.protocol.span import Span
from support.processes import (
    Figures,
    ProcessSwarm,
    figures_until,
    idle,
    nothing_left,
    originating,
    run_command,
    swarm,
)
from support.reference import ReferenceModel

GREEDY = SamplingParams(max_new_tokens=24)
SEEDED = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95, top_k=200, seed=20)
PENALISED = SamplingParams(max_new_tokens=24, repetition_penalty=1.3)

SENTENCE = "In the beginning God created the heaven and the earth."
BATCH = ("And God said", "x", SENTENCE, "Then went the king of the north out against the city, and")


@dataclass(frozen=True)
class Job:
    """Prompts of one session, and how to go on from them."""

    prompts: Callable[[ReferenceModel], Sequence[str]]
    params: SamplingParams


JOBS = {
    "one token": Job(lambda model: [model.prompt(1)], GREEDY),
    "a sentence": Job(lambda _: [SENTENCE], PENALISED),
    "the longest prompt": Job(lambda model: [model.prompt(model.max_length - 24)], GREEDY),
    "a batch of four": Job(lambda _: BATCH, PENALISED),
    "sampled": Job(lambda _: [SENTENCE], SEEDED),
    "a sampled batch": Job(lambda _: BATCH, SEEDED),
}


@dataclass(frozen=True)
class ServedModel:
    """A model in a swarm whose only route has a hop for each of ``spans``."""

    model: ReferenceModel
    spans: tuple[Span, ...]
    swarm: ProcessSwarm

    def check(self, job: Job, results: Sequence[Generation]) -> None:
        """Raise AssertionError unless the results are transformers', and went through all hops."""
        expected = self.model.generate(tuple(job.prompts(self.model)), job.params)
        assert [list(result.token_ids) for result in results] == expected
        for result in results:
            assert tuple(hop.span for hop in result.route) == self.spans
            assert result.recoveries == 0
            decoded = self.model.tokenizer.decode(result.token_ids, skip_special_tokens=True)
            assert result.text == decoded


@pytest.fixture(
    scope="module",
    params=[(name, hops) for name in ("demo", "random_bloom") for hops in (1, 2, 3, 8)],
    ids=lambda param: f"{param[0]}-{param[1]}-hops",
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedModel]:
    name, hops = request.param
    model: ReferenceModel = request.getfixturevalue(name)
    spans = tuple(split_evenly(model.num_blocks, hops))
    with swarm(tmp_path_factory.mktemp("swarm")) as processes:
        processes.serve(model.name, *map(str, spans), options=["--dtype", "float32"])
        yield ServedModel(model, spans, processes)


async def generate(node: Node, job: Job, model: ReferenceModel) -> list[Generation]:
    handle = await node.submit(list(job.prompts(model)), job.params)
    return await handle.results()


async def test_each_alone(served: ServedModel) -> None:
    async with originating(served.swarm, served.model.name) as node:
        for job in JOBS.values():
            served.check(job, await generate(node, job, served.model))


async def test_all_at_once_through_the_same_hops(served: ServedModel) -> None:
    async with originating(served.swarm, served.model.name) as node:
        handles = [
            (job, await node.submit(list(job.prompts(served.model)), job.params))
            for job in [*JOBS.values(), *JOBS.values()]
        ]
        for job, handle in handles:
            served.check(job, await handle.results())
        for process in served.swarm.nodes:
            await figures_until(node, process, idle)


def test_a_program_without_trio(served: ServedModel) -> None:
    peers = [served.swarm.address]
    [expected] = served.model.generate((SENTENCE,), PENALISED)
    text = served.model.tokenizer.decode(expected, skip_special_tokens=True)
    with petals.connect(served.model.name, peers, dtype="float32") as client:
        written = client.generate(SENTENCE, max_new_tokens=24, repetition_penalty=1.3)
        streamed = client.stream(SENTENCE, max_new_tokens=24, repetition_penalty=1.3)
        assert written == text
        assert "".join(streamed) == text


PROMPTS = (SENTENCE, "x", "And they went up,", "Thus saith the LORD of hosts unto you all: Go")
LONG = SamplingParams(max_new_tokens=350)
"""Long enough that four processes that were started together run at the same time."""


async def test_four_originators_at_once_leave_nothing_behind(
    random_bloom: ReferenceModel, tmp_swarm: ProcessSwarm
) -> None:
    model = random_bloom
    spans = ("0:3", "3:6", "6:8")
    nodes = tmp_swarm.serve(model.name, *spans, options=["--dtype", "float32"])
    async with originating(tmp_swarm, model.name) as observer:
        await observer.generate(SENTENCE, GREEDY)  # so that the hops are connected to one another
        before = [await figures_until(observer, node, idle) for node in nodes]
        unloaded = await peers_by_status(tmp_swarm)
        assert sorted(unloaded) == sorted(node.peer_id for node in nodes)
        assert all(peer["sessions"] == 0 for peer in unloaded.values())

        originators = [
            tmp_swarm.generate(model.name, prompt, "--max-new-tokens", str(LONG.max_new_tokens))
            for prompt in PROMPTS
        ]

        def all_at_work(figures: Figures) -> bool:
            assert all(originator.running for originator in originators), "one has ended already"
            return figures["sessions"] == 4

        for node in nodes:
            await figures_until(observer, node, all_at_work)
        loaded = await peers_by_status(tmp_swarm)
        for peer_id, peer in loaded.items():
            assert peer["sessions"] > 0
            assert peer["cache_tokens_left"] < unloaded[peer_id]["cache_tokens_left"]

        for originator, prompt in zip(originators, PROMPTS, strict=True):
            assert await trio.to_thread.run_sync(originator.wait) == 0, originator.errors
            result = json.loads(originator.lines[-1])
            assert [result["token_ids"]] == model.generate((prompt,), LONG)
            assert [hop["blocks"] for hop in result["route"]] == [[0, 3], [3, 6], [6, 8]]
            assert result["recoveries"] == 0

        for node, old in zip(nodes, before, strict=True):
            await figures_until(observer, node, partial(nothing_left, before=old))
        assert {
            peer_id: peer["cache_tokens_left"]
            for peer_id, peer in (await peers_by_status(tmp_swarm)).items()
        } == {peer_id: peer["cache_tokens_left"] for peer_id, peer in unloaded.items()}


async def peers_by_status(processes: ProcessSwarm) -> dict[str, dict[str, Any]]:
    """What ``petals-node status --json`` says of each peer of the only model."""
    status = await trio.to_thread.run_sync(
        lambda: run_command("status", "--json", "--bootstrap", processes.address)
    )
    assert status.returncode == 0, status.stderr
    [model] = json.loads(status.stdout)["models"]
    assert model["missing"] == []
    return {peer["peer_id"]: peer for peer in model["peers"]}
