"""A model that one node has: the others join by its fingerprint, and give each other what they got.

The tests share one swarm and run in their order: the later ones find nodes that have the model.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from petals.inference.checkpoint import open_checkpoint
from petals.inference.sampling_params import SamplingParams
from petals.node.shard_store import ShardStore
from petals.protocol.manifest import FILES, SCHEME, Manifest, shards_of
from petals.protocol.span import Span
from support.processes import (
    DEADLINE,
    ProcessSwarm,
    SeedNode,
    ServingNode,
    figures_of,
    originating,
    swarm,
)
from support.reference import ReferenceModel
from support.weight_liars import LIES, lying

SPANS = ("0:4", "4:8", "2:6", "0:8")
PROMPT = "And the spirit moved upon the face of"
PARAMS = SamplingParams(max_new_tokens=16)
SLOWLY = ("--upload-limit", "3")
"""MiB a second: five seconds for the whole model, in which those who fetch find each other."""


class Seeded:
    """A swarm in which one node has a model from its folder."""

    def __init__(self, processes: ProcessSwarm, seed: SeedNode, manifest: Manifest) -> None:
        self.processes = processes
        self.seed = seed
        self.manifest = manifest
        self.model = SCHEME + seed.fingerprint

    def wait_fetched(self, node: ServingNode) -> dict[str, Any]:
        """What a node says about what it has fetched, when it serves."""
        fetched = node.event("fetched")
        node.wait_serving()
        self.processes.nodes.append(node)
        return fetched

    def on_disk(self, node: ServingNode) -> dict[int, set[int]]:
        """The chunks that are on a node's disk, and right."""
        store = ShardStore(node.folder / "weights", self.manifest)
        return {number: store.open(number) for number in range(len(self.manifest.shards))}


@pytest.fixture(scope="module")
def seeded(demo: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    with swarm(tmp_path_factory.mktemp("swarm")) as processes:
        seed = processes.seed(demo.folder, *SLOWLY)
        manifest = open_checkpoint(demo.folder).manifest
        assert seed.fingerprint == manifest.fingerprint
        yield Seeded(processes, seed, manifest)


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes in this process fetch, too."""
    monkeypatch.setenv("PETALS_DATA_DIR", str(tmp_path / "data"))


def until(condition: Callable[[], bool], process: ServingNode) -> None:
    """Wait for what a process does to the disk."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.running, process.errors
        assert time.monotonic() < deadline, process.errors
        time.sleep(0.02)


def whole_blocks(node: ServingNode) -> int:
    """How many blocks a node has got."""
    return len(list((node.folder / "weights" / "shards").glob("*.safetensors")))


async def test_liars_are_banned_and_nothing_bad_is_written(seeded: Seeded) -> None:
    processes = seeded.processes
    async with lying(processes.address, seeded.manifest) as liars:
        node = processes.start(seeded.model, "--blocks", "0:8", "--debug")
        fetched = await trio.to_thread.run_sync(seeded.wait_fetched, node)
        for liar in liars:
            assert liar.lied, f"{liar.lie} was never asked"
            assert liar.streams_after == 0, f"{liar.lie} was asked again"
            assert fetched["from"].get(liar.peer_id, 0) == 0
            assert f"peer {liar.peer_id} is banned" in node.errors
    assert len(liars) == len(LIES)
    store = node.folder / "weights" / "shards"
    assert not list(store.glob("*.partial"))
    chunks = seeded.on_disk(node)
    for number in (FILES, *shards_of(Span(0, 8))):
        assert len(chunks[number]) == seeded.manifest.shards[number].num_chunks
    node.send_signal(signal.SIGTERM)  # what it has shall be no help to those of the other tests
    assert node.wait() == 0
    processes.nodes.remove(node)


async def test_four_nodes_join_by_the_fingerprint_alone(
    seeded: Seeded, demo: ReferenceModel
) -> None:
    processes = seeded.processes
    nodes = [processes.start(seeded.model, "--blocks", span) for span in SPANS]
    fetched = [seeded.wait_fetched(node) for node in nodes]
    served = {seeded.seed.peer_id: 0, **{node.peer_id: 0 for node in nodes}}
    for node, event in zip(nodes, fetched, strict=True):
        assert sum(event["from"].values()) + event["kept"] == event["bytes"]
        for peer_id, size in event["from"].items():
            served[peer_id] += size
        span = Span.parse(SPANS[nodes.index(node)])
        chunks = seeded.on_disk(node)
        for number in (FILES, *shards_of(span)):
            assert len(chunks[number]) == seeded.manifest.shards[number].num_chunks
    for peer_id, size in served.items():
        sys.stdout.write(
            f"{peer_id} served {size / 1e6:.2f} MB of a model of {seeded.manifest.size / 1e6:.2f}\n"
        )
    assert served[seeded.seed.peer_id] < 2 * seeded.manifest.size
    assert sum(size > 0 for size in served.values()) > 2, "they gave to each other"
    async with originating(processes, seeded.model) as originator:
        figures = await figures_of(originator, nodes[0])
        assert figures["bytes_sent /petals/shard/1"] >= served[nodes[0].peer_id]
        result = await originator.generate(PROMPT, PARAMS)
    assert [list(result.token_ids)] == demo.generate((PROMPT,), PARAMS)


def test_the_command_line_generates_by_the_fingerprint_alone(
    seeded: Seeded, demo: ReferenceModel
) -> None:
    process = seeded.processes.generate(seeded.model, PROMPT, "--max-new-tokens", "16")
    assert process.wait() == 0, process.errors
    tokens = json.loads(process.lines[-1])["token_ids"]
    assert [tokens] == demo.generate((PROMPT,), PARAMS)


def test_whoever_is_killed_costs_nobody_what_there_is(seeded: Seeded) -> None:
    """Of two who give, one is killed half-way; so is the one who fetches, and starts again."""
    processes, blocks = seeded.processes, shards_of(Span(0, 8))
    other = processes.seed(seeded.model, "--upload-limit", "1")
    for node in processes.nodes:
        node.send_signal(signal.SIGKILL)

    fetching = processes.start(seeded.model, "--blocks", "0:8")
    until(lambda: whole_blocks(fetching) >= 2, fetching)
    fetching.send_signal(signal.SIGKILL)
    fetching.process.wait()
    kept = seeded.on_disk(fetching)

    again = processes.start(seeded.model, "--blocks", "0:8", folder=fetching.folder)
    until(lambda: whole_blocks(again) >= 4, again)
    seeded.seed.send_signal(signal.SIGKILL)
    fetched = seeded.wait_fetched(again)
    assert fetched["kept"] == sum(
        seeded.manifest.chunk_size(number, chunk)
        for number in (FILES, *blocks)
        for chunk in kept[number]
    )
    assert fetched["kept"] < fetched["bytes"], "it was killed half-way"
    assert sum(fetched["from"].values()) == fetched["bytes"] - fetched["kept"]
    assert fetched["from"].keys() == {seeded.seed.peer_id, other.peer_id}
    assert "is banned" not in again.errors, "to be killed is no lie"
