"""Where a node's weights come from when it is told a hub id, or a fingerprint and a fallback."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import trio
from petals.inference import checkpoint
from petals.inference.checkpoint import open_checkpoint
from petals.node import opening, shard_fetch
from petals.node.config import NodeConfig
from petals.node.node import Node
from petals.node.weights import OwnWeights, runs_to_give
from petals.protocol.errors import ConfigError, ModelError, PeerError
from petals.protocol.manifest import ENDS, FILES, FIRST_BLOCK, SCHEME, shards_of
from petals.protocol.span import Span
from support.fake_hub import FakeHub, fake_hub
from support.tiny_bloom import save_bloom, tiny_bloom

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
HUB_ID = "someone/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(
        save_bloom(tmp_path / "on the hub", max_shard_size="50KB"), monkeypatch
    ) as server:
        yield server


@asynccontextmanager
async def node(folder: Path, model: str, *others: Node, **settings: Any) -> AsyncIterator[Node]:
    """A node on loopback that joins through the others."""
    config = NodeConfig(
        model=model,
        listen=LOOPBACK,
        bootstrap=tuple(other.multiaddrs[0] for other in others),
        data_dir=folder,
    )
    with trio.fail_after(60):
        async with Node(replace(config, **settings)) as running:
            yield running


async def test_a_hub_model_that_the_swarm_knows_is_downloaded_in_part(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    async with node(tmp_path / "first", HUB_ID, seed=True) as first:
        hub.downloads.clear()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another cache"))
        async with node(tmp_path / "second", HUB_ID, first, blocks=Span(2, 3)) as second:
            assert second.fingerprint == first.fingerprint
            downloaded = {name for name in hub.downloads if name.endswith(".safetensors")}
            assert 0 < len(downloaded) < len(list(hub.folder.glob("*.safetensors")))
            assert isinstance(second._weights, OwnWeights)
            assert Span(FIRST_BLOCK + 2, FIRST_BLOCK + 3) in runs_to_give(second._weights)


async def test_of_a_large_folder_no_more_is_read_than_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_LARGE", 0)
    first_folder, second_folder = tmp_path / "a" / "tiny", tmp_path / "b" / "tiny"
    async with (
        node(tmp_path / "first", str(save_bloom(first_folder)), seed=True) as first,
        node(
            tmp_path / "second", str(save_bloom(second_folder)), first, blocks=Span(2, 3)
        ) as second,
    ):
        assert second.fingerprint == first.fingerprint
        assert second._weights is not None
        served = FIRST_BLOCK + 2
        assert runs_to_give(second._weights) == (Span(served, served + 1),)


async def test_a_large_folder_of_another_model_of_that_name_is_a_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_LARGE", 0)
    tuned = save_bloom(tmp_path / "b" / "tiny", tiny_bloom(seed=1))
    async with (
        node(tmp_path / "first", str(save_bloom(tmp_path / "a" / "tiny")), seed=True) as first,
        node(tmp_path / "second", str(tuned), first, blocks=Span(2, 3)) as second,
    ):
        assert second.model_name == first.model_name
        assert second.fingerprint == open_checkpoint(tuned).fingerprint != first.fingerprint


async def test_a_part_of_a_model_that_nobody_has_is_refused_with_advice(tmp_path: Path) -> None:
    folder = save_bloom(tmp_path / "model", max_shard_size="50KB")
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"holds no model-.*give petals: and that as the model"):
        async with node(tmp_path / "node", str(folder), blocks=Span(2, 3)):
            pass


@pytest.mark.usefixtures("hub")
async def test_what_the_disk_does_not_hold_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint.Checkpoint, "stored_bytes", 1 << 60)
    (tmp_path / "cache").mkdir()
    with pytest.raises(ModelError, match=r"has no room .*petals-node seed --model someone/tiny"):
        async with node(tmp_path / "node", HUB_ID, blocks=Span(2, 3)):
            pass


@pytest.mark.usefixtures("hub")
async def test_whoever_only_uses_a_model_waits_for_somebody_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    async with node(tmp_path / "node", HUB_ID, serve=False, patience=0.0) as client:
        with pytest.raises(PeerError, match="nobody in this swarm has someone/tiny"):
            await client.submit("a")


async def test_what_the_hub_has_is_compared_with_what_the_swarm_says(tmp_path: Path) -> None:
    theirs = open_checkpoint(save_bloom(tmp_path / "theirs", tiny_bloom(seed=1))).manifest
    folder = save_bloom(tmp_path / "ours", max_shard_size="50KB")
    ours = open_checkpoint(folder)
    assert not ours.adopt(theirs), "what is here is compared at once"
    with not_downloaded_yet(folder):
        assert ours.adopt(theirs), "config and names are the same"
    weights = OwnWeights(ours.shards, theirs, adopted=True)
    await weights.ensure("files", [FILES], patience=1.0)
    with pytest.raises(ModelError, match="blocks that are here are not those"):
        await weights.ensure("blocks", shards_of(Span(0, 2)), patience=1.0)
    assert runs_to_give(weights) == (Span(FILES, FILES + 1),), "what is not compared is not given"


@contextmanager
def not_downloaded_yet(folder: Path) -> Iterator[None]:
    """As a model of the hub is of which only the config and the index are here."""
    elsewhere = folder.with_name("on the hub")
    elsewhere.mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(elsewhere / path.name)
    yield
    for path in elsewhere.iterdir():
        path.rename(folder / path.name)


def test_a_manifest_of_something_else_is_not_adopted(tmp_path: Path) -> None:
    ours = open_checkpoint(save_bloom(tmp_path / "ours"))
    for name, other in (
        ("blocks", tiny_bloom(n_layer=4)),
        ("config", tiny_bloom(layer_norm_epsilon=1e-4)),
        ("head", tiny_bloom(tie_word_embeddings=False)),
    ):
        theirs = open_checkpoint(save_bloom(tmp_path / name, other)).manifest
        assert not ours.adopt(theirs), name
    more = save_bloom(tmp_path / "more files")
    (more / "vocab.txt").write_text("a\n")
    assert not ours.adopt(open_checkpoint(more).manifest)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers are waited for no longer than is of use where there are none."""
    monkeypatch.setattr(opening, "FALLBACK_PATIENCE", 0.1)
    monkeypatch.setattr(shard_fetch, "FALLBACK_SECONDS", 0.1)


@pytest.mark.usefixtures("impatient")
async def test_what_no_peer_has_comes_from_the_fallback(tmp_path: Path) -> None:
    folder = save_bloom(tmp_path / "model")
    fingerprint = open_checkpoint(folder).fingerprint
    async with (
        node(
            tmp_path / "empty", str(save_bloom(tmp_path / "x", tiny_bloom(seed=3))), seed=True
        ) as other,
        node(
            tmp_path / "node",
            SCHEME + fingerprint,
            other,
            fallback=str(folder),
            blocks=Span(1, 3),
        ) as fetching,
    ):
        assert fetching.fingerprint == fingerprint
        assert {each.what for each in fetching.fetched} == {"files", "blocks"}
        assert all(set(each.received) == {""} for each in fetching.fetched)


@pytest.mark.usefixtures("impatient")
async def test_a_fallback_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_bloom(tmp_path / "model")
    with pytest.raises(ModelError, match=r"the fallback .* is another one"):
        async with node(tmp_path / "node", SCHEME + "0" * 64, fallback=str(folder)):
            pass


async def test_a_model_that_nobody_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        PeerError, match=f"petals:{'0' * 64} was not found in this swarm within 0 s"
    ):
        async with node(tmp_path, SCHEME + "0" * 64, patience=0.0):
            pass


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "petals:abc"}, "model: .* must be petals: and the 64 hexadecimal digits"),
        ({"model": "demo", "fallback": "demo"}, "fallback: only a model that is fetched"),
        ({"seed": True}, "seed: of which model"),
        ({"model": "demo", "seed": True, "serve": False}, "seed: of which model"),
        ({"model": "demo", "seed": True, "num_blocks": 2}, "seed: serves no blocks"),
        ({"model": "demo", "upload_limit": 0.0}, "upload_limit: must be 0.1 or more"),
        ({"model": "demo", "max_disk_space": -1.0}, "max_disk_space: must be 0.001 or more"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NodeConfig(**settings)


def test_shards_that_are_there_are_given_as_runs(tmp_path: Path) -> None:
    opened = open_checkpoint(save_bloom(tmp_path, max_shard_size="50KB"))
    weights = OwnWeights(opened.shards, opened.manifest)
    assert runs_to_give(weights) == (Span(0, 7),)
    files = opened.shards._filenames(ENDS)
    for name in files:
        (tmp_path / name).unlink()
    gone = {n for n in range(1, 7) if opened.shards._filenames(n) & files}
    given = {n for run in runs_to_give(weights) for n in range(run.start, run.end)}
    assert given == set(range(7)) - gone
