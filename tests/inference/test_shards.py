"""A checkpoint as shards: what the manifest says is what its files give, whatever their layout."""

import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from petals.inference import shards
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.shards import make_manifest
from petals.protocol.errors import ModelError
from petals.protocol.manifest import ENDS, FILES, FIRST_BLOCK, File, Manifest, Tensor
from safetensors.torch import load_file, save_file
from support.checkpoint_files import change_tensors, save_as_bin
from support.reference import random_model
from support.tiny_bloom import save_bloom, tiny_bloom


def wide_bloom(folder: Path) -> Path:
    """Blocks of several chunks."""
    return save_bloom(folder, tiny_bloom(hidden_size=96, n_layer=2))


def content(checkpoint: Checkpoint, number: int) -> bytes:
    """A shard, chunk by chunk, each as its hash says."""
    shard = checkpoint.manifest.shards[number]
    chunks = []
    for chunk in range(shard.num_chunks):
        data = checkpoint.shards.read(number, chunk)
        assert len(data) == checkpoint.manifest.chunk_size(number, chunk)
        assert hashlib.sha256(data).digest() == shard.hash_of(chunk)
        chunks.append(data)
    return b"".join(chunks)


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "old bin"])
def test_chunks_are_the_tensors_one_behind_the_other(tmp_path: Path, layout: str) -> None:
    folder = wide_bloom(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if layout == "sharded":
        wide_bloom(tmp_path / "again").joinpath("config.json").unlink()
        (folder / "model.safetensors").unlink()
        tiny_bloom(hidden_size=96, n_layer=2).save_pretrained(folder, max_shard_size="200KB")
    elif layout != "safetensors":
        save_as_bin(folder, _use_new_zipfile_serialization=layout == "bin")
    checkpoint = open_checkpoint(folder)
    for number in range(ENDS, FIRST_BLOCK + 2):
        shard = checkpoint.manifest.shards[number]
        expected = b""
        for entry in shard.entries:
            assert isinstance(entry, Tensor)
            tensor = tensors["transformer." + entry.name]
            assert entry.shape == tuple(tensor.shape)
            expected += tensor.numpy().tobytes()
        assert content(checkpoint, number) == expected
    assert checkpoint.manifest.blocks[0].num_chunks > 1


def test_files_are_a_shard_too(tmp_path: Path) -> None:
    model = random_model(tmp_path, hidden_size=20, n_layer=1)
    checkpoint = open_checkpoint(model.folder)
    entries = checkpoint.manifest.files.entries
    assert [entry.name for entry in entries] == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert content(checkpoint, FILES) == b"".join(
        (tmp_path / entry.name).read_bytes() for entry in entries
    )
    assert all(isinstance(entry, File) for entry in entries)


def test_what_no_weights_are_is_left_out(tmp_path: Path) -> None:
    folder = save_bloom(tmp_path)
    before = open_checkpoint(folder).fingerprint
    mask = torch.ones((3, 3), dtype=torch.bool)
    scalar, nothing = torch.tensor(1.0), torch.zeros((0, 3))
    masks = {
        f"transformer.h.0.{number}": each for number, each in enumerate([mask, scalar, nothing])
    }
    change_tensors(folder, masks)
    assert open_checkpoint(folder).fingerprint == before


def test_a_file_that_has_changed_since_gives_no_chunks(tmp_path: Path) -> None:
    folder = save_bloom(tmp_path)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shards.has(ENDS)
    path = folder / "model.safetensors"
    checkpoint.shards.read(ENDS, 0)
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="has changed since it was opened"):
        checkpoint.shards.read(ENDS, 0)
    path.unlink()
    assert not checkpoint.shards.has(ENDS)
    assert checkpoint.shards.has(FILES)


def test_weights_without_a_block_are_refused(tmp_path: Path) -> None:
    folder = save_bloom(tmp_path)
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if ".h.3." not in name}
    save_file(kept, path)
    with pytest.raises(ModelError, match="hold nothing of its block 3"):
        _ = open_checkpoint(folder).manifest


def test_the_manifest_of_a_large_model_is_remembered_while_its_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_WORTH_REMEMBERING", 0)
    folder, memo = save_bloom(tmp_path / "model"), tmp_path / "memo"

    def made() -> Manifest:
        opened = open_checkpoint(folder)
        return make_manifest(
            opened._source,
            opened._weights,
            opened._read_file,
            partial(opened.family.block_prefix, opened.config),
            opened.num_blocks,
            memo=memo,
        )

    first = made()
    with monkeypatch.context() as broken:
        broken.delattr(shards, "_make")
        assert made() == first
    (kept,) = memo.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert made() == first, "a damaged note is ignored"
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"more": 1}))
    assert made() != first
