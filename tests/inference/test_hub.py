"""Models of the hub."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from petals.inference.checkpoint import open_checkpoint
from petals.protocol.errors import ModelError
from petals.protocol.span import Span
from support.fake_hub import FakeHub, fake_hub, point_to
from support.tiny_bloom import save_bloom
from support.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(
        save_bloom(tmp_path / "on the hub", max_shard_size="50KB"), monkeypatch
    ) as server:
        yield server


def test_only_the_shards_that_are_needed_are_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    checkpoint = open_checkpoint("someone/tiny", cache_dir=tmp_path / "cache")
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]
    checkpoint.load_blocks(Span(2, 3))
    shards = {name for name in hub.downloads if name.endswith(".safetensors")}
    assert 0 < len(shards) < len(list(hub.folder.glob("*.safetensors")))
    assert checkpoint.fingerprint == open_checkpoint(hub.folder).fingerprint


def test_the_cache_serves_offline(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    online = open_checkpoint("someone/tiny", cache_dir=cache)
    online.load_blocks(Span(0, 5))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = list(hub.downloads)
    offline = open_checkpoint("someone/tiny", cache_dir=cache)
    offline.load_blocks(Span(0, 5))
    assert offline.fingerprint == online.fingerprint
    assert hub.downloads == before
    with pytest.raises(ModelError, match="offline mode is on"):
        open_checkpoint("someone/else", cache_dir=cache)


def test_a_model_in_one_file_is_downloaded_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.folder = save_bloom(tmp_path / "whole")
    checkpoint = open_checkpoint("someone/tiny", cache_dir=tmp_path / "cache")
    checkpoint.load_blocks(Span(0, 5))
    checkpoint.load_ends()
    assert hub.downloads.count("model.safetensors") == 1
    assert checkpoint.fingerprint == open_checkpoint(hub.folder).fingerprint


def test_what_is_wrong_on_the_hub_is_said_in_words(hub: FakeHub, tmp_path: Path) -> None:
    def message(name: str) -> str:
        with pytest.raises(ModelError) as raised:
            open_checkpoint(name, cache_dir=tmp_path / "cache")
        return str(raised.value)

    assert "neither a folder 'no/model' nor a model of that name" in message("no/model")
    hub.refusal = (403, "GatedRepo")
    assert "someone/tiny is gated" in message("someone/tiny")
    hub.refusal = (400, "")
    assert "someone/tiny" in message("someone/tiny")
    hub.refusal = None
    (hub.folder / "model.safetensors.index.json").unlink()
    assert "the hub has no weights" in message("someone/tiny")
    (hub.folder / "config.json").unlink()
    assert "the hub has no config.json" in message("someone/tiny")


def test_the_tokenizer_comes_from_the_hub_and_then_from_the_cache(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer().save_pretrained(hub.folder)
    text = "in the beginning"
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        checkpoint = open_checkpoint("someone/tiny", cache_dir=tmp_path / "cache")
        assert checkpoint.load_tokenizer().encode(text) == tiny_tokenizer().encode(text)


def test_a_shard_that_the_hub_lacks_is_named(hub: FakeHub, tmp_path: Path) -> None:
    checkpoint = open_checkpoint("someone/tiny", cache_dir=tmp_path / "cache")
    for path in hub.folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match=r"the hub has no model-0000\d-of"):
        checkpoint.load_blocks(Span(0, 1))


def test_a_hub_that_is_not_there(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelError, match="the hub could not be reached"):
        open_checkpoint("someone/tiny", cache_dir=tmp_path / "cache")
