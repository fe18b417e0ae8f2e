"""Opening and loading checkpoints in every layout, and what is said of broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from petals.inference.attention import LaneRows
from petals.inference.cache import LaneCache
from petals.inference.checkpoint import open_checkpoint
from petals.inference.progress import Step
from petals.inference.sampling import SamplingParams
from petals.protocol.errors import ModelError
from petals.protocol.span import Span
from safetensors.torch import load_file
from support.checkpoint_files import change_config, change_tensors, save_as_bin, strip_prefix
from support.engines import generate, serving
from support.tiny_bloom import reference_tokens, save_bloom, tiny_bloom

PROMPT = [5, 6, 7, 8]


def greedy_is_exact(folder: Path) -> bool:
    checkpoint = open_checkpoint(folder)
    with serving(checkpoint, Span(0, 2), Span(2, 5)) as engines:
        params = SamplingParams(max_new_tokens=8)
        tokens = generate(engines, checkpoint.load_ends(), [PROMPT], params)
    return tokens == reference_tokens(tiny_bloom(), [PROMPT], 8)


def load_all(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.load_blocks(Span(0, checkpoint.num_blocks))
    checkpoint.load_ends()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "old bin"])
def test_layouts(tmp_path: Path, sharded: bool, layout: str) -> None:
    save_bloom(tmp_path, max_shard_size="50KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").exists() is not sharded
    if layout != "safetensors":
        save_as_bin(tmp_path, _use_new_zipfile_serialization=layout == "bin")
    assert greedy_is_exact(tmp_path)


def test_keys_without_the_base_models_prefix(tmp_path: Path) -> None:
    strip_prefix(save_bloom(tmp_path))
    assert greedy_is_exact(tmp_path)


def test_a_head_beside_a_config_that_ties_it(tmp_path: Path) -> None:
    save_bloom(tmp_path)
    embeddings = load_file(tmp_path / "model.safetensors")["transformer.word_embeddings.weight"]
    change_tensors(tmp_path, {"lm_head.weight": embeddings.clone()})
    ends = open_checkpoint(tmp_path).load_ends()
    rows = embeddings[:2]
    logits = ends.get_submodule("lm_head")(rows)
    torch.testing.assert_close(logits, rows @ embeddings.T)

    change_tensors(tmp_path, {"lm_head.weight": torch.ones_like(embeddings)})
    ends = open_checkpoint(tmp_path).load_ends()
    logits = ends.logits(torch.randn(1, 1, 48))
    assert (logits == logits[0, 0, 0]).all(), "a head that differs is the head, as in transformers"


def test_only_the_shards_of_the_span_are_opened(tmp_path: Path) -> None:
    save_bloom(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    of_span = {file for name, file in index.items() if ".h.2." in name or ".h.3." in name}
    of_ends = {file for name, file in index.items() if ".h." not in name}
    others = set(index.values()) - of_span - of_ends
    assert others
    for name in others:
        (tmp_path / name).unlink()
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.load_blocks(Span(2, 4))
    checkpoint.load_ends()
    with pytest.raises(ModelError, match=f"holds no {min(others)}"):
        checkpoint.load_blocks(Span(0, 5))
    for name in of_span:
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=r"holds no model-000\d\d-of"):
        open_checkpoint(tmp_path).load_blocks(Span(2, 3))


def test_a_stored_16_bit_model_in_fp32_and_back(tmp_path: Path) -> None:
    save_bloom(tmp_path, tiny_bloom().bfloat16())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.load_blocks(Span(0, 1), "auto", "cpu").dtype == torch.float32
    blocks = checkpoint.load_blocks(Span(0, 1), "bfloat16", "cpu")
    assert (blocks.dtype, blocks.cache_shape.dtype) == (torch.float32, torch.bfloat16)
    ends = checkpoint.load_ends(torch.float16)
    assert ends.embed(torch.tensor([[1]])).dtype == torch.float32
    assert ends.logits(torch.zeros(1, 1, 48)).dtype == torch.float32


def test_a_file_that_changes_under_a_running_node(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_bloom(tmp_path))
    blocks, ends = checkpoint.load_blocks(Span(0, 5)), checkpoint.load_ends()
    lanes = [LaneRows(LaneCache(blocks.cache_shape, 3), 3)]
    before = blocks.run(torch.ones(1, 3, 48), blocks.plan(lanes))
    ends.embed(torch.tensor([PROMPT]))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(10)
    torch.testing.assert_close(blocks.run(torch.ones(1, 3, 48), blocks.plan(lanes)), before)
    with pytest.raises(ModelError, match="has changed since it was opened"):
        ends.embed(torch.tensor([PROMPT]))


def test_the_fingerprint_is_of_the_files_and_the_weights(tmp_path: Path) -> None:
    def fingerprint(name: str, **options: Any) -> str:
        return open_checkpoint(save_bloom(tmp_path / name, **options)).fingerprint

    one = fingerprint("one")
    assert len(one) == 64
    assert fingerprint("same") == one
    assert fingerprint("weights", model=tiny_bloom(seed=1)) != one
    change_config(tmp_path / "same", layer_norm_epsilon=1e-3)
    assert open_checkpoint(tmp_path / "same").fingerprint != one


def test_how_weights_are_laid_out_in_files_changes_nothing(tmp_path: Path) -> None:
    one = open_checkpoint(save_bloom(tmp_path / "one")).fingerprint
    sharded = save_bloom(tmp_path / "sharded", max_shard_size="50KB")
    assert open_checkpoint(sharded).fingerprint == one
    save_as_bin(sharded)
    assert open_checkpoint(sharded).fingerprint == one
    strip_prefix(tmp_path / "one")
    assert open_checkpoint(tmp_path / "one").fingerprint == one


def test_what_a_checkpoint_says_of_itself(tmp_path: Path) -> None:
    save_bloom(tmp_path, tiny_bloom(eos_token_id=2, pad_token_id=3))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.num_blocks, checkpoint.hidden_size, checkpoint.vocab_size) == (5, 48, 97)
    assert (checkpoint.eos_token_ids, checkpoint.pad_token_id) == ((2,), 3)
    assert checkpoint.max_length == 2048
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    change_config(tmp_path, seq_length=512)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.eos_token_ids, checkpoint.pad_token_id) == ((4, 5), 4)
    assert checkpoint.max_length == 512
    (tmp_path / "generation_config.json").unlink()
    assert open_checkpoint(tmp_path).eos_token_ids == (2,)


def test_progress_is_told(tmp_path: Path) -> None:
    said: list[Step] = []
    open_checkpoint(save_bloom(tmp_path), progress=said.append).load_blocks(
        Span(1, 3), progress=said.append
    )
    assert said[0] == Step(f"opening {tmp_path}")
    assert said[1:] == [Step("loading blocks 1:3", done, 2, "blocks") for done in range(3)]


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "a/b/c", "~nobody-here/x", "x" * 999]
)
def test_no_such_folder(name: str) -> None:
    with pytest.raises(ModelError, match=r"there is no folder|cannot be opened"):
        open_checkpoint(name)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no model: the folder .* holds no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        open_checkpoint(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds no JSON object"),
        ("\xff", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "models of type None are not supported"),
        ('{"model_type": "t5"}', "models of type 't5' are not supported"),
        ('{"model_type": "gpt2"}', "models of type gpt2 cannot be cut into blocks"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid llama config"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "num_hidden_layers must be a positive"),
        ('{"model_type": "falcon", "num_attention_heads": 0}', "not a valid Falcon config"),
        ('{"model_type": "falcon", "num_hidden_layers": 0}', "num_hidden_layers must be positive"),
        (
            '{"model_type": "falcon", "hidden_size": 50, "num_attention_heads": 4}',
            "50 is not divisible by num_attention_heads 4",
        ),
        ('{"model_type": ["bloom"]}', "are not supported"),
        ('{"model_type": "bloom", "n_head": "many"}', "not a valid BLOOM config"),
        ('{"model_type": "bloom", "n_head": 0}', "n_head must be positive"),
        ('{"model_type": "bloom", "n_layer": -1}', "n_layer must be positive"),
        (
            '{"model_type": "bloom", "hidden_size": 50, "n_head": 4}',
            "50 is not divisible by n_head 4",
        ),
        ('{"model_type": "bloom", "quantization_config": {"bits": 4}}', "quantised checkpoint"),
        ('{"model_type": "bloom"}', "holds no weights"),
    ],
)
def test_broken_configs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -10_000])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_cut_off_weight_file(tmp_path: Path, kind: str, keep: int) -> None:
    save_bloom(tmp_path)
    if kind == "bin":
        save_as_bin(tmp_path)
    (path,) = tmp_path.glob("*model.*")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=f"{path.name} cannot be read; it is corrupt"):
        load_all(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_weight_file_of_junk(tmp_path: Path, kind: str) -> None:
    save_bloom(tmp_path)
    if kind == "bin":
        save_as_bin(tmp_path)
    (path,) = tmp_path.glob("*model.*")
    path.write_bytes(bytes(range(256)) * 100)
    with pytest.raises(ModelError, match="cannot be read"):
        load_all(tmp_path)


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    save_bloom(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read"):
        load_all(tmp_path)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {}, {1: 2}, {"ln_f.weight": 1}])
def test_a_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    save_bloom(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no dictionary|holds no tensors|is missing"):
        load_all(tmp_path)


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    name = "transformer.h.3.mlp.dense_h_to_4h.weight"
    save_bloom(tmp_path)
    change_tensors(tmp_path, {name: torch.zeros(3, 4)})
    with pytest.raises(ModelError, match=r"h\.3\.mlp\.dense_h_to_4h\.weight has shape \(3, 4\)"):
        load_all(tmp_path)
    change_tensors(tmp_path, {name: torch.zeros(192, 48, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"is stored as torch\.int8"):
        load_all(tmp_path)
    change_tensors(tmp_path, {name: None})
    with pytest.raises(ModelError, match=r"h\.3\.mlp\.dense_h_to_4h\.weight is missing"):
        load_all(tmp_path)
    open_checkpoint(tmp_path).load_blocks(Span(0, 3))


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    save_bloom(tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        open_checkpoint(tmp_path).load_ends()


@pytest.mark.parametrize("span", [Span(0, 6), Span(5, 6), Span(100, 200)])
def test_a_span_outside_of_the_model(tmp_path: Path, span: Span) -> None:
    checkpoint = open_checkpoint(save_bloom(tmp_path))
    with pytest.raises(ModelError, match="has 5 blocks: 0:5"):
        checkpoint.load_blocks(span)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "holds no JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "../secret"}}', "'../secret' is not the name of a shard file"),
        ('{"weight_map": {"a": 7}}', "7 is not the name of a shard file"),
        ('{"weight_map": {"h.0.x": "gone.safetensors"}}', "is missing in the weights"),
    ],
)
def test_a_broken_index(tmp_path: Path, index: str, message: str) -> None:
    save_bloom(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        load_all(tmp_path)


def test_a_tensor_that_is_not_in_the_shard_that_the_index_names(tmp_path: Path) -> None:
    save_bloom(tmp_path, max_shard_size="50KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["transformer.ln_f.weight"] = files[0]
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"{files[0]} cannot be read"):
        open_checkpoint(tmp_path).load_ends()


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        open_checkpoint(save_bloom(tmp_path)).load_tokenizer()


def test_the_ends_refuse_tokens_that_they_do_not_know(tmp_path: Path) -> None:
    ends = open_checkpoint(save_bloom(tmp_path)).load_ends()
    for token in (-1, 97):
        with pytest.raises(ValueError, match=f"from 0 to 96, got {token}"):
            ends.embed(torch.tensor([[1, token]]))
