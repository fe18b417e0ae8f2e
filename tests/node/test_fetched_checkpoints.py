"""A model out of shards, as it is when it was fetched, is the one that they were cut from."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from petals.inference import checkpoint as checkpoints
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.hub import FetchedSource
from petals.inference.sampling_params import SamplingParams
from petals.node.shard_store import ShardStore
from petals.protocol.errors import ModelError
from petals.protocol.manifest import ENDS, FILES, shards_of
from petals.protocol.span import Span
from support.engines import generate, serving
from support.tiny_families import CONFIGS, greedy, tiny_config, tiny_model
from support.tiny_gguf import write_llama

PROMPTS = [[5, 6, 7, 8, 90, 91, 3], [9]]
NEW = 3
GREEDY = SamplingParams(max_new_tokens=NEW)


def fetched(checkpoint: Checkpoint, folder: Path, numbers: Iterable[int]) -> Checkpoint:
    """What a node has that has got these shards, and nothing else of the model."""
    manifest = checkpoint.manifest
    store = ShardStore(folder, manifest)
    for number in numbers:
        store.open(number)
        for chunk in range(manifest.shards[number].num_chunks):
            assert store.write(number, chunk, checkpoint.shards.read(number, chunk))
    source = FetchedSource("petals:…", store.unpack_files(), store.shards)
    return checkpoints._open(source, None, tried=True, manifest=manifest)


def tokens_of(checkpoint: Checkpoint) -> list[list[int]]:
    with serving(checkpoint, Span(0, checkpoint.num_blocks)) as engines:
        return generate(engines, checkpoint.load_ends(), PROMPTS, GREEDY)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_the_same_out_of_shards(tmp_path: Path, name: str) -> None:
    model = tiny_model(tiny_config(name), tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model", tried=True)
    everything = range(len(checkpoint.manifest.shards))
    again = fetched(checkpoint, tmp_path / "data", everything)
    assert again.fingerprint == checkpoint.fingerprint
    assert tokens_of(again) == greedy(model, PROMPTS, NEW)


@pytest.mark.parametrize("name", ["Llama", "Mixtral, window", "GPT-NeoX", "BLOOM"])
def test_a_span_needs_its_own_shards_only(tmp_path: Path, name: str) -> None:
    tiny_model(tiny_config(name), tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model", tried=True)
    span = Span(1, 3)
    part = fetched(checkpoint, tmp_path / "blocks", [FILES, *shards_of(span)])
    assert part.load_blocks(span).span == span
    with pytest.raises(ModelError, match="was not fetched from the swarm"):
        part.load_blocks(Span(0, 1))
    with pytest.raises(ModelError, match="was not fetched from the swarm"):
        part.load_ends()
    fetched(checkpoint, tmp_path / "ends", [FILES, ENDS]).load_ends()


def test_a_gguf_file_is_fetched_as_it_is_computed_with(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path / "model.gguf"), tried=True)
    again = fetched(checkpoint, tmp_path / "data", range(len(checkpoint.manifest.shards)))
    assert open_checkpoint(tmp_path / "model.gguf", tried=True).fingerprint == again.fingerprint
    assert again.dtype == checkpoint.dtype
    assert again.eos_token_ids == checkpoint.eos_token_ids
    assert tokens_of(again) == tokens_of(checkpoint)


def test_another_process_that_uses_the_same_shards_is_no_change(tmp_path: Path) -> None:
    tiny_model(tiny_config("Llama"), tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model", tried=True)
    ends = fetched(checkpoint, tmp_path / "data", [FILES, ENDS]).load_ends()
    other = ShardStore(tmp_path / "data", checkpoint.manifest)
    other.use([ENDS])
    assert ends.embed(torch.tensor([[1]])).shape == (1, 1, checkpoint.hidden_size)
    other.close()
