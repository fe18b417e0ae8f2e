"""The random models that benchmarks run are models to us and to transformers."""

import json
from pathlib import Path

import pytest
import torch
from bench_parts.local import FLOAT32, Local, token_ids
from bench_parts.models import TINY, TINY_BLOCK, clean, model_folder
from bench_parts.rivals import Transformers
from bench_parts.sessions import texts_together
from petals.inference.checkpoint import open_checkpoint
from petals.protocol.errors import ModelError
from petals.protocol.span import Span


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_every_block_is_a_file_of_its_own(models: Path) -> None:
    folder = model_folder(TINY, models)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    by_file: dict[str, set[str]] = {}
    for name, filename in index.items():
        parts = name.split(".")
        by_file.setdefault(filename, set()).add(parts[2] if parts[1] == "h" else "ends")
    assert sorted(min(parts) for parts in by_file.values()) == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "ends",
    ]
    assert all(len(parts) == 1 for parts in by_file.values())
    assert set(by_file) == {path.name for path in folder.glob("*.safetensors")}


def test_sessions_together_write_what_transformers_writes(models: Path) -> None:
    folder = model_folder(TINY, models)
    prompts = [token_ids(TINY.vocabulary, length, seed=length) for length in (3, 20, 41)]
    rival = Transformers(folder, torch.float32)
    with Local(folder, FLOAT32, ends=True) as local:
        texts = texts_together(local, prompts, 6)
    assert texts == [rival.generate(prompt, 6) for prompt in prompts]
    assert len({token for text in texts for token in text}) > 3, "one token over and over"


def test_going_back_leaves_the_text_as_it_was(models: Path) -> None:
    with Local(model_folder(TINY, models), FLOAT32, ends=True) as local:
        session = local.open(64)
        prompt = token_ids(TINY.vocabulary, 12)
        first = session.sample(session.submit_tokens(prompt))
        session.decode(3)
        assert session.length == len(prompt)
        session.prefill(prompt)
        session.length = 0
        assert session.sample(session.submit_tokens(prompt)) == first


def test_of_a_large_model_only_the_first_blocks_are_there(models: Path) -> None:
    checkpoint = open_checkpoint(model_folder(TINY_BLOCK, models))
    assert checkpoint.num_blocks == TINY_BLOCK.num_blocks
    assert checkpoint.load_blocks(Span(0, 2)).span == Span(0, 2)
    with pytest.raises(ModelError, match=r"h\.2\."):
        checkpoint.load_blocks(Span(2, 3))


def test_a_model_is_written_once_and_removed_when_asked(tmp_path: Path) -> None:
    (tmp_path / "something-else").mkdir()
    folder = model_folder(TINY_BLOCK, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert model_folder(TINY_BLOCK, tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["something-else"]


def test_a_model_half_written_is_written_anew(tmp_path: Path) -> None:
    unfinished = model_folder(TINY_BLOCK, tmp_path).with_suffix(".part")
    clean(tmp_path)
    unfinished.mkdir()
    (unfinished / "model-00001-of-00001.safetensors").write_bytes(b"half")
    folder = model_folder(TINY_BLOCK, tmp_path)
    assert open_checkpoint(folder).load_blocks(Span(0, 1)).span == Span(0, 1)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
